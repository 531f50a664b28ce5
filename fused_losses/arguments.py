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
from .labels import Labels
from .losses import HSLR, Loss, LossSpec
from .margin import Margin, MarginTerms
from .shard import ClassShard, check_shard, is_dtensor, width_of_shard

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
    label_smoothing: float = 0.0
    margin: Margin | None = None
    check_targets: bool = False
    shard: ClassShard | None = None


class LossOptions(TypedDict, total=False):
    """The same, for annotations of ``**options``."""

    k: int | None
    ratio: float | None
    weight: Tensor | None
    ignore_index: int | None
    reduction: Reduce
    label_smoothing: float
    margin: Margin | None
    check_targets: bool
    shard: ClassShard | None


class Rows(NamedTuple):
    """What the doors take besides the logits."""

    target: Tensor  # int64 (rows,), multi-hot (rows, classes), or labels (rows, P)
    weight: Tensor | None  # (classes of all shards,), or of labels (rows, P); in the compute dtype
    reduction: str
    spec: LossSpec


def check_options(loss: Loss, options: Options) -> None:
    """What can be said of the options before there are logits."""
    k, ratio, weight, ignore_index, reduction, label_smoothing, margin, check_targets, shard = options
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
    if label_smoothing != 0:
        _check_smoothing(loss, label_smoothing, weight)
    if margin is not None and not isinstance(margin, Margin):
        raise TypeError(
            f"margin must be a Margin, got {type(margin).__name__}: Margin(angle=0.5) is ArcFace's, "
            "Margin(cosine=0.35) CosFace's"
        )
    if shard is not None:
        check_shard(shard)


def _check_smoothing(loss: Loss, label_smoothing: float, weight: Tensor | None) -> None:
    if not isinstance(label_smoothing, Real) or isinstance(label_smoothing, bool):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not loss.smooths:
        raise ValueError(
            f"{loss.name} takes no label_smoothing: it would give every class a share of the target, and the easy "
            "negatives, which this loss fades out, their pull back; lr_loss and the softmax losses take it"
        )
    if weight is not None:
        raise ValueError(
            "weight and label_smoothing exclude each other: the weight of a row is that of its target's class, and "
            "smoothing makes every class a target"
        )


def as_integer(name: str, value: int) -> int:
    """value, an int or what converts to one without loss (a NumPy integer); neither a bool nor a float."""
    if type(value) is int or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return operator.index(value)


def check_logits(logits: Tensor, shard: ClassShard | None) -> int:
    """The number of classes, of all shards."""
    if type(logits) is not Tensor or logits.layout is not torch.strided:
        check_kind("logits", logits)
    if logits.dtype not in FLOATING:
        raise TypeError(
            f"expected floating-point logits (float16, bfloat16, float32 or float64), got {logits.dtype}; the logits "
            "come first, then the target"
        )
    shape = logits.shape
    if len(shape) not in (1, 2):
        hint = ""
        if len(shape) > 2:
            hint = ": move the classes last and flatten the rest, logits.movedim(1, -1).flatten(0, -2)"
        raise ValueError(f"expected logits of shape (N, C) or (C,), got {tuple(shape)}{hint}")
    if shard is not None:
        return width_of_shard(shard, "logits", shape, shape[-1])
    if shape[-1] == 0:
        raise ValueError(f"expected at least one class, got logits of shape {tuple(shape)}")
    return shape[-1]


