"""The losses as functions. Shapes, dtypes and arguments are checked here, once; values of targets inside the CPU doors.

All six take

- ``logits`` (N, C), or (C,) with the target of one row; float16, bfloat16, float32 or float64; any strides; never
  modified.
- ``target``: class indices (N,) of any integer dtype. The logistic family (LR, HS-LR, SS-LR) also takes multi-hot
  targets (N, C) of any dtype that holds only 0 and 1, told apart by their rank.

and return float32 (float64 for float64 logits): a scalar, or (N,) for ``reduction="none"``. They are differentiable
once, by the logits; the gradient has the logits' dtype. A row with a NaN logit is NaN, in the loss and in its whole
gradient row.
"""

import math
import operator
from numbers import Real

import torch
from torch import Tensor

from . import reference
from .autograd import LossFromLogits
from .class_parallel import ClassShard, LossFromShard, width_of_shard
from .losses import CRL, HSLR, LR, NLLR, SSLR, CrossEntropy, Loss

IGNORE_INDEX = -100
REDUCTIONS = ("none", "mean", "sum")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Softmax cross-entropy, over all classes or over the target and its k most confusing negatives.

    Without ``k`` and ``ratio`` it is ``torch.nn.functional.cross_entropy``, with the loss in float32 for 16-bit logits.

    Args:
        logits: (N, C) or (C,), floating.
        target: class indices (N,) or (), any integer dtype.
        k: keep only the k negatives with the largest logits (all, if there are fewer); equal logits at the edge: lowest
            class index first. Default: all negatives.
        ratio: the same as a share of all classes, in (0, 1]: k = max(1, floor(ratio * C)). Not together with ``k``.
        weight: (C,), floating: row i counts weight[target[i]] times, and the mean divides by the sum of these.
        ignore_index: rows with this target count nothing and get a zero gradient.
        reduction: "none" | "mean" (over the rows not ignored; NaN if there are none) | "sum".
        check_targets: raise IndexError for a class out of range on every device. On the CPU that is always checked;
            elsewhere it costs a device synchronisation, and without it the loss and the gradient of such a row are NaN.
        shard: the classes are sharded over the ranks of ``torch.distributed``: :class:`fused_losses.ClassShard`. Then
            logits are this rank's columns, C is their number over all ranks, target, weight and all options are the
            same on every rank, and so is the loss. A collective: every rank of the group calls it, in the same order.

    Raises:
        TypeError: logits or target of a wrong dtype, an argument that is not a number.
        ValueError: shapes that do not fit, k, ratio, reduction or weight out of their range.
        IndexError: a class index outside [0, C), see ``check_targets``.
        RuntimeError: tensors on different devices.
    """
    return apply(CrossEntropy(), logits, target, k, ratio, weight, ignore_index, reduction, check_targets, shard)


def nllr_loss(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Negative log likelihood ratio, -log(p_y / (1 - p_y)). Zhu, Yao, Jiang, Yu, arXiv 1804.10690.

    Unbounded below: the pull on the target's logit is 1 however sure the model is. Arguments, defaults and errors as in
    :func:`cross_entropy`.
    """
    return apply(NLLR(), logits, target, k, ratio, weight, ignore_index, reduction, check_targets, shard)


def crl_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = CRL.alpha,
    beta: float = CRL.beta,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Competing ratio loss, -log p_y + beta * log(alpha + 1 - p_y). Zhang et al., arXiv 1907.13349, 1912.11642.

    Its least value is beta * log(alpha), at p_y = 1.

    Args:
        alpha: finite, >= 0; default 1.5, the authors'. Below 1 the loss can be negative; alpha = 0, beta = 1 is NLLR.
        beta: finite, >= 0; default 1, the authors'. beta = 0 is cross-entropy.

    Other arguments, defaults and errors as in :func:`cross_entropy`; ValueError for alpha or beta out of range.
    """
    return apply(CRL(alpha, beta), logits, target, k, ratio, weight, ignore_index, reduction, check_targets, shard)


def lr_loss(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Vanilla logistic regression, one-vs-rest: softplus(-z_y) + sum over the negatives of softplus(z_j).

    The sum over classes of ``binary_cross_entropy_with_logits``: it starts at C * log 2, so it wants a smaller learning
    rate than cross-entropy. The baseline of Dong, Zhu, Gong, AAAI 2019, arXiv 1811.08400.

    Args:
        target: class indices (N,), or multi-hot (N, C): 0 and 1 of any dtype, any number of positives per row. With
            ``shard``, multi-hot targets are this rank's columns too.
        weight, ignore_index: index targets only.

    Other arguments, defaults and errors as in :func:`cross_entropy`; ValueError for a multi-hot entry other than
    0 and 1 (checked as class indices are).
    """
    return apply(LR(), logits, target, k, ratio, weight, ignore_index, reduction, check_targets, shard)


