"""The raw ops: schema, shapes, and who serves which device.

Four ops, ``torch.ops.fused_losses.{softmax,logistic}_{forward,backward}``, are the doors of every wing; ``reference.py`` states
their contract. PyTorch's dispatcher picks the wing by device: the C++ extension serves the CPU where it was built, the reference
serves every other device. They are not differentiable by themselves: ``autograd.py`` pairs them.
"""

import importlib.metadata
import platform

import torch
from torch import Tensor

from . import reference

_library = torch.library.Library("fused_losses", "DEF")

_FORWARD = "(Tensor logits, Tensor target, str loss, float[] params, int k, int ignore_index, bool compact) -> {}"
_BACKWARD = (
    "(Tensor grad, Tensor? logits, Tensor target, Tensor state, Tensor pick_index, Tensor pick_logit, "
    "str loss, float[] params, int k, int ignore_index, int num_classes, bool compact) -> Tensor"
)
_library.define(
    "softmax_forward" + _FORWARD.format("(Tensor value, Tensor state, Tensor pick_index, Tensor pick_logit)")
)
_library.define(
    "logistic_forward" + _FORWARD.format("(Tensor sums, Tensor state, Tensor pick_index, Tensor pick_logit)")
)
_library.define("softmax_backward" + _BACKWARD)
_library.define("logistic_backward" + _BACKWARD)

for _door in ("softmax_forward", "softmax_backward", "logistic_forward", "logistic_backward"):
    # no_grad: an op below autograd must not record what the reference does inside
    _library.impl(_door, torch.no_grad()(getattr(reference, _door)), "CompositeExplicitAutograd")


# --- shapes -----------------------------------------------------------------------------------------------------------


def _fake_picks(logits: Tensor, k: int, compact: bool) -> tuple[Tensor, Tensor]:
    pick_logit = logits.new_empty((logits.shape[0], k if compact else min(k, 1)))
    return torch.empty_like(pick_logit, dtype=torch.int32), pick_logit


@torch.library.register_fake("fused_losses::softmax_forward", lib=_library)
def _(logits, target, loss, params, k, ignore_index, compact):
    dtype = reference.compute_dtype(logits.dtype)
    rows = logits.shape[0]
    return (
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((rows, 3), dtype=dtype),
        *_fake_picks(logits, k, compact),
    )


@torch.library.register_fake("fused_losses::logistic_forward", lib=_library)
def _(logits, target, loss, params, k, ignore_index, compact):
    sums = logits.new_empty((logits.shape[0], 2), dtype=reference.compute_dtype(logits.dtype))
    return sums, torch.empty_like(sums), *_fake_picks(logits, k, compact)


@torch.library.register_fake("fused_losses::softmax_backward", lib=_library)
@torch.library.register_fake("fused_losses::logistic_backward", lib=_library)
def _(grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes, compact):
    return pick_logit.new_empty((pick_logit.shape[0], num_classes))


# --- form -------------------------------------------------------------------------------------------------------------


def keeps_picks(num_classes: int, k: int, multi_hot: bool) -> bool:
    """Whether the compact form serves: then backward needs no logits, and autograd keeps none alive.

    Scattered stores cost more than reading the logits once more as soon as the picks are no small share of the classes. With
    multi-hot targets backward reads the positives' logits anyway.
    """
    return 0 < k <= num_classes // 32 and not multi_hot


softmax_forward = torch.ops.fused_losses.softmax_forward.default
softmax_backward = torch.ops.fused_losses.softmax_backward.default
logistic_forward = torch.ops.fused_losses.logistic_forward.default
logistic_backward = torch.ops.fused_losses.logistic_backward.default


# --- report -----------------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def show_config() -> None:
    """Prints the versions in use and which backend serves which device, with the reason where it is the reference."""
    print(
        f"fused_losses {_version('fused_losses')}\n"
        f"  python     {platform.python_version()}, {platform.system()} {platform.machine()}\n"
        f"  torch      {torch.__version__}\n"
        f"  triton     {_version('triton')}\n"
        f"  CPU        reference (plain PyTorch): the C++ extension is not part of this version\n"
        f"  CUDA       reference (plain PyTorch): the Triton kernels are not part of this version\n"
        f"  others     reference (plain PyTorch)"
    )
