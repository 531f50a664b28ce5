"""The losses as functions.

All six take

- ``logits`` (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
  modified.
- ``target``: class indices (N,) of any integer dtype. The logistic family (LR, HS-LR, SS-LR) also takes multi-hot
  targets (N, C) of any dtype that holds only 0 and 1, told apart by their rank. All take :class:`fused_losses.Labels`,
  several classes per row: mixed and soft labels, sparse multi-hot targets.

and return float32 (float64 for float64 logits): a scalar, or (N,) for ``reduction="none"``. They are differentiable
once, by the logits; the gradient has the logits' dtype. A row with a NaN logit is NaN, in the loss and in its whole
gradient row.
"""

from collections.abc import Callable

from torch import Tensor

from . import ops
from .arguments import (
    IGNORE_INDEX,
    Options,
    Reduce,
    Rows,
    check_logits,
    check_options,
    margin_from_logits,
    rows_of,
    told_of,
    told_of_rows,
)
from .autograd import Finish, LabelLogOdds, LossFromLogits, StatisticsFromLogits, is_differentiated, with_margin
from .finish import Reduction
from .finish import log_odds as log_odds_of
from .finish_labels import number_of_terms, present_labels, smoothing, weighted
from .labels import Labels
from .losses import CRL, HSLR, LR, NLLR, SSLR, CrossEntropy, Loss, LossSpec, OwnSoftmax
from .margin import Margin, MarginTerms
from .shard import ClassShard, check_agreement


