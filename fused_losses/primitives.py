"""What the losses are made of, as functions: statistics of the rows, differentiable. N numbers each, for losses of your
own and for training accuracy from the pass that the loss has made anyway.
"""

from torch import Tensor

from .arguments import IGNORE_INDEX, Options, Rows, check_options, margin_from_logits
from .autograd import StatisticsFromLogits, with_margin
from .finish import RowStatistics, ignored_rows
from .finish import log_odds as log_odds_of
from .finish_labels import label_terms, present_labels
from .formulas import softplus
from .functional import rows_from_logits
from .labels import Labels
from .losses import LR, SSLR, LogOdds, Loss
from .margin import Margin
from .shard import ClassShard


def log_odds(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """d = z_y - log sum over S of exp(z_j): the log-odds of the target among the target and the negatives S.

    sigmoid(d) is the target's probability. Every loss of the softmax family is a function of d
    (:func:`fused_losses.softmax_loss`).

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        margin: :class:`fused_losses.Margin` on the target's logit, or on those of all ``Labels``. Default: None.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        Tensor: (N,), () for one row; float32, float64 for float64 logits; 0 in ignored rows. Differentiable once, by
            the logits.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits, target = torch.randn(4, 1000), torch.tensor([1, 7, 7, 999])
        >>> p = torch.sigmoid(fl.log_odds(logits, target))
        >>> torch.allclose(p, logits.softmax(1)[range(4), target])
        True
    """
    options = Options(
        k=k, ratio=ratio, ignore_index=ignore_index, margin=margin, check_targets=check_targets, shard=shard
    )
    statistics, rows = _statistics(LogOdds(), logits, target, options)
    d = log_odds_of(with_margin(statistics, margin_from_logits(margin, logits.dtype), rows.spec))
    ignored = ignored_rows(rows.target, rows.spec) if margin is not None else None
    return _of_rows(d if ignored is None else d.masked_fill(ignored, 0), logits)


def row_statistics(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> RowStatistics:
    """What the softmax losses know of each row, from one pass over the logits.

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        RowStatistics: ``log_odds`` as :func:`log_odds`; ``target_logit``; ``hardest_logit``, the largest among the
            negatives; ``correct``, whether the target's exceeds it. (N,) each, () for one row; the first two
            differentiable once, by the logits.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
        >>> fl.row_statistics(logits, torch.tensor([1, 2])).correct
        tensor([ True, False])
    """
    options = Options(k=k, ratio=ratio, ignore_index=ignore_index, check_targets=check_targets, shard=shard)
    statistics, _ = _statistics(LogOdds(), logits, target, options)
    return RowStatistics.of(_of_rows(statistics, logits), "softmax")


def logistic_sums(
    logits: Tensor,
    target: Tensor | Labels,
    *,
    gamma: float | None = None,
    k: int | None = None,
    ratio: float | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> tuple[Tensor, Tensor]:
    """What the losses of the logistic family know of each row: pos and neg.

    pos = sum over the positives of softplus(-z_p); neg = sum over the negatives S of softplus(z_j), with ``gamma`` of
    sigma(z_j)^gamma softplus(z_j).

    Args:
        logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
            modified.
        target: class indices (N,), or () for one row, of any integer dtype; multi-hot (N, C), told apart by its rank: 0
            and 1 of any dtype, any number of positives per row, with ``shard`` this rank's columns; or
            :class:`fused_losses.Labels`.
        gamma: how sharply easy negatives fade, finite, >= 0. Default: None, they all count alike.
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Default: None, all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
            Default: None.
        ignore_index: rows with this target count nothing and get a zero gradient. Class indices only. None: every row
            counts. Default: -100.
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
            Default: False.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.
            Default: None.

    Returns:
        tuple[Tensor, Tensor]: pos and neg, (N,) each, () for one row; float32, float64 for float64 logits; 0 in ignored
            rows. Differentiable once, by the logits.

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
            entry other than 0 and 1 (looked at as class indices are).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> logits, target = torch.zeros(2, 1000), torch.tensor([1, 999])
        >>> pos, neg = fl.logistic_sums(logits, target, k=10)
        >>> pos + neg / 10  # HS-LR with alpha 1
        tensor([1.3863, 1.3863])
    """
    options = Options(k=k, ratio=ratio, ignore_index=ignore_index, check_targets=check_targets, shard=shard)
    loss = LR() if gamma is None else SSLR(gamma=gamma)
    statistics, rows = _statistics(loss, logits, target, options)
    neg = statistics[:, 1]
    if rows.spec.labels:
        pos = label_terms(statistics, *present_labels(statistics, rows.target, rows.weight))
    elif rows.spec.multi_hot(rows.target):
        pos = statistics[:, 2]
    else:
        pos = softplus(-statistics[:, 2])
        ignored = ignored_rows(rows.target, rows.spec)
        pos = pos if ignored is None else pos.masked_fill(ignored, 0)
    return _of_rows(pos, logits), _of_rows(neg, logits)


def _statistics(loss: Loss, logits: Tensor, target: Tensor | Labels, options: Options) -> tuple[Tensor, Rows]:
    """(rows, 3 | 4 | 3 + P), and what the doors took besides the logits."""
    if isinstance(target, Labels) and loss.family == "softmax":
        raise ValueError("log-odds and row statistics are those of one target: give class indices, got Labels")
    check_options(loss, options)
    rows, taken = rows_from_logits(loss, logits, target, options)
    return StatisticsFromLogits.apply(rows, taken.target, taken.spec, options.shard), taken


def _of_rows(numbers: Tensor, logits: Tensor) -> Tensor:
    return numbers if logits.dim() == 2 else numbers.squeeze(0)
