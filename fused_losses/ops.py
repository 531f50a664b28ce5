"""The raw ops: schema, shapes, and who serves which device.

Four ops, ``torch.ops.fused_losses.{softmax,logistic}_{forward,backward}``, are the doors of every wing;
``reference.py`` states their contract. ``loss_{forward,backward}`` are a door and ``reductions.py`` in one call.
PyTorch's dispatcher picks the wing by device: the C++ extension serves the CPU where it was built, the reference every
other device. They are not differentiable by themselves: ``autograd.py`` pairs them.
"""

import functools
import importlib.metadata
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import reductions, reference
from .gpu.layout import gradient_row_stride

_library = torch.library.Library("fused_losses", "DEF")


def define(schema: str, implementation: Callable, fake: Callable):
    """Registers an op for every device without a kernel of its own; fake gives the shapes of its results."""
    name = schema.partition("(")[0]
    _library.define(schema)
    # no_grad: an op below autograd must not record what its implementation does inside
    _library.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_losses::{name}", fake, lib=_library)
    return getattr(torch.ops.fused_losses, name).default


# --- shapes -----------------------------------------------------------------------------------------------------------


def empty_picks(like: Tensor, k: int, compact: bool) -> tuple[Tensor, Tensor]:
    """pick_index and pick_logit for the rows and the dtype of like."""
    pick_logit = like.new_empty((like.shape[0], k if compact or k == 0 else 1))
    return torch.empty_like(pick_logit, dtype=torch.int32), pick_logit


def _softmax_forward_shapes(logits, target, loss, params, k, ignore_index, compact):
    value = logits.new_empty((logits.shape[0],), dtype=reference.compute_dtype(logits.dtype))
    return value, value.new_empty((logits.shape[0], 3)), *empty_picks(logits, k, compact)


def _logistic_forward_shapes(logits, target, loss, params, k, ignore_index, compact):
    sums = logits.new_empty((logits.shape[0], 2), dtype=reference.compute_dtype(logits.dtype))
    return sums, torch.empty_like(sums), *empty_picks(logits, k, compact)


def _backward_shapes(
    grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes, compact
):
    shape = (pick_logit.shape[0], num_classes)
    if logits is None or _triton_wing(logits.device, logits.dtype, num_classes) is None:
        return pick_logit.new_empty(shape)
    row_stride = gradient_row_stride(num_classes, logits.stride(), logits.element_size())
    return torch.empty_strided(shape, (row_stride, 1), dtype=logits.dtype, device=logits.device)


def _loss_forward_shapes(logits, target, weight, family, loss, params, alpha, k, ignore_index, reduction, compact):
    shapes = _softmax_forward_shapes if family == "softmax" else _logistic_forward_shapes
    terms, *kept = shapes(logits, target, loss, params, k, ignore_index, compact)
    value = terms.new_empty(terms.shape[:1] if reduction == "none" else ())
    return value, terms.new_empty(reductions.slopes_shape(terms, weight, reduction)), *kept


def _loss_backward_shapes(
    grad, slopes, logits, target, state, pick_index, pick_logit, family, loss, params, k, ignore_index, num_classes,
    compact,
):  # fmt: skip
    return _backward_shapes(
        grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes, compact
    )


# --- doors ------------------------------------------------------------------------------------------------------------

_FORWARD = (
    "(Tensor logits, Tensor target, str loss, float[] params, SymInt k, SymInt ignore_index, bool compact) "
    "-> (Tensor {}, Tensor state, Tensor pick_index, Tensor pick_logit)"
)
_BACKWARD = (
    "(Tensor grad, Tensor? logits, Tensor target, Tensor state, Tensor pick_index, Tensor pick_logit, "
    "str loss, float[] params, SymInt k, SymInt ignore_index, SymInt num_classes, bool compact) -> Tensor"
)
softmax_forward = define(
    "softmax_forward" + _FORWARD.format("value"), reference.softmax_forward, _softmax_forward_shapes
)
softmax_backward = define("softmax_backward" + _BACKWARD, reference.softmax_backward, _backward_shapes)
logistic_forward = define(
    "logistic_forward" + _FORWARD.format("sums"), reference.logistic_forward, _logistic_forward_shapes
)
logistic_backward = define("logistic_backward" + _BACKWARD, reference.logistic_backward, _backward_shapes)