def check_kind(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if is_dtensor(tensor):
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
    loss: Loss, logits_shape: torch.Size, dtype: torch.dtype, device: torch.device, given: Tensor | Labels,
    options: Options, num_classes: int,
) -> Rows:  # fmt: skip
    """For logits of this shape, (N, C) or (C,), C those at hand, num_classes of all shards; options: checked."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the losses of fused_losses are differentiated by torch.autograd only, not by torch.func (grad, vjp, vmap, "
            'jacrev, jvp): for the gradients of single rows take reduction="none" and torch.autograd.grad(..., '
            "is_grads_batched=True)"
        )
    if isinstance(given, Labels):
        labels, target = given, given.index
        check_labels(loss, logits_shape, device, labels, options)
    else:
        labels, target = None, given
        check_target(loss, logits_shape, device, target)
    multi_hot = labels is None and target.dim() == len(logits_shape)
    weight, ignore_index = options.weight, options.ignore_index
    if multi_hot:
        _check_with_multi_hot(options)
    if weight is not None:
        _check_weight(weight, num_classes, device)
        weight = weight.to(reference.compute_dtype(dtype))
    ignore_index = None if multi_hot or ignore_index is None else as_integer("ignore_index", ignore_index)
    if not multi_hot:
        target = as_int64(target, ignore_index)
    if len(logits_shape) == 1:
        target = target.unsqueeze(0)
    if options.margin is not None:
        check_margin(options.margin, target.shape[0], device)
    k = _negatives_of(options, num_classes, multi_hot or (labels is not None and loss.family == "logistic"))
    compact = ops.keeps_picks(device, dtype, logits_shape[-1], k, multi_hot)
    # False, 0.0, (): the compiler would take the fields' defaults for numbers that change
    spec = LossSpec(
        loss.formula, loss.params, loss.weight_of_mean, k, ignore_index, 0, num_classes, compact, False, 0.0, ()
    )
    checked = False
    if options.shard is not None or options.check_targets:
        # the CPU doors always look, but a shard without classes enters none
        checked = options.shard is not None if device.type == "cpu" else options.check_targets
    if labels is not None:
        ignored = -1 if loss.family == "softmax" else None
        spec = spec._replace(ignore_index=ignored, labels=True, label_smoothing=float(options.label_smoothing))
        if labels.weight is not None:
            weight = labels.weight.view(target.shape).to(reference.compute_dtype(dtype))
        if target.shape[1] > 1:
            target, shares = ops.in_order(target, weight)
            weight = None if weight is None else shares
        if checked:
            reference.check_target(target, spec)
        return Rows(target, weight, options.reduction, spec)
    if checked:
        reference.check_target(target, spec)
    if options.label_smoothing:
        seen = device.type == "cpu" and not torch.compiler.is_compiling()
        target, spec = _as_labels(target, spec, seen)
        spec = spec._replace(label_smoothing=float(options.label_smoothing))
    return Rows(target, weight, options.reduction, spec)


def _as_labels(target: Tensor, spec: LossSpec, seen: bool) -> tuple[Tensor, LossSpec]:
    """Class indices (rows,) as labels (rows, 1): -1 where they are ignored; what is no class stays none. seen: their
    values may be looked at, and usually are classes."""
    ignored = None if spec.ignore_index is None else -1
    labels = spec._replace(labels=True, ignore_index=ignored)
    if seen and target.numel() > 0 and (spec.ignore_index is None or spec.ignore_index < 0) and target.min() >= 0:
        return target[:, None], labels
    if seen:
        reference.check_target(target, spec)  # before what is no class becomes another one
    label = target.masked_fill(target < 0, spec.all_classes)
    if spec.ignore_index is not None:
        label = label.masked_fill(target == spec.ignore_index, -1)
    return label[:, None], labels


def _negatives_of(options: Options, num_classes: int, without_positives: bool) -> int:
    """k as at the doors: 0 for all negatives. without_positives: there may be rows without any."""
    k, ratio = options.k, options.ratio
    if ratio is not None:
        if torch.compiler.is_compiling():  # a graph cannot carry a k made of a ratio that changes: one graph for each
            numerator, denominator = float(ratio).as_integer_ratio()
            ratio = numerator / denominator
        largest = max if isinstance(num_classes, int) else torch.sym_max
        k = largest(1, math.floor(ratio * num_classes * (1 + 1e-12)))  # 0.29 * 100 is 28.999...: meant is 29
    most = num_classes if without_positives else num_classes - 1
    return 0 if k is None or ops.always(k >= most) else as_integer("k", k)


def as_int64(target: Tensor, ignore_index: int | None) -> Tensor:
    if target.dtype == torch.int64:
        return target
    if target.dtype != torch.uint64:
        return target.long()
    target = target.long()  # what int64 cannot hold comes out negative, and is to stay no class, and not ignored
    return target.masked_fill(target < 0, INT64.max if ignore_index != INT64.max else INT64.max - 1)


def check_target(loss: Loss, shape: torch.Size, device: torch.device, target: Tensor) -> None:
    if type(target) is not Tensor or target.layout is not torch.strided:
        check_kind("target", target)
    check_device("target", target, device)
    dimensions = target.dim()
    if dimensions == len(shape):
        return _check_same_rank(loss, shape, target)
    if dimensions != len(shape) - 1:
        raise ValueError(f"expected class indices of shape {tuple(shape[:-1])}: {_shapes(shape, target)}")
    if dimensions == 1 and target.shape[0] != shape[0]:
        raise ValueError(f"Expected input batch_size ({shape[0]}) to match target batch_size ({target.shape[0]}).")
    dtype = target.dtype
    if dtype != torch.int64 and (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool):
        raise TypeError(f"expected class indices of an integer dtype, got {dtype}; {_shapes(shape, target)}")


def _check_same_rank(loss: Loss, shape: torch.Size, target: Tensor) -> None:
    """A target of the logits' rank: multi-hot, where the loss takes that."""
    same = target.shape == shape
    hint = ""
    if not same and target.shape == (*shape[:-1], 1):
        hint = "; for class indices, squeeze the target: target.squeeze(-1)"
    if loss.family == "softmax" and same and target.dtype.is_floating_point:
        raise ValueError(
            f"{loss.name} takes soft targets as fused_losses.Labels, not as a matrix of all classes: "
            "Labels.mixup(y, y.flip(0), lam), or, for what timm's Mixup(label_smoothing=0) gives, "
            f"Labels.from_dense(target, 2), with label_smoothing= here; {_shapes(shape, target)}"
        )
    if not same and not hint and not (target.dtype.is_floating_point or target.dtype.is_complex):
        hint = "; several classes per row, -1 in empty places, are fused_losses.Labels(target)"
    if loss.family == "softmax":
        raise ValueError(f"0D or 1D target tensor expected, multi-target not supported: {_shapes(shape, target)}{hint}")
    if not same:
        raise ValueError(f"multi-hot target size must be the same as logits size: {_shapes(shape, target)}{hint}")
    if target.dtype.is_complex:
        raise TypeError(f"expected multi-hot targets of 0 and 1, got {target.dtype}")
    if target.requires_grad:
        raise ValueError("the losses are not differentiable by a multi-hot target: pass target.detach()")