def hs_lr_loss(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    alpha: float = HSLR.alpha,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Logistic regression with hard selection: softplus(-z_y) + alpha * mean of softplus(z_j) over the k hardest.

    Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400, Eq. 5. The gradient touches
    k + 1 classes. With multi-hot targets the two terms are means over all positives and all chosen negatives of the
    batch, as in the authors' code; "none" then gives rows whose mean is that.

    Args:
        k, ratio: one of them is required.
        alpha: weight of the negatives, finite, >= 0; default 1 (ours: the authors' code has none).

    Targets as in :func:`lr_loss`; other arguments, defaults and errors as in :func:`cross_entropy`.
    """
    return apply(HSLR(alpha), logits, target, k, ratio, weight, ignore_index, reduction, check_targets, shard)


def ss_lr_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = SSLR.alpha,
    gamma: float = SSLR.gamma,
    k: int | None = None,
    ratio: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """Logistic regression with soft selection: softplus(-z_y) + alpha * mean of sigma(z_j)^gamma * softplus(z_j).

    Dong, Zhu, Gong, Focus Rectification Logistic Regression, AAAI 2019, arXiv 1811.08400, Eq. 6. The gradient flows
    through the weight sigma^gamma too. Multi-hot targets are normalised as in :func:`hs_lr_loss`.

    Args:
        alpha: weight of the negatives, finite, >= 0; default 1 (ours: the authors' code has none).
        gamma: how sharply easy negatives fade, finite, >= 0; default 2 (ours); 0 weighs all alike.

    Targets as in :func:`lr_loss`; other arguments, defaults and errors as in :func:`cross_entropy`.
    """
    return apply(SSLR(alpha, gamma), logits, target, k, ratio, weight, ignore_index, reduction, check_targets, shard)


def apply(
    loss: Loss,
    logits: Tensor,
    target: Tensor,
    k: int | None,
    ratio: float | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    check_targets: bool,
    shard: ClassShard | None,
) -> Tensor:
    """The one way from a user's arguments to the autograd functions."""
    check_options(loss, k, ratio, reduction)
    num_classes = _check_logits(logits, shard)
    check_batch(loss, logits.shape, num_classes, logits.device, target, weight, ignore_index)
    rows, target, k = as_rows(logits, target, num_classes, k, ratio)
    alpha = loss.alpha if loss.family == "logistic" else None
    if weight is not None:
        weight = weight.to(reference.compute_dtype(logits.dtype))
    arguments = rows, target, weight, loss.family, loss.formula, loss.params, alpha, k, ignore_index, reduction
    if check_here(check_targets, logits.device, shard):
        reference.check_target(target, num_classes, ignore_index)
    if shard is None:
        result, _ = LossFromLogits.apply(*arguments)
    else:
        result, _ = LossFromShard.apply(*arguments, shard)
    return result.squeeze(0) if logits.dim() == 1 and reduction == "none" else result


def check_here(check_targets: bool, device: torch.device, shard: ClassShard | None) -> bool:
    """Whether to look at the values of targets: the CPU doors always do, but those of a shard know its classes only."""
    return shard is not None if device.type == "cpu" else check_targets


def as_rows(
    x: Tensor, target: Tensor, num_classes: int, k: int | None, ratio: float | None
) -> tuple[Tensor, Tensor, int]:
    """What the doors take: x and target with a row dimension, int64 class indices, k = 0 for all negatives."""
    multi_hot = target.dim() == x.dim()
    if not multi_hot:
        target = target.long()
    if x.dim() == 1:
        x, target = x.unsqueeze(0), target.unsqueeze(0)
    if ratio is not None:
        k = max(1, math.floor(ratio * num_classes * (1 + 1e-12)))  # 0.29 * 100 is 28.999...: meant is 29
    most_negatives = num_classes if multi_hot else num_classes - 1
    return x, target, 0 if k is None or k >= most_negatives else operator.index(k)


def check_options(loss: Loss, k: int | None, ratio: float | None, reduction: str) -> None:
    """What can be said of the options before there are logits."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction: expected one of {', '.join(REDUCTIONS)}")
    if k is not None and ratio is not None:
        raise ValueError(f"k and ratio exclude each other, got k={k} and ratio={ratio}")
    if k is None and ratio is None and isinstance(loss, HSLR):
        raise ValueError("hs_lr_loss needs k or ratio: how many of the most confusing negatives to keep")
    if k is not None and not hasattr(k, "__index__"):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if k is not None and operator.index(k) < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ratio is not None and not isinstance(ratio, Real):
        raise TypeError(f"ratio must be a number, got {type(ratio).__name__}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")


def _check_logits(logits: Tensor, shard: ClassShard | None) -> int:
    """The number of classes."""
    if type(logits) is not Tensor:
        check_kind("logits", logits)
    if logits.dtype not in FLOATING:
        raise TypeError(f"expected floating-point logits (float16, bfloat16, float32 or float64), got {logits.dtype}")
    if logits.dim() not in (1, 2):
        hint = ""
        if logits.dim() > 2:
            hint = ": move the classes last and flatten the rest, logits.movedim(1, -1).flatten(0, -2)"
        raise ValueError(f"expected logits of shape (N, C) or (C,), got {tuple(logits.shape)}{hint}")
    if shard is not None:
        return width_of_shard(shard, "logits", logits.shape, logits.shape[-1])
    if logits.shape[-1] == 0:
        raise ValueError(f"expected at least one class, got logits of shape {tuple(logits.shape)}")
    return logits.shape[-1]


def check_batch(
    loss: Loss,
    shape: torch.Size,
    num_classes: int,
    device: torch.device,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> None:
    """Whether target and weight fit logits of this shape on this device; num_classes is that of all shards."""
    _check_target(loss, shape, device, target)
    multi_hot = target.dim() == len(shape)
    if weight is not None:
        _check_weight(weight, num_classes, device, multi_hot)
    if multi_hot and ignore_index != IGNORE_INDEX:
        raise ValueError("ignore_index works with class-index targets only, got multi-hot targets")


def check_kind(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name} must be a plain Tensor, got a DTensor: if it is sharded by classes, give {name}.to_local() and "
            f"shard=ClassShard.split(num_classes, group); else {name}.full_tensor()"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense Tensor, got one of layout {tensor.layout}: give {name}.to_dense()")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got {name} on {tensor.device} and others on {device}"
        )


def _check_target(loss: Loss, shape: torch.Size, device: torch.device, target: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    check_device("target", target, device)
    if target.dim() == len(shape):
        return _check_same_rank(loss, shape, target)
    if target.dim() != len(shape) - 1:
        raise ValueError(f"expected class indices of shape {tuple(shape[:-1])}: {_shapes(shape, target)}")
    if target.shape != shape[:-1]:
        raise ValueError(f"Expected input batch_size ({shape[0]}) to match target batch_size ({target.shape[0]}).")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        raise TypeError(f"expected class indices of an integer dtype, got {target.dtype}; {_shapes(shape, target)}")


def _check_same_rank(loss: Loss, shape: torch.Size, target: Tensor) -> None:
    """A target of the logits' rank: multi-hot, where the loss takes that."""
    same = target.shape == shape
    hint = ""
    if not same and target.shape == (*shape[:-1], 1):
        hint = "; for class indices, squeeze the target: target.squeeze(-1)"
    if loss.family == "softmax" and same and target.dtype.is_floating_point:
        raise TypeError(
            f"{loss.name}: soft targets (class probabilities) are not supported, give class indices; "
            f"{_shapes(shape, target)}"
        )
    if loss.family == "softmax":
        raise ValueError(f"0D or 1D target tensor expected, multi-target not supported: {_shapes(shape, target)}{hint}")
    if not same:
        raise ValueError(f"multi-hot target size must be the same as logits size: {_shapes(shape, target)}{hint}")
    if target.dtype.is_complex:
        raise TypeError(f"expected multi-hot targets of 0 and 1, got {target.dtype}")


def _shapes(shape: torch.Size, target: Tensor) -> str:
    return f"got target {tuple(target.shape)} for logits {tuple(shape)}"


def _check_weight(weight: Tensor, num_classes: int, device: torch.device, multi_hot: bool) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    if multi_hot:
        raise ValueError("weight works with class-index targets only, got multi-hot targets")
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight tensor should be defined either for all {num_classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    if weight.dtype not in FLOATING:
        raise TypeError(f"expected a floating-point weight, got {weight.dtype}")
    check_device("weight", weight, device)
    if weight.requires_grad:
        raise ValueError("the losses are not differentiable by weight: pass weight.detach()")