def cross_entropy(
    logits: Tensor,
    target: Tensor | Labels,
    *,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Softmax cross-entropy, over all classes or over the target and its k most confusing negatives.

    The loss of a row is -log p_y = softplus(-d), with d = z_y - log sum over S of exp(z_j), S the negatives: all
    classes but the target, or the k hardest. Without ``k`` and ``ratio`` it is ``torch.nn.functional.cross_entropy``,
    with the loss in float32 for 16-bit logits.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; or :class:`fused_losses.Labels` with
            weights: soft labels, mixup. (A matrix of all classes' probabilities is refused.)
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        label_smoothing: eps in [0, 1): the target keeps a share 1 - eps, and eps is spread evenly over the target and
            the negatives S, as ``torch.nn.functional.cross_entropy`` does over all C classes. (fast-reid spreads it
            over the C - 1 others: eps C / (C - 1) here.) Not with ``weight``, multi-hot targets, or ``Labels`` without
            weights. Default: 0.
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
            Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in the
            loss and in its whole gradient row.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits = torch.zeros(2, 1000, requires_grad=True)
        >>> fl.cross_entropy(logits, torch.tensor([1, 999]), k=9).backward()
        >>> int(logits.grad.count_nonzero())  # the target and its k hardest negatives, in each row
        20
    """
    options = Options(k, ratio, weight, ignore_index, reduction, label_smoothing, margin, check_targets, shard)
    return apply(CrossEntropy(), logits, target, options)


def nllr_loss(
    logits: Tensor,
    target: Tensor | Labels,
    *,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Negative log likelihood ratio, -log(p_y / (1 - p_y)).

    Zhu, Yao, Jiang, Yu, arXiv 1804.10690. The loss of a row is -d, with d = z_y - log sum over S of exp(z_j), S the
    negatives: all classes but the target, or the k hardest. Unbounded below: the pull on the target's logit is 1
    however sure the model is.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; or :class:`fused_losses.Labels` with
            weights: soft labels, mixup. (A matrix of all classes' probabilities is refused.)
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        label_smoothing: eps in [0, 1): the target keeps a share 1 - eps, and eps is spread evenly over the target and
            the negatives S, as ``torch.nn.functional.cross_entropy`` does over all C classes. (fast-reid spreads it
            over the C - 1 others: eps C / (C - 1) here.) Not with ``weight``, multi-hot targets, or ``Labels`` without
            weights. Default: 0.
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
            Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in the
            loss and in its whole gradient row.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits, target = torch.zeros(2, 1000), torch.tensor([1, 999])
        >>> fl.nllr_loss(logits, target)  # log(C - 1)
        tensor(6.9068)
    """
    options = Options(k, ratio, weight, ignore_index, reduction, label_smoothing, margin, check_targets, shard)
    return apply(NLLR(), logits, target, options)


def crl_loss(
    logits: Tensor,
    target: Tensor | Labels,
    *,
    alpha: float = CRL.alpha,
    beta: float = CRL.beta,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Competing ratio loss, -log p_y + beta * log(alpha + 1 - p_y).

    Zhang et al., arXiv 1907.13349 and 1912.11642. p_y = sigmoid(d), with d = z_y - log sum over S of exp(z_j), S the
    negatives: all classes but the target, or the k hardest. Its least value is beta * log(alpha), at p_y = 1.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; or :class:`fused_losses.Labels` with
            weights: soft labels, mixup. (A matrix of all classes' probabilities is refused.)
        alpha: finite, >= 0; below 1 the loss can be negative; alpha = 0 with beta = 1 is NLLR. Default: 1.5, the
            authors'.
        beta: finite, >= 0; 0 is cross-entropy. Default: 1, the authors'.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        label_smoothing: eps in [0, 1): the target keeps a share 1 - eps, and eps is spread evenly over the target and
            the negatives S, as ``torch.nn.functional.cross_entropy`` does over all C classes. (fast-reid spreads it
            over the C - 1 others: eps C / (C - 1) here.) Not with ``weight``, multi-hot targets, or ``Labels`` without
            weights. Default: 0.
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
            Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in the
            loss and in its whole gradient row.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits, target = torch.zeros(2, 1000), torch.tensor([1, 999])
        >>> fl.crl_loss(logits, target, beta=0.0) == fl.cross_entropy(logits, target)
        tensor(True)
    """
    options = Options(k, ratio, weight, ignore_index, reduction, label_smoothing, margin, check_targets, shard)
    return apply(CRL(alpha, beta), logits, target, options)


def lr_loss(
    logits: Tensor,
    target: Tensor | Labels,
    *,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Vanilla logistic regression, one-vs-rest: softplus(-z_y) + sum over S of softplus(z_j).

    The baseline of Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400. S are the
    negatives: all classes but the positives, or the k hardest. Over all of them it is the sum over classes of
    ``binary_cross_entropy_with_logits``: it starts at C * log 2, so it wants a smaller learning rate than
    cross-entropy.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; multi-hot (N, C), told apart by its rank: 0
            and 1 of any dtype, any number of positives per row, with ``shard`` this rank's columns; or
            :class:`fused_losses.Labels`.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        label_smoothing: eps in [0, 1): the target keeps a share 1 - eps, and eps is spread evenly over the target and
            the negatives S, as ``torch.nn.functional.cross_entropy`` does over all C classes. (fast-reid spreads it
            over the C - 1 others: eps C / (C - 1) here.) Not with ``weight``, multi-hot targets, or ``Labels`` without
            weights. Default: 0.
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
            Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in the
            loss and in its whole gradient row.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
            entry other than 0 and 1 (looked at as class indices are).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits, target = torch.zeros(2, 10), torch.tensor([1, 9])
        >>> fl.lr_loss(logits, target)  # C log 2
        tensor(6.9315)
    """
    options = Options(k, ratio, weight, ignore_index, reduction, label_smoothing, margin, check_targets, shard)
    return apply(LR(), logits, target, options)


def hs_lr_loss(
    logits: Tensor,
    target: Tensor | Labels,
    *,
    k: int | None = None,
    ratio: float | None = None,
    alpha: float = HSLR.alpha,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Logistic regression with hard selection: softplus(-z_y) + alpha * mean of softplus(z_j) over the k hardest.

    Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400, Eq. 5. The gradient touches k
    + 1 classes. With multi-hot targets the two terms are means over all positives and all chosen negatives of the
    batch, as in the authors' code; "none" then gives rows whose mean is that.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; multi-hot (N, C), told apart by its rank: 0
            and 1 of any dtype, any number of positives per row, with ``shard`` this rank's columns; or
            :class:`fused_losses.Labels`.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Either ``k`` or ``ratio`` is required.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
        alpha: weight of the negatives, finite, >= 0. Default: 1 (ours: the authors' code has none).
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
            Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in the
            loss and in its whole gradient row.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
            entry other than 0 and 1 (looked at as class indices are).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits = torch.zeros(2, 1000, requires_grad=True)
        >>> fl.hs_lr_loss(logits, torch.tensor([1, 999]), k=9).backward()
        >>> int(logits.grad.count_nonzero())  # the target and its k hardest negatives, in each row
        20
    """
    options = Options(k, ratio, weight, ignore_index, reduction, 0.0, margin, check_targets, shard)
    return apply(HSLR(alpha), logits, target, options)


def ss_lr_loss(
    logits: Tensor,
    target: Tensor | Labels,
    *,
    alpha: float = SSLR.alpha,
    gamma: float = SSLR.gamma,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Logistic regression with soft selection: softplus(-z_y) + alpha * mean of sigma(z_j)^gamma * softplus(z_j).

    Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400, Eq. 6. The mean is over the
    negatives S: all classes but the positives, or the k hardest. The gradient flows through the weight sigma^gamma too.
    With multi-hot targets the two terms are means over all positives and all negatives of the batch, as in the authors'
    code; "none" then gives rows whose mean is that.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; multi-hot (N, C), told apart by its rank: 0
            and 1 of any dtype, any number of positives per row, with ``shard`` this rank's columns; or
            :class:`fused_losses.Labels`.
        alpha: weight of the negatives, finite, >= 0. Default: 1 (ours: the authors' code has none).
        gamma: how sharply easy negatives fade, finite, >= 0; 0 weighs all alike. Default: 2 (ours: the authors' code
            has none).
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
            Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in the
            loss and in its whole gradient row.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
            entry other than 0 and 1 (looked at as class indices are).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits, target = torch.zeros(2, 1000), torch.tensor([1, 999])
        >>> fl.ss_lr_loss(logits, target, alpha=4.0)  # (1 + alpha / 2^gamma) log 2
        tensor(1.3863)
    """
    options = Options(k, ratio, weight, ignore_index, reduction, 0.0, margin, check_targets, shard)
    return apply(SSLR(alpha, gamma), logits, target, options)


def softmax_loss(
    logits: Tensor,
    target: Tensor | Labels,
    value: Callable[[Tensor], Tensor],
    *,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduce = "mean",
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """A loss of your own: value(d), d the log-odds of the target among the target and the negatives S.

    d = z_y - log sum over S of exp(z_j), S all classes but the target, or the k hardest. The logits are read and their
    gradient is written by the same kernels as for the losses here; ``value`` and its slope cost N numbers. With p =
    sigmoid(d): ``-F.logsigmoid(d)`` is cross-entropy, ``-(1 - p)**2 * F.logsigmoid(d)`` the focal loss, ``(1 - p**0.7)
    / 0.7`` generalised cross-entropy.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; or :class:`fused_losses.Labels` with
            weights: soft labels, mixup. (A matrix of all classes' probabilities is refused.)
        value: any differentiable PyTorch function from d (N,) to the values of the rows (N,), each of its own d. It is
            also called on ignored rows, at d = 0, and their values are dropped.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        weight: (C,), floating, without gradient: row i counts weight[target[i]] times, and the mean divides by the sum
            of these. Class indices only. Default: None, every row counts once.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        reduction: "none": a value for each row; "mean": over the rows not ignored, NaN if there are none; "sum".
            Default: "mean".
        label_smoothing: eps in [0, 1): the target keeps a share 1 - eps, and eps is spread evenly over the target and
            the negatives S, as ``torch.nn.functional.cross_entropy`` does over all C classes. (fast-reid spreads it
            over the C - 1 others: eps C / (C - 1) here.) Not with ``weight``, multi-hot targets, or ``Labels`` without
            weights. Default: 0.
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
            Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in the
            loss and in its whole gradient row.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype; a ``value`` that is no function.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; what ``value``
            returns is not (N,).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits, target = torch.zeros(2, 1000), torch.tensor([1, 999])
        >>> fl.softmax_loss(logits, target, lambda d: (1 - torch.sigmoid(d)**0.7) / 0.7, k=9)  # p = 1 / 10
        tensor(1.1435)
    """
    options = Options(k, ratio, weight, ignore_index, reduction, label_smoothing, margin, check_targets, shard)
    return apply(OwnSoftmax(value), logits, target, options)


def apply(loss: Loss, logits: Tensor, target: Tensor | Labels, options: Options) -> Tensor:
    """The one way from a user's arguments to the autograd functions."""
    check_options(loss, options)
    rows, taken = rows_from_logits(loss, logits, target, options)
    if options.shard is not None and options.shard.unchecked:
        _check_ranks(loss, options, logits, target)
    margin = margin_from_logits(options.margin, logits.dtype)
    target, weight, reduction, spec = taken
    in_one = options.shard is None and not isinstance(loss, OwnSoftmax)
    if in_one and (margin is None or margin.numbers()):
        spec = with_numbers_of(margin, spec)
        if is_differentiated(rows):
            result, _ = LossFromLogits.apply(rows, target, weight, reduction, spec)
        else:
            result, *_ = ops.forward(rows, target, weight, reduction, *spec.given())
    else:
        statistics = StatisticsFromLogits.apply(rows, target, spec.of_statistics(), options.shard)
        result = finished(loss, statistics, taken, margin)
    return result.squeeze(0) if logits.dim() == 1 and options.reduction == "none" else result


def _check_ranks(loss: Loss, options: Options, logits: Tensor, target: Tensor | Labels) -> None:
    assert options.shard is not None
    told = told_of(loss, options, target) | {"dtype of the logits": str(logits.dtype)}
    told |= told_of_rows(logits, target)
    check_agreement(options.shard, told)


def rows_from_logits(loss: Loss, logits: Tensor, target: Tensor | Labels, options: Options) -> tuple[Tensor, Rows]:
    """Logits (rows, classes) and what the doors take besides."""
    num_classes = check_logits(logits, options.shard)
    taken = rows_of(loss, logits.shape, logits.dtype, logits.device, target, options, num_classes)
    return logits if logits.dim() == 2 else logits.unsqueeze(0), taken


def finished(loss: Loss, statistics: Tensor, rows: Rows, margin: MarginTerms | None) -> Tensor:
    """The loss from the statistics of whole rows."""
    target, weight, reduction, spec = rows
    if margin is not None and margin.numbers() and not isinstance(loss, OwnSoftmax):
        spec = with_numbers_of(margin, spec)
    else:
        statistics = with_margin(statistics, margin, spec)
    if not isinstance(loss, OwnSoftmax):
        return Finish.apply(statistics, target, weight, reduction, spec.of_finish())
    if not spec.labels:
        values = _own_values(loss, log_odds_of(statistics))
    else:
        d = LabelLogOdds.apply(statistics, target)
        present, w = present_labels(statistics, target, weight)
        values = weighted(w, _own_values(loss, d.flatten()).view(d.shape), present)
        if spec.label_smoothing:
            values = values + smoothing(statistics, present, w, number_of_terms(present, spec), spec)
    return Reduction.of(target, weight, reduction, spec, values).loss(values)


def with_numbers_of(margin: MarginTerms | None, spec: LossSpec) -> LossSpec:
    return spec if margin is None else spec._replace(margin=[float(term) for term in margin])


def _own_values(loss: OwnSoftmax, d: Tensor) -> Tensor:
    values = loss.value(d)
    if not isinstance(values, Tensor) or values.shape != d.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"value must give one number per row, a Tensor of shape {tuple(d.shape)}, got {got}")
    return values
