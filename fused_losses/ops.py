"""The raw ops: schema, shapes, and who serves which device.

Five ops, ``torch.ops.fused_losses.{forward,statistics,finish,backward,backward_}``, are served by every backend.
``reference.py`` states the contract of the doors, ``finish.py`` that of finish. forward is statistics and finish in
one, backward_ is backward written over the logits. PyTorch's dispatcher picks the backend by device: the C++ extension
serves the CPU where it was built, the reference every other device. They are not differentiable by themselves:
``autograd.py`` pairs them.
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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import labels, reference
from .gpu.layout import gradient_row_stride
from .losses import LossSpec

_library = torch.library.Library("fused_losses", "DEF")


def define(schema: str, implementation: Callable, fake: Callable):
    """Registers an op for every device without a kernel of its own; fake gives the shapes of its results.

    A meta tensor among others brings the op to fake, whose results would then be memory that nobody has written.
    """
    name = schema.partition("(")[0]

    @functools.wraps(fake)
    def shapes(*arguments, **named):
        reference.check_same_device(*arguments, *named.values())
        return fake(*arguments, **named)

    _library.define(schema)
    # no_grad: an op below autograd must not record what its implementation does inside
    _library.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_losses::{name}", shapes, lib=_library)
    return getattr(torch.ops.fused_losses, name).default


# --- shapes -----------------------------------------------------------------------------------------------------------

# What every op takes last, in the order of LossSpec.
SPEC = (
    "str loss, float[] params, float? alpha, SymInt k, SymInt? ignore_index, SymInt first_class, SymInt all_classes, "
    "bool compact, bool labels=False, float label_smoothing=0.0, float[] margin=[]"
)


def _finish_shapes(statistics, target, weight, reduction, *spec):
    rows, columns = statistics.shape[0], reference.num_coefficients(target, LossSpec(*spec))
    return statistics.new_empty((rows,) if reduction == "none" else ()), statistics.new_empty((rows, columns))


def _statistics_shapes(logits, target, *spec):
    spec = LossSpec(*spec)
    return reference.empty_statistics(logits, target, spec), *reference.empty_picks(logits, spec)


def _forward_shapes(logits, target, weight, reduction, *spec):
    seen = _statistics_shapes(logits, target, *spec)
    return *_finish_shapes(seen[0], target, weight, reduction, *spec), *seen


def _backward_shapes(
    grad, coefficients, logits, target, statistics, pick_index, pick_logit, num_classes, *spec
):  # fmt: skip
    shape = (pick_logit.shape[0], num_classes)
    if logits is None or _triton_backend(logits.device, logits.dtype, num_classes) is None:
        return pick_logit.new_empty(shape)
    row_stride = gradient_row_stride(num_classes, logits.stride(), logits.element_size())
    return torch.empty_strided(shape, (row_stride, 1), dtype=logits.dtype, device=logits.device)


# --- doors ------------------------------------------------------------------------------------------------------------

_forward = define(
    f"forward(Tensor logits, Tensor target, Tensor? weight, str reduction, {SPEC}) "
    "-> (Tensor loss, Tensor coefficients, Tensor statistics, Tensor pick_index, Tensor pick_logit)",
    reference.forward,
    _forward_shapes,
)
_statistics = define(
    f"statistics(Tensor logits, Tensor target, {SPEC}) -> (Tensor statistics, Tensor pick_index, Tensor pick_logit)",
    reference.statistics,
    _statistics_shapes,
)
_finish = define(
    f"finish(Tensor statistics, Tensor target, Tensor? weight, str reduction, {SPEC}) "
    "-> (Tensor loss, Tensor coefficients)",
    reference.finish,
    _finish_shapes,
)
in_order = define(
    "in_order(Tensor index, Tensor? weight) -> (Tensor index, Tensor weight)",
    labels.in_order,
    lambda index, weight: (
        torch.empty_like(index, memory_format=torch.contiguous_format),
        index.new_empty((0, index.shape[1]), dtype=torch.float32)
        if weight is None
        else torch.empty_like(weight, memory_format=torch.contiguous_format),
    ),
)
_backward = define(
    "backward(Tensor grad, Tensor coefficients, Tensor? logits, Tensor target, Tensor statistics, Tensor pick_index, "
    f"Tensor pick_logit, SymInt num_classes, {SPEC}) -> Tensor",
    reference.backward,
    _backward_shapes,
)
backward_ = define(
    "backward_(Tensor grad, Tensor coefficients, Tensor(a!) logits, Tensor target, Tensor statistics, "
    f"Tensor pick_index, Tensor pick_logit, {SPEC}) -> ()",
    reference.backward_,
    lambda *_: None,
)


def _overwriting(keys, grad, coefficients, logits, *others):
    """What PyTorch does for its own in-place ops: a graph that has saved the logits refuses to use them any more."""
    torch.autograd.graph.increment_version(logits)
    return backward_.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, grad, coefficients, logits, *others)


_library.impl("backward_", _overwriting, "ADInplaceOrView", with_keyset=True)


_SHARE_ON_CPU = {torch.float16: 3, torch.bfloat16: 3, torch.float32: 6, torch.float64: 4}  # classes for each pick


def keeps_picks(device: torch.device, dtype: torch.dtype, num_classes: int, k: int, multi_hot: bool) -> bool:
    """Whether the compact form serves: then backward needs no logits, and autograd keeps none alive.

    On a CPU it was faster up to a third of the classes in 16 bits, a quarter in float64, a fifth in float32 (an eighth
    of batches beyond the caches) and, with multi-hot targets, whose positives' logits backward reads anyway, up to an
    eighth. On a GPU scattered stores cost more than reading the logits once more as soon as the picks are no small
    share of the classes.
    """
    if k == 0:
        return False
    if device.type == "cpu":
        return always(k <= num_classes // (8 if multi_hot else _SHARE_ON_CPU[dtype]))
    return not multi_hot and always(k <= num_classes // 32)


def always(condition: bool) -> bool:
    """condition; in a program exported for any number of classes, whether it holds for all of them."""
    if not torch.compiler.is_exporting():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


# --- who serves CUDA --------------------------------------------------------------------------------------------------


@functools.cache
def _import_triton_backend() -> tuple[ModuleType | None, str]:
    """The Triton kernels, and why there are none: imported when the first CUDA tensor arrives."""
    try:
        from .gpu import doors
    except ImportError as error:
        return None, f"Triton is not usable ({error})"
    return doors, ""


def _triton_backend(device: torch.device, dtype: torch.dtype, num_classes: int) -> ModuleType | None:
    """The one decision between Triton and the reference; a reason for the reference is given once."""
    if device.type != "cuda":
        return None
    # A number that a compiler keeps open cannot be a key: it stands for more classes than one only, not for too many.
    return _decided(device, dtype, num_classes if isinstance(num_classes, int) else 2)


@functools.cache
def _decided(device: torch.device, dtype: torch.dtype, num_classes: int) -> ModuleType | None:
    backend, why = _import_triton_backend()
    if backend is not None:
        why = backend.unserved(device, dtype, num_classes)
    if why:
        _say_once(f"fused_losses: plain PyTorch serves {device.type} instead of the Triton kernels: {why}")
        return None
    return backend


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class _PlainPyTorch:
    """The reference's doors, which record nothing."""

    forward, statistics = torch.no_grad()(reference.forward), torch.no_grad()(reference.statistics)
    finish, backward = torch.no_grad()(reference.finish), torch.no_grad()(reference.backward)
    backward_ = torch.no_grad()(reference.backward_)


