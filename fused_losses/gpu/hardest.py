"""The doors of the GPU wing for k >= 1. The contract stands in ``reference.py``.

The regime of a forward pass follows from classes and k: a short row is held in registers by one warp; a longer one is
searched by reading it again from the caches, or, where k is a small share of the classes, through the maxima of its
blocks, which reads it from memory once. Tables are fixed and were chosen from machine code and instruction counts, not
from timings.
"""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import triton
from torch import Tensor

from ..reference import count_classes
from . import launch as wing
from . import picks, scatter, select
from .formulas import formulas

_HELD_CLASSES = 2048  # of a row in the registers of one warp
_FEWEST_CANDIDATES = 64
_REGISTERS = 128  # of a thread: 16 warps per multiprocessor and more; without a limit the assembler takes 200
_FAMILIES = {
    "softmax": {
        "forward": {"TERM": picks.softmax_term, "FINISH": picks.softmax_finish},
        "backward": {"COEFFICIENTS": scatter.softmax_coefficients, "NEGATIVE": scatter.softmax_negative},
    },
    "logistic": {
        "forward": {"TERM": picks.logistic_term, "FINISH": picks.logistic_finish},
        "backward": {"COEFFICIENTS": scatter.logistic_coefficients, "NEGATIVE": scatter.logistic_negative},
    },
}
_WALKED = {
    "index": {"OPEN": picks.walk_index, "COUNT": select.count_walked},
    "multi_hot": {"OPEN": picks.walk_multi_hot, "COUNT": select.count_walked_multi_hot},
}
_HELD = {
    "index": {"OPEN": picks.hold_index, "COUNT": select.count_held},
    "multi_hot": {"OPEN": picks.hold_multi_hot, "COUNT": select.count_held},
}
_TARGETS = {
    "index": {"TARGET": picks.index_target, "VIEW": select.index_view},
    "multi_hot": {"TARGET": picks.multi_hot_target, "VIEW": select.multi_hot_view},
}


# --- launch tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a forward pass finds the picks of a row."""

    warps: int
    rows: int  # vectors of 16 bytes in each thread at a time, where elements are read or counted
    emitted: int  # the same, where they are ranked
    held: bool = False  # the row is one tile and stays in registers
    width: int = 0  # logits per block; 0: no blocks, the row is searched as a whole
    parts: int = 1  # programs that share the reading of a row


