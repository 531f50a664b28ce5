"""The losses over the k hardest negatives: how their kernels are launched.

The regime of a forward pass follows from classes and k: a short row is held in registers by one warp; a longer one is
searched by reading it again from the caches, or, where k is a small share of the classes, through the maxima of its
blocks, which reads it from memory once. Tables are fixed and were chosen from machine code, instruction counts and what
``bench.speed.launch_tables`` measured on an H200.
"""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..losses import LossSpec
from . import device, emit, finish, logistic, picks, scatter, select, softmax
from .device import Device, Kernel, Tile, Walk
from .formulas import formulas, sum_of_phi
from .gradient import index_positive, multi_hot_positive, of_negatives
from .labels import label_target, labels_here, labels_view
from .rows import index_target, multi_hot_target

_HELD_CLASSES = 2048  # of a row in the registers of one warp
_FEWEST_CANDIDATES = 64

_ONE_CLASS = {"VIEW": select.index_view, "HIDES": select.index_hides}
# By what the targets are. One label per row is left out as a class index is.
_TARGETS = {
    "index": {"TARGET": index_target, "POSITIVES": picks.index_positives, **_ONE_CLASS},
    "multi_hot": {
        "TARGET": multi_hot_target, "POSITIVES": picks.multi_hot_positives, "VIEW": select.multi_hot_view,
        "HIDES": select.hides,
    },
    "label": {"TARGET": label_target, "POSITIVES": picks.index_positives, **_ONE_CLASS},
    "labels": {"TARGET": label_target, "POSITIVES": labels_here, "VIEW": labels_view, "HIDES": select.hides},
}  # fmt: skip
_HELD = {"OPEN": picks.hold, "COUNT": select.count_held}
_WALKED = {
    "index": {"OPEN": picks.walk_index, "COUNT": select.count_walked},
    "multi_hot": {"OPEN": picks.walk_multi_hot, "COUNT": select.count_walked_multi_hot},
    "label": {"OPEN": picks.walk_index, "COUNT": select.count_walked},
    "labels": {"OPEN": picks.walk_index, "COUNT": select.count_walked_labels},
}
_BLOCKS = {"index": select.count_winners, "label": select.count_winners, "labels": select.count_winners_labels}
_LOGITS = {"softmax": softmax.label_logit, "logistic": logistic.label_logit}
_SCATTERED = {
    "index": {"TARGET": index_target, "FILL": scatter.index_fill},
    "multi_hot": {"TARGET": multi_hot_target, "FILL": scatter.multi_hot_fill},
    "labels": {"TARGET": label_target, "FILL": scatter.index_fill},
}
_THRESHOLD = {
    "index": {"TARGET": index_target, "POSITIVE": index_positive},
    "multi_hot": {"TARGET": multi_hot_target, "POSITIVE": multi_hot_positive},
    "labels": {"TARGET": label_target, "POSITIVE": None},
}


# --- launch tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a forward pass finds the picks of a row."""

    tile: Tile  # where elements are read or counted
    held: bool = False  # the row is one tile and stays in registers
    width: int = 0  # logits per block; 0: no blocks, the row is searched as a whole
    listed: int = 0  # candidates that a thread takes at a time
    parts: int = 1  # programs that share the reading of a row


# Of longer rows. Where each multiprocessor has several of them, the others fill the time for which one waits.
_FEW_ROWS, _MANY_ROWS = Tile(8, 4), Tile(4, 8)