def _forward_on_cuda(logits, target, weight, reduction, *spec):
    reference.check_forward(logits, target, weight, reduction, LossSpec(*spec))
    backend = _triton_backend(logits.device, logits.dtype, logits.shape[1]) or _PlainPyTorch
    return backend.forward(logits, target, weight, reduction, *spec)


def _statistics_on_cuda(logits, target, *spec):
    reference.check_statistics(logits, target, LossSpec(*spec))
    backend = _triton_backend(logits.device, logits.dtype, logits.shape[1]) or _PlainPyTorch
    return backend.statistics(logits, target, *spec)


def _finish_on_cuda(statistics, target, weight, reduction, *spec):
    reference.check_finish(statistics, target, weight, reduction, LossSpec(*spec))
    backend = _triton_backend(statistics.device, statistics.dtype, 1) or _PlainPyTorch
    return backend.finish(statistics, target, weight, reduction, *spec)


def _backward_on_cuda(grad, coefficients, logits, target, statistics, pick_index, pick_logit, num_classes, *spec):
    tensors = grad, coefficients, logits, target, statistics, pick_index, pick_logit
    reference.check_backward(*tensors, num_classes, LossSpec(*spec))
    backend = _triton_backend(pick_logit.device, pick_logit.dtype, num_classes) or _PlainPyTorch
    return backend.backward(*tensors, num_classes, *spec)


def _backward__on_cuda(grad, coefficients, logits, target, statistics, pick_index, pick_logit, *spec):
    tensors = grad, coefficients, logits, target, statistics, pick_index, pick_logit
    reference.check_overwritten(logits)
    reference.check_backward(*tensors, logits.shape[1], LossSpec(*spec))
    backend = _triton_backend(logits.device, logits.dtype, logits.shape[1]) or _PlainPyTorch
    backend.backward_(*tensors, *spec)


for _name, _on_cuda in (
    ("forward", _forward_on_cuda),
    ("statistics", _statistics_on_cuda),
    ("finish", _finish_on_cuda),
    ("backward", _backward_on_cuda),
    ("backward_", _backward__on_cuda),
):
    _library.impl(_name, _on_cuda, "CUDA")


# --- the ops as the package calls them --------------------------------------------------------------------------------


