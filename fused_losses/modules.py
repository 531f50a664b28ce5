"""The losses as ``nn.Module``: the arguments of the function twin, given once.

``forward(logits, target)`` is the twin's. ``weight`` is a buffer: it moves with ``.to(device)`` and stands in the state
dict. Every argument is an attribute and may be assigned anew, ``criterion.alpha = 2.0``; it is checked then, as it is
when the module is made. An assigned ``k`` takes the place of ``ratio``, and the other way round.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import functional
from .arguments import IGNORE_INDEX, LossOptions, Options, Reduce, check_options
from .labels import Labels
from .losses import CRL, HSLR, LR, NLLR, SSLR, CrossEntropy, Loss, OwnSoftmax
from .margin import Margin
from .shard import ClassShard

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

HYPER_PARAMETERS = {field.name for loss in Loss.__subclasses__() for field in fields(loss)}
PLAIN: dict[str, Callable] = {
    "k": operator.index, "ratio": float, "ignore_index": operator.index, "label_smoothing": float
}  # fmt: skip
RIVALS = {"k": "ratio", "ratio": "k"}


class RowLoss(nn.Module):
    """A loss and its options: the base of the loss modules, and what ``loss=`` of a linear loss takes.

    For annotations and ``isinstance``; to make one, call a subclass. Every argument is an attribute and may be assigned
    anew, ``criterion.alpha = 2.0``; it is checked then, as it is when the module is made. An assigned ``k`` takes the
    place of ``ratio``, and the other way round. ``weight`` is a buffer.

    Args:
        loss: what the subclass is, with its hyper-parameters.
        options: ``k``, ``ratio``, ``weight``, ``ignore_index``, ``reduction``, ``label_smoothing``, ``margin``,
            ``check_targets`` and ``shard``, by name, with meaning, defaults and errors as in
            :func:`fused_losses.cross_entropy`.

    Raises:
        TypeError: a positional or an unknown argument, an option of a wrong type.
        ValueError: an option out of its range, or two that exclude each other.

    Example:
        >>> losses: dict[str, fl.RowLoss] = {"CE": fl.CrossEntropyLoss(), "HS-LR": fl.HSLRLoss(k=10)}
        >>> {name: loss.k for name, loss in losses.items()}
        {'CE': None, 'HS-LR': 10}
    """

    loss: Loss
    k: int | None
    ratio: float | None
    weight: Tensor | None
    ignore_index: int | None
    reduction: Reduce
    label_smoothing: float
    margin: Margin | None
    check_targets: bool
    shard: ClassShard | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        first = next(iter(inspect.signature(cls).parameters.values()))
        if args and first.kind is first.KEYWORD_ONLY:
            raise TypeError(f"{cls.__name__} takes its arguments by name, {cls.__name__}(k=100), got {args[0]!r}")
        return super().__new__(cls)

    def __init_subclass__(cls, smooths: bool = True, **kwargs: Any) -> None:
        """Spells the options out, for ``help()`` and ``inspect``."""
        super().__init_subclass__(**kwargs)
        own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Options.__annotations__[name]
            )
            for name, default in Options._field_defaults.items()
            if smooths or name != "label_smoothing"
        ]
        cls.__signature__ = inspect.Signature([*own[1:], *shared])  # type: ignore[attr-defined]

    def __init__(self, loss: Loss, **options: Unpack[LossOptions]):
        super().__init__()
        unknown = [name for name in options if name not in Options._fields]
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}")
        self.register_buffer("weight", None)
        self._take(loss, Options(**options))

    def _take(self, loss: Loss, options: Options) -> None:
        """Checks all of them, then sets them."""
        check_options(loss, options)
        values: dict[str, Any] = {"loss": loss, **options._asdict()}
        self._buffers["weight"] = values.pop("weight")  # by name, the compiler could not trace it
        for name, value in values.items():
            # NumPy's numbers become Python's: the compiler would take them for tensors
            plain = PLAIN.get(name) if value is not None else None
            super().__setattr__(name, plain(value) if plain else value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Options._fields:
            changed = {name: value}
            if value is not None and name in RIVALS:
                changed[RIVALS[name]] = None
            self._take(self.loss, self.options._replace(**changed))
        elif name not in HYPER_PARAMETERS:
            super().__setattr__(name, value)
        elif name in self.loss.__match_args__:
            self._take(replace(self.loss, **{name: value}), self.options)
        else:
            raise AttributeError(f"{type(self).__name__} has no hyper-parameter {name}")

    @property
    def options(self) -> Options:
        """The arguments that the function twins of all losses share."""
        return Options(*(getattr(self, name) for name in Options._fields))

    def forward(self, logits: Tensor, target: Tensor | Labels) -> Tensor:
        """The loss of these logits.

        Args:
            logits: (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides;
                never modified.
            target: class indices (N,), or () for one row, of any integer dtype; or what else the class above says.

        Returns:
            Tensor: (), or (N,) with ``reduction="none"``; () for one row. Float32, float64 for float64 logits.
                Differentiable once, by the logits, whose dtype their gradient has. A row with a NaN logit is NaN, in
                the loss and in its whole gradient row.

        Raises:
            TypeError: logits, target or an option of a wrong type or dtype.
            ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
                entry other than 0 and 1 (looked at as class indices are).
            IndexError: a class index outside [0, C); see ``check_targets``.
            RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.
        """
        return functional.apply(self.loss, logits, target, self.options)

    if TYPE_CHECKING:  # nn.Module's takes and gives anything

        def __call__(self, logits: Tensor, target: Tensor | Labels) -> Tensor: ...

    def extra_repr(self) -> str:
        settings = vars(self.loss) | self.options._asdict()
        if self.weight is not None:
            settings["weight"] = f"<{self.weight.shape[0]} classes>"
        usual = {"ignore_index": IGNORE_INDEX, "label_smoothing": 0.0, "margin": None, "check_targets": False}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if value != usual.get(name))


class _HyperParameter:
    """A field of the module's frozen loss, to be read; assigned, it makes another loss (``RowLoss.__setattr__``)."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: RowLoss | None, owner: type) -> Any:
        return self if module is None else getattr(module.loss, self.name)


class CrossEntropyLoss(RowLoss):
    """Softmax cross-entropy, over all classes or over the target and its k most confusing negatives.

    The loss of a row is -log p_y = softplus(-d), with d = z_y - log sum over S of exp(z_j), S the negatives: all
    classes but the target, or the k hardest. Without ``k`` and ``ratio`` it is ``torch.nn.functional.cross_entropy``,
    with the loss in float32 for 16-bit logits.

    Called as ``criterion(logits, target)``, it is :func:`fused_losses.cross_entropy`: logits (N, C) or (C,), float16,
    bfloat16, float32 or float64; target class indices (N,), or () for one row, of any integer dtype; or
    :class:`fused_losses.Labels` with weights: soft labels, mixup. It gives a Tensor (), or (N,) with
    ``reduction="none"``, of float32 (float64 for float64 logits), and the logits' gradient in their dtype.

    Every argument is an attribute and may be assigned anew; it is checked then, as it is here. ``weight`` is a buffer.

    Args:
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

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> criterion = fl.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 1000), torch.tensor([1, 999]))  # log C
        tensor(6.9078)
    """

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__(CrossEntropy(), **options)


class NLLRLoss(RowLoss):
    """Negative log likelihood ratio, -log(p_y / (1 - p_y)).

    Zhu, Yao, Jiang, Yu, arXiv 1804.10690. The loss of a row is -d, with d = z_y - log sum over S of exp(z_j), S the
    negatives: all classes but the target, or the k hardest. Unbounded below: the pull on the target's logit is 1
    however sure the model is.

    Called as ``criterion(logits, target)``, it is :func:`fused_losses.nllr_loss`: logits (N, C) or (C,), float16,
    bfloat16, float32 or float64; target class indices (N,), or () for one row, of any integer dtype; or
    :class:`fused_losses.Labels` with weights: soft labels, mixup. It gives a Tensor (), or (N,) with
    ``reduction="none"``, of float32 (float64 for float64 logits), and the logits' gradient in their dtype.

    Every argument is an attribute and may be assigned anew; it is checked then, as it is here. ``weight`` is a buffer.

    Args:
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

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> criterion = fl.NLLRLoss(k=10, reduction="none")
        >>> criterion(torch.zeros(2, 1000), torch.tensor([1, 999]))  # log k
        tensor([2.3026, 2.3026])
    """

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__(NLLR(), **options)


class CRLLoss(RowLoss):
    """Competing ratio loss, -log p_y + beta * log(alpha + 1 - p_y).

    Zhang et al., arXiv 1907.13349 and 1912.11642. p_y = sigmoid(d), with d = z_y - log sum over S of exp(z_j), S the
    negatives: all classes but the target, or the k hardest. Its least value is beta * log(alpha), at p_y = 1.

    Called as ``criterion(logits, target)``, it is :func:`fused_losses.crl_loss`: logits (N, C) or (C,), float16,
    bfloat16, float32 or float64; target class indices (N,), or () for one row, of any integer dtype; or
    :class:`fused_losses.Labels` with weights: soft labels, mixup. It gives a Tensor (), or (N,) with
    ``reduction="none"``, of float32 (float64 for float64 logits), and the logits' gradient in their dtype.

    Every argument is an attribute and may be assigned anew; it is checked then, as it is here. ``weight`` is a buffer.

    Args:
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

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other.
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> criterion = fl.CRLLoss(alpha=1.5, beta=0.5)
        >>> criterion.beta = 0.0  # assigned anew in training; now it is cross-entropy
        >>> criterion(torch.zeros(2, 1000), torch.tensor([1, 999]))
        tensor(6.9078)
    """

    alpha = _HyperParameter()
    beta = _HyperParameter()

    def __init__(self, *, alpha: float = CRL.alpha, beta: float = CRL.beta, **options: Unpack[LossOptions]):
        super().__init__(CRL(alpha, beta), **options)


class LRLoss(RowLoss):
    """Vanilla logistic regression, one-vs-rest: softplus(-z_y) + sum over S of softplus(z_j).

    The baseline of Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400. S are the
    negatives: all classes but the positives, or the k hardest. Over all of them it is the sum over classes of
    ``binary_cross_entropy_with_logits``: it starts at C * log 2, so it wants a smaller learning rate than
    cross-entropy.

    Called as ``criterion(logits, target)``, it is :func:`fused_losses.lr_loss`: logits (N, C) or (C,), float16,
    bfloat16, float32 or float64; target class indices (N,), or () for one row, of any integer dtype; multi-hot (N, C),
    told apart by its rank: 0 and 1 of any dtype, any number of positives per row, with ``shard`` this rank's columns;
    or :class:`fused_losses.Labels`. It gives a Tensor (), or (N,) with ``reduction="none"``, of float32 (float64 for
    float64 logits), and the logits' gradient in their dtype.

    Every argument is an attribute and may be assigned anew; it is checked then, as it is here. ``weight`` is a buffer.

    Args:
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

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
            entry other than 0 and 1 (looked at as class indices are).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> criterion = fl.LRLoss()
        >>> criterion(torch.zeros(1, 10), fl.Labels.from_lists([[1, 9]]))  # two positives; C log 2
        tensor(6.9315)
    """

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__(LR(), **options)


class HSLRLoss(RowLoss, smooths=False):
    """Logistic regression with hard selection: softplus(-z_y) + alpha * mean of softplus(z_j) over the k hardest.

    Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400, Eq. 5. The gradient touches k
    + 1 classes. With multi-hot targets the two terms are means over all positives and all chosen negatives of the
    batch, as in the authors' code; "none" then gives rows whose mean is that.

    Called as ``criterion(logits, target)``, it is :func:`fused_losses.hs_lr_loss`: logits (N, C) or (C,), float16,
    bfloat16, float32 or float64; target class indices (N,), or () for one row, of any integer dtype; multi-hot (N, C),
    told apart by its rank: 0 and 1 of any dtype, any number of positives per row, with ``shard`` this rank's columns;
    or :class:`fused_losses.Labels`. It gives a Tensor (), or (N,) with ``reduction="none"``, of float32 (float64 for
    float64 logits), and the logits' gradient in their dtype.

    Every argument is an attribute and may be assigned anew; it is checked then, as it is here. ``weight`` is a buffer.

    Args:
        alpha: weight of the negatives, finite, >= 0. Default: 1 (ours: the authors' code has none).
        k: keep only the k negatives with the largest logits (all, if there are fewer), an integer >= 1; equal logits at
            the edge: lowest class index first. Either ``k`` or ``ratio`` is required.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
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

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
            entry other than 0 and 1 (looked at as class indices are).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> criterion = fl.HSLRLoss(ratio=0.01)  # the 10 hardest of 1000 classes
        >>> criterion(torch.zeros(2, 1000), torch.tensor([1, 999]))  # (1 + alpha) log 2
        tensor(1.3863)
    """

    alpha = _HyperParameter()

    def __init__(self, *, alpha: float = HSLR.alpha, **options: Unpack[LossOptions]):
        super().__init__(HSLR(alpha), **options)


class SSLRLoss(RowLoss, smooths=False):
    """Logistic regression with soft selection: softplus(-z_y) + alpha * mean of sigma(z_j)^gamma * softplus(z_j).

    Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400, Eq. 6. The mean is over the
    negatives S: all classes but the positives, or the k hardest. The gradient flows through the weight sigma^gamma too.
    With multi-hot targets the two terms are means over all positives and all negatives of the batch, as in the authors'
    code; "none" then gives rows whose mean is that.

    Called as ``criterion(logits, target)``, it is :func:`fused_losses.ss_lr_loss`: logits (N, C) or (C,), float16,
    bfloat16, float32 or float64; target class indices (N,), or () for one row, of any integer dtype; multi-hot (N, C),
    told apart by its rank: 0 and 1 of any dtype, any number of positives per row, with ``shard`` this rank's columns;
    or :class:`fused_losses.Labels`. It gives a Tensor (), or (N,) with ``reduction="none"``, of float32 (float64 for
    float64 logits), and the logits' gradient in their dtype.

    Every argument is an attribute and may be assigned anew; it is checked then, as it is here. ``weight`` is a buffer.

    Args:
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

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; a multi-hot
            entry other than 0 and 1 (looked at as class indices are).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> criterion = fl.SSLRLoss(alpha=4.0, gamma=2.0)
        >>> criterion(torch.zeros(2, 1000), torch.tensor([1, 999]))  # (1 + alpha / 2^gamma) log 2
        tensor(1.3863)
    """

    alpha = _HyperParameter()
    gamma = _HyperParameter()

    def __init__(self, *, alpha: float = SSLR.alpha, gamma: float = SSLR.gamma, **options: Unpack[LossOptions]):
        super().__init__(SSLR(alpha, gamma), **options)


class SoftmaxLoss(RowLoss):
    """A loss of your own: value(d), d the log-odds of the target among the target and the negatives S.

    d = z_y - log sum over S of exp(z_j), S all classes but the target, or the k hardest. The logits are read and their
    gradient is written by the same kernels as for the losses here; ``value`` and its slope cost N numbers. With p =
    sigmoid(d): ``-F.logsigmoid(d)`` is cross-entropy, ``-(1 - p)**2 * F.logsigmoid(d)`` the focal loss, ``(1 - p**0.7)
    / 0.7`` generalised cross-entropy.

    Called as ``criterion(logits, target)``, it is :func:`fused_losses.softmax_loss`: logits (N, C) or (C,), float16,
    bfloat16, float32 or float64; target class indices (N,), or () for one row, of any integer dtype; or
    :class:`fused_losses.Labels` with weights: soft labels, mixup. It gives a Tensor (), or (N,) with
    ``reduction="none"``, of float32 (float64 for float64 logits), and the logits' gradient in their dtype.

    Every argument is an attribute and may be assigned anew; it is checked then, as it is here. ``weight`` is a buffer.

    Args:
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

    Raises:
        TypeError: logits, target or an option of a wrong type or dtype; a ``value`` that is no function.
        ValueError: shapes that do not fit; an option out of its range, or two that exclude each other; what ``value``
            returns is not (N,).
        IndexError: a class index outside [0, C); see ``check_targets``.
        RuntimeError: tensors on different devices; a call inside of ``torch.func``; a second derivative.

    Example:
        >>> focal = fl.SoftmaxLoss(lambda d: -torch.sigmoid(-d)**2 * F.logsigmoid(d), k=9)
        >>> focal(torch.zeros(2, 1000), torch.tensor([1, 999]))  # p = 1 / 10: 0.81 log 10
        tensor(1.8651)
    """

    value = _HyperParameter()

    def __init__(self, value: Callable[[Tensor], Tensor], **options: Unpack[LossOptions]):
        super().__init__(OwnSoftmax(value), **options)