def plan(on: Device, num_rows: int, num_classes: int, k: int, itemsize: int, multi_hot: bool) -> Plan:
    if num_classes <= _HELD_CLASSES:
        lanes = Tile(1, 1).lanes(on, itemsize)
        return Plan(Tile(1, max(1, triton.next_power_of_2(num_classes) // lanes)), held=True)
    tile = _MANY_ROWS if num_rows > 2 * on.multiprocessors else _FEW_ROWS
    width = 0 if multi_hot else block_width(num_classes, k)
    if width == 0:
        return Plan(tile)
    tiles = num_classes // tile.classes(on, itemsize)
    few = 2 * num_rows <= on.multiprocessors
    parts = min(triton.cdiv(2 * on.multiprocessors, num_rows), tiles // 2) if few else 1
    each = triton.next_power_of_2(triton.cdiv(capacity_of(k), tile.threads(on)))
    return Plan(tile, width=width, listed=min(max(2, each), 16 // itemsize), parts=max(1, parts))


def capacity_of(k: int) -> int:
    """Room for candidates, which are few more than k unless equal logits abound."""
    return max(2 * k, _FEWEST_CANDIDATES)


def block_width(num_classes: int, k: int) -> int:
    """Logits per block, 0 where blocks do not pay.

    The maxima of C / width blocks are searched and listed, then the logits of k winners are ranked, at about the same
    cost each, which is smallest where both are equal; narrow blocks would save little, wide ones read too much again.
    """
    width = 2 ** round(math.log2(num_classes / k) / 2)
    return min(width, 64) if width >= 8 and 4 * k * width <= num_classes else 8 if 32 * k <= num_classes else 0


@functools.lru_cache
def upper_tail(k: int, num_classes: int) -> tuple[float, float]:
    """Of the standard normal distribution, at the quantile that k of num_classes lie above: the quantile itself, and
    how far below it the number of elements above has doubled, taken a little too far."""
    share = min(max(k / num_classes, 1e-7), 1 - 1e-7)
    normal = NormalDist()
    quantile = normal.inv_cdf(1 - share)
    return quantile, 1.2 * math.log(2) * share / normal.pdf(quantile)


# --- forward ----------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    """The kernel that has a row, the one that reads parts of rows in front of it; and the numbers that they take."""

    rows: Kernel
    maxima: Kernel
    a: float
    b: float
    p: float
    q: float


@functools.lru_cache
def _forward(spec: LossSpec, kind: str, finished: bool, how: Plan, on: Device, itemsize: int) -> Forward:
    if spec.family == "softmax":
        of_tile, parameters, a, b, smooth = softmax.sum_of_shares, softmax.below_top, 0.0, 0.0, softmax.below
    else:
        _, _, a, b = formulas(spec.loss, spec.params)
        of_tile, parameters, smooth = sum_of_phi(spec.loss, spec.params), logistic.hyper_parameters, logistic.itself
    ending = finish.ending(spec, kind == "multi_hot", finished)
    functions = {
        "EMIT": emit.emit_compact if spec.compact else emit.emit_threshold, "SUM": of_tile,
        "SMOOTH": smooth if spec.label_smoothing else None, "PARAMETERS": parameters,
        "SEEN": picks.seen_of_labels if spec.labels else picks.seen_with_positives,
        "LOGIT": _LOGITS[spec.family] if spec.labels else None, **ending.functions, **_TARGETS[kind],
    }  # fmt: skip
    shape = {"ROWS": how.tile.rows, "LANES": how.tile.lanes(on, itemsize)}
    functions |= {"FAST": on.nvidia, **shape}
    spills = how.held and kind == "multi_hot"  # at 128 registers, in its loops, as some compilers do it
    functions |= device.limited_registers(on.nvidia and not spills)
    maxima = Kernel(picks.maxima_kernel, how.tile.warps, FAST=on.nvidia, **shape, WIDTH=how.width)
    if how.width == 0:
        summed = 1 if how.held else min(2, how.tile.rows)
        of_row = _HELD if how.held else _WALKED[kind]
        rows = Kernel(picks.row_kernel, how.tile.warps, **functions, **of_row, SUMMED=summed)
    else:
        read = picks.maxima_written if how.parts > 1 else picks.write_maxima
        blocks = {"READ": read, "COUNT": _BLOCKS[kind], "WIDTH": how.width, "LISTED": how.listed}
        rows = Kernel(picks.blocks_kernel, how.tile.warps, **functions, **blocks)
    return Forward(rows, maxima, a, b, ending.p, ending.q)


def forward(
    logits: Tensor, target: Tensor, spec: LossSpec, kept: tuple[Tensor, Tensor],
    outputs: tuple[Tensor | None, Tensor | None, Tensor],
) -> None:  # fmt: skip
    """kept: the picks, filled as well. outputs: loss and coefficients, unless another kernel fills these, and
    statistics."""
    num_rows, num_classes = logits.shape
    on, itemsize, k = device.profile(logits.device), logits.element_size(), spec.k
    z = device.as_matrix(logits)
    kind = device.kind_of(target, spec)
    how = plan(on, num_rows, num_classes, k, itemsize, kind == "multi_hot")
    most_labels = target.shape[1] if spec.labels else 1
    if spec.labels and most_labels == 1:
        kind = "label"
    of = _forward(spec, kind, outputs[0] is not None, how, on, itemsize)
    matrix = *z, num_classes
    rows = *outputs, *kept, spec.slots, k, *matrix, *device.labels_beside(z, target, spec)
    numbers = of.a, of.b, of.p, of.q
    if how.width == 0:
        device.launch(of.rows, (num_rows,), *rows, *upper_tail(k, num_classes), *numbers)
        return
    scratch = _scratch(logits, how, how.tile.classes(on, itemsize), k, most_labels)
    if how.parts > 1:
        device.launch(of.maxima, (num_rows, how.parts), *matrix, *scratch)
    blocks = triton.cdiv(num_classes, how.width)
    device.launch(of.rows, (num_rows,), *rows, *scratch, *upper_tail(k + most_labels, blocks), *numbers)


def _scratch(logits: Tensor, how: Plan, tile: int, k: int, most_labels: int) -> tuple[Tensor, Tensor, int, int]:
    """Memory for block maxima and candidates' logits, winning blocks and candidates' classes; how many blocks and
    candidates.

    The search for winners may stop when there are an eighth too many.
    """
    num_rows, num_classes = logits.shape
    vector = 16 // logits.element_size()
    assert tile // how.width % vector == 0, "the maxima of a tile fill vectors"
    row_maxima = triton.cdiv(num_classes, tile) * (tile // how.width)
    max_blocks = k + most_labels + (k + most_labels) // 8
    capacity = capacity_of(k)
    room = capacity // vector * vector + vector
    scratch = logits.new_empty((num_rows * (row_maxima + room),))
    index = scratch.new_empty((num_rows * (max_blocks + capacity),), dtype=torch.int32)
    return scratch, index, max_blocks, capacity


# --- backward ---------------------------------------------------------------------------------------------------------


@functools.lru_cache
def _backward(spec: LossSpec, kind: str, walk: Walk, itemsize: int) -> tuple[Kernel, float, float]:
    functions, a, b = of_negatives(spec, itemsize)
    if spec.compact:
        kernel, of_kind = scatter.scatter_kernel, _SCATTERED[kind]
    else:
        kernel, of_kind = scatter.threshold_kernel, _THRESHOLD[kind]
    return Kernel(kernel, walk.warps, **functions, **of_kind, **walk.constants()), a, b


def backward(
    upstream: tuple,
    logits: Tensor | None,
    target: Tensor,
    kept: tuple[Tensor, Tensor],
    num_classes: int,
    spec: LossSpec,
    in_place: bool,
) -> Tensor:
    """dlogits (rows, classes) from kept, the picks. upstream: see ``gradient.upstream``. in_place: the logits
    themselves, written over."""
    pick_index, pick_logit = (part.contiguous() for part in kept)
    num_rows = pick_logit.shape[0]
    if logits is None:
        dlogits = pick_logit.new_empty((num_rows, num_classes))
        dz = z = device.Matrix(dlogits, 0, num_classes)
    else:
        z = device.as_matrix(logits)
        dlogits, dz = (logits, z) if in_place else device.empty_gradient(logits, z)
    if num_rows == 0:
        return dlogits

    small = spec.compact or device.are_many(pick_logit)
    walk = device.walk_of(pick_logit, num_classes, small, merged=False)
    kernel, a, b = _backward(spec, device.kind_of(target, spec), walk, dlogits.element_size())
    labels = *z, num_classes, *device.labels_beside(z, target, spec), a, b
    grid = num_rows, walk.parts
    if spec.compact:
        device.launch(kernel, grid, *dz, *upstream, pick_index, pick_logit, spec.k, *labels)
    else:
        device.launch(kernel, grid, dz.base, dz.stride, *upstream, pick_index, pick_logit, *labels)
    return dlogits