def keeps_picks(device: torch.device, num_classes: int, k: int, multi_hot: bool) -> bool:
    """Whether the compact form serves: then backward needs no logits, and autograd keeps none alive.

    On a CPU it was faster at every share of the classes from 1 to 50 %, in 0.50 to 0.85 of the time; more picks than
    half the classes are larger than float32 logits. On a GPU scattered stores cost more than reading the logits once
    more as soon as the picks are no small share of the classes. With multi-hot targets backward reads the positives'
    logits anyway.
    """
    return k > 0 and not multi_hot and always(k <= num_classes // (2 if device.type == "cpu" else 32))


def always(condition: bool) -> bool:
    """condition; in a program exported for any number of classes, whether it holds for all of them."""
    if not torch.compiler.is_exporting():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


# --- who serves CUDA --------------------------------------------------------------------------------------------------


@functools.cache
def _import_triton_wing() -> tuple[ModuleType | None, str]:
    """The Triton kernels, and why there are none: imported when the first CUDA tensor arrives."""
    try:
        from .gpu import doors
    except ImportError as error:
        return None, f"Triton is not usable ({error})"
    return doors, ""


def _triton_wing(device: torch.device, dtype: torch.dtype, num_classes: int) -> ModuleType | None:
    """The one decision between Triton and the reference; a reason for the reference is given once."""
    if device.type != "cuda":
        return None
    # A number that a compiler keeps open cannot be a key: it stands for more classes than one only, not for too many.
    return _decided(device, dtype, num_classes if isinstance(num_classes, int) else 2)


@functools.cache
def _decided(device: torch.device, dtype: torch.dtype, num_classes: int) -> ModuleType | None:
    wing, why = _import_triton_wing()
    if wing is not None:
        why = wing.unserved(device, dtype, num_classes)
    if why:
        _say_once(f"fused_losses: plain PyTorch serves {device.type} instead of the Triton kernels: {why}")
        return None
    return wing


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _forward_on_cuda(name: str):
    def door(logits, target, loss, params, k, ignore_index, compact):
        wing = _triton_wing(logits.device, logits.dtype, logits.shape[1]) or reference
        return getattr(wing, name)(logits, target, loss, params, k, ignore_index, compact)

    return door


def _backward_on_cuda(name: str):
    def door(grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes, compact):
        wing = _triton_wing(pick_logit.device, pick_logit.dtype, num_classes) or reference
        return getattr(wing, name)(
            grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes, compact
        )

    return door


for _family in ("softmax", "logistic"):
    for _pass, _on_cuda in (("forward", _forward_on_cuda), ("backward", _backward_on_cuda)):
        _library.impl(f"{_family}_{_pass}", torch.no_grad()(_on_cuda(f"{_family}_{_pass}")), "CUDA")


# --- whole losses -----------------------------------------------------------------------------------------------------


def _loss_forward(logits, target, weight, family, loss, params, alpha, k, ignore_index, reduction, compact):
    door = softmax_forward if family == "softmax" else logistic_forward
    terms, state, pick_index, pick_logit = door(logits, target, loss, params, k, ignore_index, compact)
    value, slopes = reduce_terms(
        terms, state, target, weight, logits.dtype, alpha, logits.shape[1], k, ignore_index, reduction
    )
    return value, slopes, state, pick_index, pick_logit


def reduce_terms(terms, state, target, weight, dtype, alpha, num_classes, k, ignore_index, reduction):
    """The loss and its slopes from what a forward door gave for logits of this dtype: ``reductions.reduce_terms``, by
    the wing that serves them. No slopes where the loss is the terms."""
    if reductions.slopes_shape(terms, weight, reduction) != terms.shape:
        return terms, terms.new_empty((0,))
    wing = _triton_wing(terms.device, dtype, num_classes) or reductions
    positives = state[:, 1] if target.dim() == 2 else None
    return wing.reduce_terms(terms, target, weight, positives, alpha, num_classes, k, ignore_index, reduction)


def _loss_backward(grad, slopes, logits, target, state, pick_index, pick_logit, family, *door_arguments):
    door = softmax_backward if family == "softmax" else logistic_backward
    of_terms = reductions.grad_of_terms(grad, slopes)
    return door(of_terms, logits, target, state, pick_index, pick_logit, *door_arguments)


# A door and the reduction in one call, so that autograd pays for one. slopes: d(loss) / d(terms of the rows); of no
# elements where the loss is the terms.
loss_forward = define(
    "loss_forward(Tensor logits, Tensor target, Tensor? weight, str family, str loss, float[] params, float? alpha, "
    "SymInt k, SymInt ignore_index, str reduction, bool compact) "
    "-> (Tensor value, Tensor slopes, Tensor state, Tensor pick_index, Tensor pick_logit)",
    _loss_forward,
    _loss_forward_shapes,
)
loss_backward = define(
    "loss_backward(Tensor grad, Tensor slopes, Tensor? logits, Tensor target, Tensor state, Tensor pick_index, "
    "Tensor pick_logit, str family, str loss, float[] params, SymInt k, SymInt ignore_index, SymInt num_classes, "
    "bool compact) -> Tensor",
    _loss_backward,
    _loss_backward_shapes,
)


# --- who serves the CPU -----------------------------------------------------------------------------------------------


def _load_extension() -> str:
    """Loads the C++ kernels, which register themselves for the CPU. Returns why that failed, or nothing."""
    path = next(Path(__file__).parent.glob("_C.*"), None)
    if path is None:
        return "the C++ extension was not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    return ""


_extension_failure = _load_extension()


# --- report -----------------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_server() -> str:
    if not torch.cuda.is_available():
        return "no device here"
    wing, why = _import_triton_wing()
    if wing is not None:
        why = wing.unserved(torch.device("cuda", torch.cuda.current_device()), torch.float32, 1000)
    return f"reference (plain PyTorch): {why}" if why else "Triton kernels"


def show_config() -> None:
    """Prints the versions in use and which backend serves which device, with the reason where it is the reference."""
    reference_because = "reference (plain PyTorch): {}".format
    if _extension_failure:
        cpu = reference_because(_extension_failure)
    else:
        cpu = f"C++ kernels, {torch.ops.fused_losses._cpu_isa('')}, {torch.get_num_threads()} threads"
    print(
        f"fused_losses {_version('fused_losses')}\n"
        f"  python     {platform.python_version()}, {platform.system()} {platform.machine()}\n"
        f"  torch      {torch.__version__}\n"
        f"  triton     {_version('triton')}\n"
        f"  CPU        {cpu}\n"
        f"  CUDA       {_cuda_server()}\n"
        f"  others     reference (plain PyTorch)"
    )
