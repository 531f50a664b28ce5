"""The doors of the GPU wing: layout, grid, tile and warps of every launch. The contract stands in ``reference.py``.

Launch tables are fixed: no autotuning at run time. They were chosen from the compiled machine code (registers,
instructions per logit), not from timings.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..reference import count_classes
from . import logistic, softmax
from .formulas import formulas
from .layout import gradient_row_stride

_OLDEST_TRITON = (3, 6)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_CLASSES = 2**31 - 2**17  # int32 offsets within a row, tile padding included
_MOST_PARTS = 64


# --- who is served ----------------------------------------------------------------------------------------------------


def unserved(device: torch.device, dtype: torch.dtype, num_classes: int) -> str | None:
    """Why the kernels do not serve such logits, or None if they do."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    if dtype not in _DTYPES:
        return f"no kernels for {dtype}"
    if num_classes > _MOST_CLASSES:
        return f"more than {_MOST_CLASSES} classes"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


# --- launch tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time: ``rows`` vectors of 16 bytes in each thread of ``warps`` warps."""

    warps: int
    rows: int


@dataclass(frozen=True)
class Device:
    generation: str  # key of the launch tables
    multiprocessors: int
    threads_per_warp: int
    nvidia: bool


@functools.cache
def profile(device: torch.device) -> Device:
    if device.type != "cuda":  # Triton's interpreter
        return Device("generic", 1, 32, nvidia=False)
    properties = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    hopper = not amd and properties.major == 9
    return Device("hopper" if hopper else "generic", properties.multi_processor_count, 64 if amd else 32, not amd)


# (largest row in bytes, tile), smallest first: one warp per row keeps many short rows in flight.
_TILES = {
    "hopper": ((4096, Tile(1, 4)), (16384, Tile(4, 4)), (None, Tile(8, 4))),
    "generic": ((4096, Tile(1, 4)), (16384, Tile(4, 4)), (None, Tile(8, 4))),
}


def tile_for(device: Device, num_classes: int, itemsize: int) -> Tile:
    size = num_classes * itemsize
    return next(tile for limit, tile in _TILES[device.generation] if limit is None or size <= limit)


