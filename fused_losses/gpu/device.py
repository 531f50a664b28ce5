"""The device: what it serves, its tiles, how matrices lie in its memory, and the one place that starts a kernel.

Launch tables are fixed: no autotuning at run time. They were chosen from the compiled machine code (registers,
instructions per logit) and from what ``bench.speed.launch_tables`` measured on an H200.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from ..losses import LossSpec
from .layout import gradient_row_stride

_OLDEST_TRITON = (3, 6)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_CLASSES = 2**31 - 2**17  # int32 offsets within a row, tile padding included
_MOST_PARTS = 64


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


# --- who is served ----------------------------------------------------------------------------------------------------


def unserved(device: torch.device, dtype: torch.dtype, num_classes: int) -> str | None:
    """Why the kernels do not serve such logits, or None if they do."""
    if _triton_version() < _OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    if dtype not in _DTYPES:
        return f"no kernels for {dtype}"
    if num_classes > _MOST_CLASSES:
        return f"more than {_MOST_CLASSES} classes"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


# --- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    threads_per_warp: int
    nvidia: bool


@functools.cache
def profile(device: torch.device) -> Device:
    if device.type != "cuda":  # Triton's interpreter
        return Device(1, 32, nvidia=False)
    properties = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    return Device(properties.multi_processor_count, 64 if amd else 32, not amd)


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time: ``rows`` vectors of 16 bytes in each thread of ``warps`` warps."""

    warps: int
    rows: int

    def threads(self, device: Device) -> int:
        return self.warps * device.threads_per_warp

    def lanes(self, device: Device, itemsize: int) -> int:
        """Classes in one row of the tile."""
        return 16 // itemsize * self.threads(device)

    def classes(self, device: Device, itemsize: int) -> int:
        return self.rows * self.lanes(device, itemsize)


# (largest row in bytes, tile), smallest first: one warp per row keeps many short rows in flight.
_TILES = ((4096, Tile(1, 4)), (16384, Tile(4, 4)))
_LONG, _SMALL = Tile(8, 4), Tile(4, 4)  # of longer rows


def tile_for(num_classes: int, itemsize: int, small: bool = False) -> Tile:
    size = num_classes * itemsize
    return next((tile for limit, tile in _TILES if size <= limit), _SMALL if small else _LONG)


def are_many(rows: Tensor) -> bool:
    """Whether a multiprocessor has so many rows to read, one after another, that small programs, which end at different
    times, keep it busier than large ones."""
    return rows.shape[0] > 16 * profile(rows.device).multiprocessors


