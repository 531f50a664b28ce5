"""What a user gives, checked once, and what of it the doors take. Values of targets are checked inside the CPU doors.

An error is raised before anything is touched, and names the way out.
"""

import math
import operator
from numbers import Real
from typing import Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from . import ops, reference
from .losses import HSLR, Loss, LossSpec
from .shard import ClassShard, check_shard, width_of_shard

IGNORE_INDEX = -100
Reduce = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduce)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT64 = torch.iinfo(torch.int64)


class Options(NamedTuple):
    """The options of every loss, as :func:`fused_losses.cross_entropy` explains them."""

    k: int | None = None
    ratio: float | None = None
    weight: Tensor | None = None
    ignore_index: int | None = IGNORE_INDEX
    reduction: Reduce = "mean"
    check_targets: bool = False
    shard: ClassShard | None = None


class LossOptions(TypedDict, total=False):
    """The same, for annotations of ``**options``."""

    k: int | None
    ratio: float | None
    weight: Tensor | None
    ignore_index: int | None
    reduction: Reduce
    check_targets: bool
    shard: ClassShard | None


class Rows(NamedTuple):
    """What the doors take besides the logits."""

    target: Tensor  # int64 (rows,), or multi-hot (rows, classes)
    weight: Tensor | None  # (classes of all shards,), in the compute dtype
    reduction: str
    spec: LossSpec


def check_options(loss: Loss, options: Options) -> None:
    """What can be said of the options before there are logits."""
    k, ratio, weight, ignore_index, reduction, check_targets, shard = options
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction: expected one of {', '.join(REDUCTIONS)}")
    if k is not None and ratio is not None:
        raise ValueError(f"k and ratio exclude each other, got k={k} and ratio={ratio}")
    if k is None and ratio is None and isinstance(loss, HSLR):
        raise ValueError("hs_lr_loss needs k or ratio: how many of the most confusing negatives to keep")
    if k is not None and as_integer("k", k) < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ratio is not None and (not isinstance(ratio, Real) or isinstance(ratio, bool)):
        raise TypeError(f"ratio must be a number, got {type(ratio).__name__}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    if ignore_index is not None and not INT64.min <= as_integer("ignore_index", ignore_index) <= INT64.max:
        raise ValueError(f"ignore_index must be an int64, got {ignore_index}")
    if check_targets is not False and check_targets is not True:
        raise TypeError(f"check_targets must be a bool, got {type(check_targets).__name__}")
    if weight is not None:
        _check_kind_of_weight(weight)
    if shard is not None:
        check_shard(shard)


def as_integer(name: str, value: int) -> int:
    """value, an int or what converts to one without loss (a NumPy integer); neither a bool nor a float."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return operator.index(value)


def check_logits(logits: Tensor, shard: ClassShard | None) -> int:
    """The number of classes, of all shards."""
    if type(logits) is not Tensor or logits.layout is not torch.strided:
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


# --- what the doors take ----------------------------------------------------------------------------------------------


def rows_of(
    loss: Loss, logits_shape: torch.Size, dtype: torch.dtype, device: torch.device, target: Tensor, options: Options,
    num_classes: int,
) -> Rows:  # fmt: skip
    """For logits of this shape, (N, C) or (C,), C those at hand, num_classes of all shards; options: checked."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the losses of fused_losses are differentiated by torch.autograd only, not by torch.func (grad, vjp, vmap, "
            'jacrev, jvp): for the gradients of single rows take reduction="none" and torch.autograd.grad(..., '
            "is_grads_batched=True)"
        )
    check_target(loss, logits_shape, device, target)
    multi_hot = target.dim() == len(logits_shape)
    weight, ignore_index = options.weight, options.ignore_index
    if multi_hot and ignore_index not in (None, IGNORE_INDEX):
        raise ValueError("ignore_index works with class-index targets only, got multi-hot targets")
    if weight is not None:
        _check_weight(weight, num_classes, device, multi_hot)
        weight = weight.to(reference.compute_dtype(dtype))
    ignore_index = None if multi_hot or ignore_index is None else as_integer("ignore_index", ignore_index)
    if not multi_hot:
        target = as_int64(target, ignore_index)
    if len(logits_shape) == 1:
        target = target.unsqueeze(0)
    k = _negatives_of(options, num_classes, multi_hot)
    # the CPU doors always look, but a shard without classes enters none
    if options.shard is not None if device.type == "cpu" else options.check_targets:
        reference.check_target(target, num_classes, ignore_index)
    compact = ops.keeps_picks(device, logits_shape[-1], k, multi_hot)
    spec = LossSpec(loss.formula, loss.params, loss.weight_of_mean, k, ignore_index, 0, num_classes, compact)
    return Rows(target, weight, options.reduction, spec)


def _negatives_of(options: Options, num_classes: int, multi_hot: bool) -> int:
    """k as at the doors: 0 for all negatives."""
    k, ratio = options.k, options.ratio
    if ratio is not None:
        if torch.compiler.is_compiling():  # a graph cannot carry a k made of a ratio that changes: one graph for each
            numerator, denominator = float(ratio).as_integer_ratio()
            ratio = numerator / denominator
        largest = max if isinstance(num_classes, int) else torch.sym_max
        k = largest(1, math.floor(ratio * num_classes * (1 + 1e-12)))  # 0.29 * 100 is 28.999...: meant is 29
    most = num_classes if multi_hot else num_classes - 1
    return 0 if k is None or ops.always(k >= most) else as_integer("k", k)


def as_int64(target: Tensor, ignore_index: int | None) -> Tensor:
    if target.dtype != torch.uint64:
        return target.long()
    target = target.long()  # what int64 cannot hold comes out negative, and is to stay no class, and not ignored
    return target.masked_fill(target < 0, INT64.max if ignore_index != INT64.max else INT64.max - 1)


def check_target(loss: Loss, shape: torch.Size, device: torch.device, target: Tensor) -> None:
    if type(target) is not Tensor or target.layout is not torch.strided:
        check_kind("target", target)
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
    if target.requires_grad:
        raise ValueError("the losses are not differentiable by a multi-hot target: pass target.detach()")


def _shapes(shape: torch.Size, target: Tensor) -> str:
    return f"got target {tuple(target.shape)} for logits {tuple(shape)}"


def _check_kind_of_weight(weight: Tensor) -> None:
    """What can be said of class weights before there are logits."""
    if type(weight) is not Tensor or weight.layout is not torch.strided:
        check_kind("weight", weight)
    if weight.dtype not in FLOATING:
        raise TypeError(f"expected a floating-point weight, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError("the losses are not differentiable by weight: pass weight.detach()")


def _check_weight(weight: Tensor, num_classes: int, device: torch.device, multi_hot: bool) -> None:
    _check_kind_of_weight(weight)
    if multi_hot:
        raise ValueError("weight works with class-index targets only, got multi-hot targets")
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight tensor should be defined either for all {num_classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    check_device("weight", weight, device)