def _is_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def forward(logits, target, weight, reduction, *spec):
    door = _unseen_triton(logits, logits.shape[1]) if _is_cuda(logits) else None
    return (_forward if door is None else door.forward)(logits, target, weight, reduction, *spec)


def statistics(logits, target, *spec):
    door = _unseen_triton(logits, logits.shape[1]) if _is_cuda(logits) else None
    return (_statistics if door is None else door.statistics)(logits, target, *spec)


def finish(statistics, target, weight, reduction, *spec):
    door = _unseen_triton(statistics, 1) if _is_cuda(statistics) else None
    return (_finish if door is None else door.finish)(statistics, target, weight, reduction, *spec)


def backward(grad, coefficients, logits, target, statistics, pick_index, pick_logit, num_classes, *spec):
    door = _unseen_triton(pick_logit, num_classes) if _is_cuda(pick_logit) else None
    return (_backward if door is None else door.backward)(
        grad, coefficients, logits, target, statistics, pick_index, pick_logit, num_classes, *spec
    )


def at_once_(grad, logits, target, weight, *spec):
    """forward without a reduction, and backward_ for the upstream gradient (rows,): loss (rows,) and statistics."""
    door = _unseen_triton(logits, logits.shape[1]) if _is_cuda(logits) else None
    if door is not None:
        return door.at_once_(grad, logits, target, weight, *spec)
    loss, coefficients, statistics, *picks = forward(logits, target, weight, "none", *spec)
    backward_(grad, coefficients, logits, target, statistics, *picks, *spec)
    return loss, statistics


def _unseen_triton(tensor: Tensor, num_classes: int) -> ModuleType | None:
    """The Triton kernels, if nobody is to see that an op is called: an op that Python serves takes the processor as
    long as its launches."""
    if type(tensor) is not Tensor or is_seen():
        return None
    return _triton_backend(tensor.device, tensor.dtype, num_classes)


def is_seen() -> bool:
    """Whether a compiler, a mode, a tracer or a transform is to see the ops."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
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


def has_candidates() -> bool:
    """Whether the C++ kernel of certified selection serves this machine."""
    return not _extension_failure and torch.ops.fused_losses._cpu_has_candidates()


# --- report -----------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


__version__ = _version("fused_losses") or "0+unknown"  # the sources, which nobody has installed

REFERENCE = "reference (plain PyTorch)"


def _cure_of_triton() -> str:
    return 'pip install "triton>=3.6"' if platform.system() == "Linux" else "it is made for Linux alone"


def _cpu_server() -> str:
    if not _extension_failure:
        return f"C++ kernels, {torch.ops.fused_losses._cpu_isa('')}, {torch.get_num_threads()} threads"
    return (
        f"{REFERENCE}: {_extension_failure}; in the sources, FUSED_LOSSES_BUILD_EXT=1 pip install "
        "--no-build-isolation --no-deps . builds it or says what is missing"
    )


def _certified() -> str:
    if has_candidates():
        return "k hardest of float32 layers on the CPU by products in bfloat16 (AVX-512 BF16), where that pays"
    return "only with certified=True: " + (_extension_failure or "this CPU has no AVX-512 BF16")


def _cuda_server() -> str:
    if not torch.backends.cuda.is_built():
        return "none: this torch is built without CUDA; https://pytorch.org/get-started has those with it"
    if not torch.cuda.is_available():
        return "none: torch sees no device; look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES"
    backend, why = _import_triton_backend()
    if backend is not None:
        why = backend.unserved(torch.device("cuda", torch.cuda.current_device()), torch.float32, 1000)
    if why and "Triton" in why:
        why = f"{why}; {_cure_of_triton()}"
    return f"{REFERENCE}: {why}" if why else "Triton kernels"


def _sharding() -> str:
    if not torch.distributed.is_available():
        return "none: this torch is built without torch.distributed; those of https://pytorch.org/get-started have it"
    there = {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
    return ", ".join(f"{name} {'yes' if available else 'no'}" for name, available in there.items())


def show_config() -> str:
    """Prints what is in use: versions, which backend serves which device, and what is there to shard classes with.

    Where plain PyTorch serves, or something is missing, the line says why, and what to do about it. A report of a bug
    wants this text.

    Returns:
        str: what was printed.

    Example:
        >>> text = fl.show_config()
        fused_losses ...
        >>> "CPU" in text
        True
    """
    text = (
        f"fused_losses {__version__}\n"
        f"  python     {platform.python_version()}, {platform.system()} {platform.machine()}\n"
        f"  torch      {torch.__version__}\n"
        f"  triton     {_version('triton') or f'not installed; GPUs alone need it: {_cure_of_triton()}'}\n"
        f"  CPU        {_cpu_server()}\n"
        f"  CUDA       {_cuda_server()}\n"
        f"  others     {REFERENCE}\n"
        f"  sharding   {_sharding()}\n"
        f"  certified  {_certified()}"
    )
    print(text)
    return text