def parts_for(device: Device, num_rows: int, num_tiles: int) -> int:
    """Programs that share a row, where whole rows would leave multiprocessors without work: as many as fit at once,
    since a second, half empty round would cost as much as the first. Four programs of 64 registers fit in one."""
    return max(1, min(4 * device.multiprocessors // num_rows, num_tiles // 2, _MOST_PARTS))


class Walk(NamedTuple):
    """How the rows of a matrix are walked."""

    warps: int
    parts: int  # programs that share a row
    fast: bool  # shorter primitives for what is done once per logit
    rows: int  # of a tile,
    lanes: int  # and the classes in each

    def constants(self) -> dict[str, int]:
        return {"FAST": self.fast, "ROWS": self.rows, "LANES": self.lanes}


def walk_of(rows: Tensor, num_classes: int, small: bool, halved: bool = False, merged: bool = True) -> Walk:
    """rows: a tensor of as many rows, of the logits' dtype and on their device. small: programs of few warps for long
    rows. halved: for kernels that hold two numbers per logit at a time. merged: another launch merges the parts of a
    row; where none does, tiles are halved if that lets more programs share it."""
    device, itemsize = profile(rows.device), rows.element_size()
    tile = tile_for(num_classes, itemsize, small)

    def walk(height: int) -> Walk:
        lanes = tile.lanes(device, itemsize)
        parts = parts_for(device, rows.shape[0], -(-num_classes // (height * lanes)))
        return Walk(tile.warps, parts, device.nvidia, height, lanes)

    if halved:
        return walk(tile.rows // 2)
    whole = walk(tile.rows)
    if merged or tile.rows == 1:
        return whole
    finer = walk(tile.rows // 2)
    return finer if finer.parts > whole.parts else whole


def limited_registers(nvidia: bool, most: int = 128) -> dict[str, int]:
    """Compiler's option for kernels of which the assembler would give a thread more registers than leave room for 16
    warps per multiprocessor, or for the 32 that 64 registers leave room for."""
    return {"maxnreg": most} if nvidia else {}


# --- launches ---------------------------------------------------------------------------------------------------------

# Triton finds a compiled kernel by all arguments and constants, which takes the processor longer than the launch. Where
# it is known by what it tells arguments apart, the constants of a Kernel are not looked at again.
_KNOWN_TRITON = ((3, 6), (3, 10))


class Kernel:
    """A jitted function with its constants, compiled once for each kind of arguments and device.

    Args:
        function: takes its arguments, then its constants. No integer among the arguments is specialised.
        constants: and compiler's options.
    """

    def __init__(self, function, warps: int, **constants):
        self.function, self.warps, self.constants = function, warps, constants
        self.name = function.fn.__name__
        self.options = {**constants, "num_warps": warps, "enable_fp_fusion": True}
        self.values = tuple(constants[name] for name in function.arg_names if name in constants)
        self.compiled: dict[tuple, CompiledKernel] = {}
        self.known = isinstance(function, JITFunction) and _knows_triton()

    def __repr__(self) -> str:
        return f"{self.name}, {self.warps} warps, {self.constants}"


def _kind(argument: Tensor | float | None) -> object:
    """What Triton tells apart."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return -(2**31) <= argument < 2**31 if isinstance(argument, int) else type(argument)


def launch(kernel: Kernel, grid: tuple[int, ...], *arguments) -> None:
    """The one place that starts a kernel. Fused multiply-adds by name: their default changes in Triton 3.10."""
    if not kernel.known:
        kernel.function[grid](*arguments, **kernel.options)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    kind = device, *map(_kind, arguments)
    compiled = kernel.compiled.get(kind)
    if compiled is None:
        kernel.compiled[kind] = kernel.function[grid](*arguments, **kernel.options)
        parameters = zip(arguments, kernel.function.params, strict=False)
        assert all(parameter.do_not_specialize for x, parameter in parameters if isinstance(x, int))
    else:
        compiled[(*grid, 1, 1)](*arguments, *kernel.values, stream=driver.get_current_stream(device))


@functools.cache
def _knows_triton() -> bool:
    first, behind = _KNOWN_TRITON
    return torch.version.hip is None and first <= _triton_version() < behind  # AMD's backend looks at sizes, too


# --- matrices ---------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A (rows, classes) tensor as the kernels see it: (r, c) is ``phase + r * stride + c`` elements behind ``base``."""

    base: Tensor  # its address is a multiple of 16
    phase: int
    stride: int


def lies_as_matrix(x: Tensor) -> bool:
    """Whether the kernels see the tensor itself: not columns with gaps, nor foreign memory that begins between two
    vectors."""
    return (x.shape[1] == 1 or x.stride(1) == 1) and x.data_ptr() % 16 // x.element_size() <= x.storage_offset()


def as_matrix(x: Tensor) -> Matrix:
    """The tensor itself where it lies so, else a copy."""
    if not lies_as_matrix(x):
        return _copied(x, 0, gradient_row_stride(x.shape[1], x.stride(), x.element_size()))
    phase = x.data_ptr() % 16 // x.element_size()
    base = x.as_strided((1,), (1,), x.storage_offset() - phase) if phase else x
    return Matrix(base, phase, x.stride(0))


def kind_of(target: Tensor, spec: LossSpec) -> str:
    """What the targets are: class indices (rows,), several labels (rows, labels), or multi-hot (rows, classes)."""
    return "labels" if spec.labels else "index" if target.dim() == 1 else "multi_hot"


def labels_beside(z: Matrix, target: Tensor, spec: LossSpec) -> tuple:
    """The targets as kernels take them: ``rows.Labels``, argument by argument."""
    kind = kind_of(target, spec)
    if kind == "labels" and target.shape[1] > 1 and target.stride(1) != 1:
        target = target.contiguous()
    y = _multi_hot_beside(z, target) if kind == "multi_hot" else Matrix(target, 0, target.stride(0))
    ignore_index = None if kind == "multi_hot" else spec.ignore_index
    return *y, ignore_index, spec.first_class, spec.all_classes, target.shape[1] if kind == "labels" else None


def _multi_hot_beside(z: Matrix, target: Tensor) -> Matrix:
    """A multi-hot target whose rows begin at the same remainders by vector as the logits' rows: if need be a copy."""
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    elif target.dtype.is_floating_point and target.element_size() == 1:  # not every device's kernels know float8
        target = target.to(torch.bfloat16)
    vector = 16 // z.base.element_size()
    found = as_matrix(target)
    if (found.phase - z.phase) % vector == 0 and (found.stride - z.stride) % vector == 0:
        return found
    return _copied(target, z.phase, target.shape[1] + (z.stride - target.shape[1]) % vector)


def _empty(shape: torch.Size, phase: int, stride: int, like: Tensor) -> tuple[Tensor, Matrix]:
    """An uninitialised (rows, classes) tensor."""
    buffer = like.new_empty((phase + shape[0] * stride,))
    return buffer.as_strided(shape, (stride, 1), phase), Matrix(buffer, phase, stride)


def _copied(x: Tensor, phase: int, stride: int) -> Matrix:
    copy, matrix = _empty(x.shape, phase, stride, x)
    copy.copy_(x)
    return matrix


def empty_gradient(logits: Tensor, z: Matrix) -> tuple[Tensor, Matrix]:
    """dlogits, its rows beginning at the same remainders by 16 bytes as the rows of z."""
    stride = gradient_row_stride(logits.shape[1], logits.stride(), logits.element_size())
    return _empty(logits.shape, z.phase, stride, logits)