def check_labels(loss: Loss, shape: torch.Size, device: torch.device, labels: Labels, options: Options) -> None:
    index, weight = labels
    check_kind("the labels' index", index)
    check_device("the labels", index, device)
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype in (torch.bool, torch.uint64):
        raise TypeError(f"expected labels of a signed integer dtype, got {index.dtype}")
    if index.dim() != len(shape) or index.shape[:-1] != shape[:-1] or index.shape[-1] == 0:
        raise ValueError(
            f"expected labels (N, P) for logits (N, C), P at least 1, got {tuple(index.shape)} for {tuple(shape)}"
        )
    if weight is None and loss.family == "softmax":
        raise ValueError(
            f"{loss.name} needs weights: Labels(index, weight), for equal shares "
            "Labels(index, (index >= 0) / (index >= 0).sum(-1, keepdim=True))"
        )
    if weight is None and options.label_smoothing:
        raise ValueError("label_smoothing needs one label per row, or labels with weights")
    if weight is not None:
        check_kind("the labels' weight", weight)
        check_device("the labels' weight", weight, device)
        if weight.shape != index.shape or weight.dtype not in FLOATING:
            raise ValueError(
                f"expected floating weights of the labels' shape {tuple(index.shape)}, got {weight.dtype}, "
                f"{tuple(weight.shape)}"
            )
        if weight.requires_grad:
            raise ValueError("the losses are not differentiable by the labels' weights: pass weight.detach()")
    if options.weight is not None:
        raise ValueError("weight works with class-index targets only: multiply the labels' weights by it")
    if options.ignore_index not in (None, IGNORE_INDEX):
        raise ValueError("ignore_index works with class-index targets only: empty places of labels are -1")