def plan(device: wing.Device, num_rows: int, num_classes: int, k: int, itemsize: int, multi_hot: bool) -> Plan:
    if num_classes <= _HELD_CLASSES:
        lanes = 16 // itemsize * device.threads_per_warp
        return Plan(1, max(1, triton.next_power_of_2(num_classes) // lanes), 1, held=True)
    width = block_width(num_classes, k)
    if multi_hot or width == 0:
        return Plan(8, 4, 1)
    tiles = num_classes * itemsize // (4 * 8 * device.threads_per_warp * 16)
    few = 2 * num_rows <= device.multiprocessors
    parts = min(triton.cdiv(2 * device.multiprocessors, num_rows), tiles // 2) if few else 1
    return Plan(8, 4, 1, width=width, parts=max(1, parts))


def block_width(num_classes: int, k: int) -> int:
    """Logits per block, 0 where blocks do not pay.

    The maxima of C / width blocks are searched and listed, then the logits of k winners are ranked, at about the same
    cost each, which is smallest where both are equal; narrow blocks would save little, wide ones read too much again.
    """
    width = 2 ** round(math.log2(num_classes / k) / 2)
    return min(width, 64) if width >= 8 and 4 * k * width <= num_classes else 8 if 32 * k <= num_classes else 0


@functools.cache
def upper_tail(k: int, num_classes: int) -> tuple[float, float]:
    """Of the standard normal distribution, at the quantile that k of num_classes lie above: the quantile itself, and
    how far below it the number of elements above has doubled, taken a little too far."""
    share = min(max(k / num_classes, 1e-7), 1 - 1e-7)
    normal = NormalDist()
    quantile = normal.inv_cdf(1 - share)
    return quantile, 1.2 * math.log(2) * share / normal.pdf(quantile)


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(
    family: str, logits: Tensor, target: Tensor, loss: str, params: list[float], k: int, ignore_index: int,
    compact: bool, first_class: int, all_classes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows, num_classes = logits.shape
    all_classes = count_classes(num_classes, first_class, all_classes)
    if family == "softmax":
        result = logits.new_empty((num_rows,), dtype=torch.float32)
        state = logits.new_empty((num_rows, 3), dtype=torch.float32)
    else:
        result = logits.new_empty((num_rows, 2), dtype=torch.float32)
        state = torch.empty_like(result)
    pick_logit = logits.new_empty((num_rows, k if compact else 1))
    pick_index = torch.empty_like(pick_logit, dtype=torch.int32)
    outputs = result, state, pick_index, pick_logit
    if num_rows == 0:
        return outputs

    value, _, a, b = formulas(loss, params)
    device, z = wing.profile(logits.device), wing.as_matrix(logits)
    how = plan(device, num_rows, num_classes, k, logits.element_size(), target.dim() == 2)
    if target.dim() == 2:
        kind, y = "multi_hot", wing.multi_hot_beside(z, target)
    else:
        kind, y = "index", wing.Matrix(target, 0, target.stride(0))
    threads = device.threads_per_warp * how.warps
    lanes = 16 // logits.element_size() * threads
    rows = z.base, z.phase, z.stride, y.base, y.phase, y.stride, num_classes, ignore_index, first_class, all_classes, k
    functions = {
        "EMIT": select.emit_compact if compact else select.emit_threshold,
        **_FAMILIES[family]["forward"],
        "VALUE": value,
    }
    tiles = {"FAST": device.nvidia, "ROWS": how.rows, "LANES": lanes, "GROUPS": how.emitted * threads}
    if device.nvidia:
        tiles["maxnreg"] = _REGISTERS
    grid = (num_rows,)
    with torch.cuda.device_of(logits):
        if how.width == 0:
            functions |= _TARGETS[kind] | (_HELD if how.held else _WALKED)[kind]
            wing.launch(
                picks.row_kernel, grid, how.warps, *outputs, pick_index.shape[1], *rows, *upper_tail(k, num_classes), a,
                b, **functions, **tiles,
            )  # fmt: skip
        else:
            scratch = _scratch(logits, how, lanes, k)
            blocks = triton.cdiv(num_classes, how.width)
            functions["READ"] = picks.write_maxima
            if how.parts > 1:
                functions["READ"] = picks.maxima_written
                wing.launch(
                    picks.maxima_kernel, (num_rows, how.parts), how.warps, z.base, z.phase, z.stride, num_classes,
                    *scratch, ROWS=how.rows, LANES=lanes, WIDTH=how.width,
                )  # fmt: skip
            wing.launch(
                picks.blocks_kernel, grid, how.warps, *outputs, pick_index.shape[1], *rows, *upper_tail(k + 1, blocks),
                a, b, *scratch, **functions, **tiles, WIDTH=how.width,
            )  # fmt: skip
    return outputs


def _scratch(logits: Tensor, how: Plan, lanes: int, k: int) -> tuple[Tensor, Tensor, int, int]:
    """Memory for block maxima and candidates' logits, winning blocks and candidates' classes; how many blocks and
    candidates.

    The search for winners may stop when there are an eighth too many. Candidates are few more than k unless equal
    logits abound.
    """
    num_rows, num_classes = logits.shape
    tile, vector = how.rows * lanes, 16 // logits.element_size()
    row_maxima = triton.cdiv(num_classes, tile) * (tile // how.width)
    max_blocks = k + 1 + (k + 1) // 8
    capacity = max(2 * k, _FEWEST_CANDIDATES)
    room = capacity // vector * vector + vector
    scratch = logits.new_empty((num_rows * (row_maxima + room),))
    index = logits.new_empty((num_rows * (max_blocks + capacity),), dtype=torch.int32)
    return scratch, index, max_blocks, capacity


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
    """value (rows,), state (rows, 3), pick_index and pick_logit (rows, k | 1)."""
    return _forward("softmax", logits, target, loss, params, k, ignore_index, compact, first_class, all_classes)


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
    """sums (rows, 2), state (rows, 2), pick_index and pick_logit (rows, k | 1)."""
    return _forward("logistic", logits, target, loss, params, k, ignore_index, compact, first_class, all_classes)


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward(
    family: str, grad: Tensor, logits: Tensor | None, target: Tensor, state: Tensor, pick_index: Tensor,
    pick_logit: Tensor, loss: str, params: list[float], k: int, ignore_index: int, num_classes: int, compact: bool,
    first_class: int, all_classes: int | None,
) -> Tensor:  # fmt: skip
    num_rows = state.shape[0]
    all_classes = count_classes(num_classes, first_class, all_classes)
    if logits is None:
        dlogits = pick_logit.new_empty((num_rows, num_classes))
        dz = z = wing.Matrix(dlogits, 0, num_classes)
    else:
        z = wing.as_matrix(logits)
        dlogits, dz = wing.empty_gradient(logits, z)
    if num_rows == 0:
        return dlogits

    _, slope, a, b = formulas(loss, params)
    device = wing.profile(pick_logit.device)
    tile = wing.tile_for(device, num_classes, pick_logit.element_size())
    lanes = 16 // pick_logit.element_size() * device.threads_per_warp * tile.warps
    parts = wing.parts_for(device, num_rows, triton.cdiv(num_classes, tile.rows * lanes))
    gradient = (
        grad, grad.stride(0), grad.stride(-1), state.contiguous(), pick_index.contiguous(), pick_logit.contiguous(),
    )  # fmt: skip
    functions = {**_FAMILIES[family]["backward"], "SLOPE": slope}
    if target.dim() == 2:
        y = wing.multi_hot_beside(z, target)
        functions["POSITIVES"] = scatter.multi_hot_positives
    else:
        y = wing.Matrix(target, 0, target.stride(0))
        functions["POSITIVES"] = scatter.index_positives
    rows = z.base, z.phase, z.stride, y.base, y.phase, y.stride, num_classes, ignore_index, first_class, all_classes
    tiles = {"FAST": device.nvidia, "ROWS": tile.rows, "LANES": lanes}
    with torch.cuda.device_of(pick_logit):
        if compact:
            functions["FILL"] = scatter.multi_hot_fill if target.dim() == 2 else scatter.index_fill
            wing.launch(
                scatter.scatter_kernel, (num_rows, parts), tile.warps, dz.base, dz.phase, dz.stride, *gradient, *rows,
                k, a, b, **functions, **tiles,
            )  # fmt: skip
        else:
            functions["POSITIVE"] = scatter.multi_hot_positive if target.dim() == 2 else scatter.index_positive
            wing.launch(
                scatter.threshold_kernel, (num_rows, parts), tile.warps, dz.base, dz.stride, *gradient, *rows, a, b,
                **functions, **tiles,
            )  # fmt: skip
    return dlogits


def softmax_backward(
    grad: Tensor, logits: Tensor | None, target: Tensor, state: Tensor, pick_index: Tensor, pick_logit: Tensor,
    loss: str, params: list[float], k: int, ignore_index: int, num_classes: int, compact: bool, first_class: int = 0,
    all_classes: int | None = None,
) -> Tensor:  # fmt: skip
    """dlogits (rows, classes) from grad (rows,)."""
    return _backward(
        "softmax", grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes,
        compact, first_class, all_classes,
    )  # fmt: skip


def logistic_backward(
    grad: Tensor, logits: Tensor | None, target: Tensor, state: Tensor, pick_index: Tensor, pick_logit: Tensor,
    loss: str, params: list[float], k: int, ignore_index: int, num_classes: int, compact: bool, first_class: int = 0,
    all_classes: int | None = None,
) -> Tensor:  # fmt: skip
    """dlogits (rows, classes) from grad (rows, 2), by pos and by neg."""
    return _backward(
        "logistic", grad, logits, target, state, pick_index, pick_logit, loss, params, k, ignore_index, num_classes,
        compact, first_class, all_classes,
    )  # fmt: skip