def parts_for(device: Device, num_rows: int, num_tiles: int) -> int:
    """Programs that share a row, where whole rows would leave multiprocessors without work: as many as fit at once,
    since a second, half empty round would cost as much as the first. Four programs of 64 registers fit in one."""
    return max(1, min(4 * device.multiprocessors // num_rows, num_tiles // 2, _MOST_PARTS))


# --- layout -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A (rows, classes) tensor as the kernels see it: (r, c) is ``phase + r * stride + c`` elements behind ``base``."""

    base: Tensor  # its address is a multiple of 16
    phase: int
    stride: int


def as_matrix(x: Tensor) -> Matrix:
    if x.shape[1] != 1 and x.stride(1) != 1:
        x = x.contiguous()
    phase = x.data_ptr() % 16 // x.element_size()
    if phase > x.storage_offset():  # foreign memory that begins between two vectors
        return _copied(x, 0, gradient_row_stride(x.shape[1], x.stride(), x.element_size()))
    base = x.as_strided((1,), (1,), x.storage_offset() - phase) if phase else x
    return Matrix(base, phase, x.stride(0))


def multi_hot_beside(z: Matrix, target: Tensor) -> Matrix:
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


@dataclass(frozen=True)
class Walk:
    """How the rows of one matrix are walked."""

    tile: Tile
    parts: int
    shape: dict[str, int]  # ROWS and LANES of a tile
    fast: bool  # shorter primitives for what is done once per logit


def plan(logits: Tensor) -> Walk:
    device = profile(logits.device)
    num_rows, num_classes = logits.shape
    tile = tile_for(device, num_classes, logits.element_size())
    lanes = 16 // logits.element_size() * device.threads_per_warp * tile.warps
    parts = parts_for(device, num_rows, triton.cdiv(num_classes, tile.rows * lanes))
    return Walk(tile, parts, {"ROWS": tile.rows, "LANES": lanes}, device.nvidia)


def launch(kernel, grid: tuple[int, ...], warps: int, *arguments, **constexprs) -> None:
    """The one place that starts a kernel. Fused multiply-adds by name: their default changes in Triton 3.10."""
    kernel[grid](*arguments, **constexprs, num_warps=warps, enable_fp_fusion=True)


def _no_picks(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty((logits.shape[0], 0), dtype=torch.int32), logits.new_empty((logits.shape[0], 0))


# --- doors ------------------------------------------------------------------------------------------------------------


def softmax_forward(
    logits: Tensor,
    target: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value (rows,), state (rows, 3), pick_index and pick_logit (rows, 0)."""
    num_rows, num_classes = logits.shape
    all_classes = count_classes(num_classes, first_class, all_classes)
    value = logits.new_empty((num_rows,), dtype=torch.float32)
    state = logits.new_empty((num_rows, 3), dtype=torch.float32)
    if num_rows == 0:
        return value, state, *_no_picks(logits)

    formula, _, a, b = formulas(loss, params)
    z, walk = as_matrix(logits), plan(logits)
    rows = z.base, z.phase, z.stride, target, target.stride(0), num_classes, ignore_index, first_class, all_classes
    with torch.cuda.device_of(logits):
        if walk.parts == 1:
            launch(
                softmax.softmax_forward_kernel, (num_rows,), walk.tile.warps, value, state, *rows, a, b,
                VALUE=formula, **walk.shape,
            )  # fmt: skip
        else:
            partial = logits.new_empty((num_rows, walk.parts, 2), dtype=torch.float32)
            launch(
                softmax.softmax_partial_kernel, (num_rows, walk.parts), walk.tile.warps, partial, *rows, **walk.shape
            )
            launch(
                softmax.softmax_merge_kernel, (num_rows,), 1, value, state, partial, walk.parts, *rows, a, b,
                PARTS=triton.next_power_of_2(walk.parts), VALUE=formula,
            )  # fmt: skip
    return value, state, *_no_picks(logits)


def softmax_backward(
    grad: Tensor,
    logits: Tensor | None,
    target: Tensor,
    state: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    num_classes: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> Tensor:
    """dlogits (rows, classes) from grad (rows,)."""
    all_classes = count_classes(num_classes, first_class, all_classes)
    _, slope, a, b = formulas(loss, params)
    z = as_matrix(logits)
    dlogits, dz = empty_gradient(logits, z)
    if logits.shape[0] == 0:
        return dlogits
    walk = plan(logits)
    with torch.cuda.device_of(logits):
        launch(
            softmax.softmax_backward_kernel, (logits.shape[0], walk.parts), walk.tile.warps,
            dz.base, dz.stride, grad, grad.stride(0), state.contiguous(), z.base, z.phase, z.stride,
            target, target.stride(0), num_classes, ignore_index, first_class, all_classes, a, b,
            SLOPE=slope, **walk.shape,
        )  # fmt: skip
    return dlogits


def logistic_forward(
    logits: Tensor,
    target: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sums (rows, 2), state (rows, 2), pick_index and pick_logit (rows, 0)."""
    num_rows, num_classes = logits.shape
    all_classes = count_classes(num_classes, first_class, all_classes)
    sums = logits.new_empty((num_rows, 2), dtype=torch.float32)
    state = torch.empty_like(sums)
    if num_rows == 0:
        return sums, state, *_no_picks(logits)

    value, _, a, b = formulas(loss, params)
    z, walk = as_matrix(logits), plan(logits)
    if target.dim() == 2:
        y, row = multi_hot_beside(z, target), logistic.multi_hot_row
    else:
        y, row = Matrix(target, 0, target.stride(0)), logistic.index_row
    labels = ignore_index, first_class, all_classes
    rows = z.base, z.phase, z.stride, y.base, y.phase, y.stride, num_classes, *labels, a, b
    with torch.cuda.device_of(logits):
        if walk.parts == 1:
            launch(
                logistic.logistic_forward_kernel, (num_rows,), walk.tile.warps, sums, state, *rows,
                ROW=row, VALUE=value, FAST=walk.fast, **walk.shape,
            )  # fmt: skip
        else:
            partial = logits.new_empty((num_rows, walk.parts, 4), dtype=torch.float32)
            launch(
                logistic.logistic_partial_kernel, (num_rows, walk.parts), walk.tile.warps, partial, *rows,
                ROW=row, VALUE=value, FAST=walk.fast, **walk.shape,
            )  # fmt: skip
            launch(
                logistic.logistic_merge_kernel, (num_rows,), 1, sums, state, partial, walk.parts,
                PARTS=triton.next_power_of_2(walk.parts),
            )  # fmt: skip
    return sums, state, *_no_picks(logits)


def logistic_backward(
    grad: Tensor,
    logits: Tensor | None,
    target: Tensor,
    state: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    loss: str,
    params: list[float],
    k: int,
    ignore_index: int,
    num_classes: int,
    compact: bool,
    first_class: int = 0,
    all_classes: int | None = None,
) -> Tensor:
    """dlogits (rows, classes) from grad (rows, 2), by pos and by neg."""
    all_classes = count_classes(num_classes, first_class, all_classes)
    _, slope, a, b = formulas(loss, params)
    z = as_matrix(logits)
    dlogits, dz = empty_gradient(logits, z)
    if logits.shape[0] == 0:
        return dlogits
    walk = plan(logits)
    rows = dz.base, dz.stride, grad, *grad.stride(), state.contiguous(), z.base, z.phase, z.stride
    grid = logits.shape[0], walk.parts
    with torch.cuda.device_of(logits):
        if target.dim() == 2:
            y = multi_hot_beside(z, target)
            launch(
                logistic.multi_hot_backward_kernel, grid, walk.tile.warps, *rows, y.base, y.phase, y.stride,
                num_classes, a, b, SLOPE=slope, FAST=walk.fast, **walk.shape,
            )  # fmt: skip
        else:
            launch(
                logistic.index_backward_kernel, grid, walk.tile.warps, *rows, target, target.stride(0),
                num_classes, ignore_index, first_class, all_classes, a, b, SLOPE=slope, FAST=walk.fast, **walk.shape,
            )  # fmt: skip
    return dlogits