def _check_with_multi_hot(options: Options) -> None:
    if options.ignore_index not in (None, IGNORE_INDEX):
        raise ValueError("ignore_index works with class-index targets only, got multi-hot targets")
    if options.weight is not None:
        raise ValueError("weight works with class-index targets only, got multi-hot targets")
    if options.label_smoothing:
        raise ValueError("label_smoothing needs one label per row, or Labels with weights; got multi-hot targets")
    if options.margin is not None:
        raise ValueError("margin works with class indices and fused_losses.Labels, got multi-hot targets")


def check_margin(margin: Margin | None, rows: int, device: torch.device) -> None:
    for name, value in ({} if margin is None else margin.per_row).items():
        check_device(f"the margin's {name}", value, device)
        if value.shape != (rows,):
            raise ValueError(f"expected the margin's {name} to be a number or ({rows},), got {tuple(value.shape)}")
        looked_at = name == "angle" and device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and (value.abs() > torch.tensor(math.pi, dtype=value.dtype)).any():
            raise ValueError("expected the margin's angle from -pi to pi (radians)")


def told_of(loss: Loss, options: Options, target: Tensor | Labels) -> dict[str, object]:
    """What the ranks that share the classes must agree in, before they exchange anything."""
    told: dict[str, object] = {"loss": loss.name, "hyper-parameters": str(loss.params), "alpha": loss.weight_of_mean}
    told |= {name: str(getattr(options, name)) for name in ("k", "ratio", "reduction", "ignore_index")}
    told["label_smoothing"] = float(options.label_smoothing)
    margin = options.margin
    told["margin"] = None if margin is None else f"{margin.scale}, per row: {list(margin.per_row)}"
    if margin is not None:
        told |= {name: fingerprint(getattr(margin, name)) for name in ("angle", "cosine")}
    told["class weights"] = fingerprint(options.weight)
    told["kind of target"] = type(target).__name__ if isinstance(target, Labels) else f"{target.dim()} dimensions"
    return told


def told_of_rows(rows: Tensor, target: Tensor | Labels) -> dict[str, object]:
    """The same of the rows, logits or input, where all ranks have the same ones."""
    told: dict[str, object] = {"number of rows": str(tuple(rows.shape[:-1]))}
    told["gradient wanted"] = torch.is_grad_enabled() and rows.requires_grad
    if isinstance(target, Labels):
        told |= {"target": fingerprint(target.index), "weights of the labels": fingerprint(target.weight)}
    elif target.dim() < rows.dim():  # a multi-hot target is each rank's own
        told["target"] = fingerprint(target)
    return told


def fingerprint(value: Tensor | float | None) -> float | None:
    """One number of it, in which its order counts."""
    if not isinstance(value, Tensor):
        return value
    numbers = value.detach().double().flatten()
    return float((numbers * torch.linspace(1, 2, numbers.numel(), dtype=torch.float64, device=value.device)).sum())


def margin_from_logits(margin: Margin | None, dtype: torch.dtype) -> MarginTerms | None:
    """dtype: the logits'."""
    if margin is None:
        return None
    if margin.scale is None and margin.turns:
        raise ValueError(
            "an angle needs cosines: give Margin(angle=..., scale=s) for logits that are s times cosines (s = 1 for "
            "plain ones), or take a linear layer with normalize=True"
        )
    scale = 1.0 if margin.scale is None else margin.scale
    return MarginTerms.of(margin, scale, 0.0, reference.compute_dtype(dtype))


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


def _check_weight(weight: Tensor, num_classes: int, device: torch.device) -> None:
    _check_kind_of_weight(weight)
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight tensor should be defined either for all {num_classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    check_device("weight", weight, device)
