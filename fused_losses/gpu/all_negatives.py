"""The losses over all negatives: one pass over the logits that gives the statistics, one more that writes the gradient,
in a launch of its own or, where the upstream gradient is known, in the same one.

What differs between families and kinds of targets stands in jitted functions, which the kernels take as constexpr:

    TARGET(labels, row, num_classes, VECTOR) -> Target
    WALK(row, target, a, b, SUM, FAST, ROWS, LANES) -> four numbers of this program's part of a row
    MERGE(four numbers of the parts, (PARTS,) each) -> those of the row
    STATISTICS(four numbers) -> statistics
    WRITE(drow, row, target, scale, NEGATIVE, FAST, ROWS, LANES)
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..losses import LossSpec
from . import device, finish, logistic, softmax
from .device import Kernel, Walk
from .finish import Outputs, end_row
from .formulas import formulas, sum_of_phi
from .gradient import (
    fill,
    fill_of_row,
    index_positive,
    multi_hot_positive,
    of_negative,
    of_negatives,
    write_labels,
)
from .labels import label_target, with_label_logits, write_label_logits
from .rows import (
    SIZES,
    Labels,
    index_target,
    last_tile,
    load_tile,
    multi_hot_target,
    only_if,
    open_row,
    part_of,
    rim_positions,
    same_classes,
    store_rim,
    store_tile,
    tile_lanes,
)

# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    loss_ptr, coefficients_ptr, statistics_ptr,  # see Outputs
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes)
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    a, b, p, q,
    TARGET: tl.constexpr, WALK: tl.constexpr, LOGIT: tl.constexpr, STATISTICS: tl.constexpr, SUM: tl.constexpr,
    FINISH: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """One program, one row."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, VECTOR)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    seen = WALK(only_if(~(target.ignored | target.bad), row), target, a, b, SUM, FAST, ROWS, LANES)
    outputs = Outputs(loss_ptr, coefficients_ptr, statistics_ptr, num_labels)
    statistics = STATISTICS(*seen)
    if num_labels is not None:
        statistics = with_label_logits(statistics_ptr, number, row, target, statistics, LOGIT)
    end_row(outputs, number, target, statistics, p, q, FINISH, VALUE, SLOPE)


@triton.jit(do_not_specialize=SIZES)
def part_kernel(
    parts_ptr,  # (rows, parts, 4)
    statistics_ptr,  # (rows, 3 + labels), or None
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes)
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    a, b,
    TARGET: tl.constexpr, WALK: tl.constexpr, LOGIT: tl.constexpr, SUM: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row: for rows too few to fill the device."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, VECTOR)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    seen = WALK(only_if(~(target.ignored | target.bad), row), target, a, b, SUM, FAST, ROWS, LANES)
    if num_labels is not None:
        poison = write_label_logits(statistics_ptr, number, row, target, LOGIT)
        seen = seen[0], seen[1] + poison, seen[2], seen[3]
    slot = (number * tl.num_programs(1) + tl.program_id(1)) * 4
    for i in tl.static_range(4):
        tl.store(parts_ptr + slot + i, seen[i])


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    loss_ptr, coefficients_ptr, statistics_ptr,  # see Outputs
    parts_ptr, parts,  # (rows, parts, 4)
    num_classes,
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    p, q,
    TARGET: tl.constexpr, MERGE: tl.constexpr, STATISTICS: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr,
    SLOPE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program, one row: its parts in a fixed order, so that the result does not depend on who came first."""
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, 1)
    part = tl.arange(0, PARTS)
    slot = parts_ptr + (number * parts + part) * 4
    tops = tl.load(slot, mask=part < parts, other=float("-inf"))
    totals = tl.load(slot + 1, mask=part < parts, other=0.0)
    thirds = tl.load(slot + 2, mask=part < parts, other=0.0)
    counts = tl.load(slot + 3, mask=part < parts, other=0.0)
    seen = MERGE(tops, totals, thirds, counts)
    outputs = Outputs(loss_ptr, coefficients_ptr, statistics_ptr, num_labels)
    end_row(outputs, number, target, STATISTICS(*seen), p, q, FINISH, VALUE, SLOPE)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def write_index(
    drow, row, target, scale, NEGATIVE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a gradient row. One tile holds the target: it comes last, so that the loop tests no
    positions. drow's body has the same classes as row's."""
    TILE: tl.constexpr = ROWS * LANES
    first, behind = part_of(row, TILE)
    last = last_tile(first, behind, target.column - row.head, TILE)
    for i in range(first, behind - 1):
        tile = i + (i >= last).to(tl.int32)
        z = load_tile(row, tile, ROWS, LANES)
        store_tile(drow, tile, of_negative(z, scale, NEGATIVE, FAST), ROWS, LANES)
    z = load_tile(row, last, ROWS, LANES)
    positions = last * TILE + tile_lanes(ROWS, LANES)
    values = _gradient(z, row, target, positions, positions >= 0, scale, index_positive, NEGATIVE, FAST)
    store_tile(drow, last, values, ROWS, LANES)
    _write_rim(drow, row, target, scale, index_positive, NEGATIVE, FAST)


@triton.jit
def write_multi_hot(
    drow, row, target, scale, NEGATIVE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    TILE: tl.constexpr = ROWS * LANES
    first, behind = part_of(row, TILE)
    for tile in range(first, behind):
        z = load_tile(row, tile, ROWS, LANES)
        positions = tile * TILE + tile_lanes(ROWS, LANES)
        values = _gradient(z, row, target, positions, positions < row.body, scale, multi_hot_positive, NEGATIVE, FAST)
        store_tile(drow, tile, values, ROWS, LANES)
    _write_rim(drow, row, target, scale, multi_hot_positive, NEGATIVE, FAST)


@triton.jit
def write_around_labels(
    drow, row, target, scale, NEGATIVE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """All classes as negatives, then the labels over these: the loop tests no positions."""
    first, behind = part_of(row, ROWS * LANES)
    for tile in range(first, behind):
        z = load_tile(row, tile, ROWS, LANES)
        store_tile(drow, tile, of_negative(z, scale, NEGATIVE, FAST), ROWS, LANES)
    _write_rim(drow, row, target, scale, None, NEGATIVE, FAST)
    write_labels(drow, target, scale, ROWS * LANES)


@triton.jit
def _gradient(
    z, row, target, positions, inside, scale, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    if POSITIVE is None:
        values = of_negative(z, scale, NEGATIVE, FAST)
    else:
        positive, gradient = POSITIVE(z, row, target, positions, inside, scale, FAST)
        values = tl.where(positive, gradient, of_negative(z, scale, NEGATIVE, FAST))
    return values


@triton.jit
def _write_rim(drow, row, target, scale, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, FAST: tl.constexpr):
    rim, inside = rim_positions(row)
    z = tl.load(row.ptr + rim, mask=inside, other=0.0).to(tl.float32)
    values = _gradient(z, row, target, rim, inside, scale, POSITIVE, NEGATIVE, FAST)
    store_rim(drow, rim, values, inside)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dlogits_ptr, dlogits_stride,  # (rows, classes), of the logits' phase
    grad_ptr, grad_stride,  # (rows,) or, with stride 0, ()
    coefficients_ptr, statistics_ptr,  # (rows, 2 | 2 + labels), (rows, 3 | 4 | 3 + labels)
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes)
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    a, b,
    TARGET: tl.constexpr, SCALE: tl.constexpr, PARAMETERS: tl.constexpr, NEGATIVE: tl.constexpr, WRITE: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, VECTOR)
    scale = SCALE(grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, number, num_labels, a, b, PARAMETERS)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    drow = same_classes(open_row(dlogits_ptr, phase, number, dlogits_stride, num_classes), row)
    _write_row(drow, row, target, scale, NEGATIVE, WRITE, FAST, ROWS, LANES)


@triton.jit
def _write_row(
    drow, row, target, scale, NEGATIVE: tl.constexpr, WRITE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    value, filled = fill_of_row(target, scale)
    if filled:
        fill(drow, value, ROWS, LANES)
    else:
        WRITE(drow, row, target, scale, NEGATIVE, FAST, ROWS, LANES)


# --- both -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def at_once_kernel(
    loss_ptr, coefficients_ptr, statistics_ptr,  # see Outputs
    grad_ptr, grad_stride,  # (rows,)
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes), and the gradient afterwards
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    a, b, p, q,
    TARGET: tl.constexpr, WALK: tl.constexpr, STATISTICS: tl.constexpr, SUM: tl.constexpr, FINISH: tl.constexpr,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, PARAMETERS: tl.constexpr, NEGATIVE: tl.constexpr,
    WRITE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one row: what is read again of it may still be in the second cache."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, VECTOR)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    seen = WALK(only_if(~(target.ignored | target.bad), row), target, a, b, SUM, FAST, ROWS, LANES)
    outputs = Outputs(loss_ptr, coefficients_ptr, statistics_ptr, num_labels)
    end_row(outputs, number, target, STATISTICS(*seen), p, q, FINISH, VALUE, SLOPE)
    tl.debug_barrier()  # the row's numbers are written before they are read, and its logits read before written over
    scale = SCALE(grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, number, num_labels, a, b, PARAMETERS)
    _write_row(row, row, target, scale, NEGATIVE, WRITE, FAST, ROWS, LANES)


# --- launches ---------------------------------------------------------------------------------------------------------

# By family and what the targets are.
_WALKS = {
    ("softmax", "index"): softmax.walk,
    ("softmax", "labels"): softmax.walk_labels,
    ("softmax", "labels, smoothed"): softmax.walk_labels_smoothed,
    ("logistic", "index"): logistic.walk_index,
    ("logistic", "multi_hot"): logistic.walk_multi_hot,
    ("logistic", "labels"): logistic.walk_labels,
    ("logistic", "labels, smoothed"): logistic.walk_labels_smoothed,
}
# Registers of a thread at most, by family or loss: the assembler would take a few more, and leave room for fewer warps.
_REGISTERS = {("softmax", "labels"): 64, ("logistic", "labels"): 128, ("lr", "index"): 64}
_MERGES = {
    ("softmax", "index"): softmax.merge,
    ("softmax", "labels"): softmax.merge_labels,
    ("logistic", "index"): logistic.merge,
    ("logistic", "multi_hot"): logistic.merge,
    ("logistic", "labels"): logistic.merge,
}
_LOGITS = {"softmax": softmax.label_logit, "logistic": logistic.label_logit}
_TARGETS = {"index": index_target, "multi_hot": multi_hot_target, "labels": label_target}
_WRITES = {"index": write_index, "multi_hot": write_multi_hot, "labels": write_around_labels}


class Forward(NamedTuple):
    """The kernel of whole rows, and those of their parts; and the numbers that these take."""

    rows: Kernel
    parts: Kernel
    merge: Kernel
    a: float
    b: float
    p: float
    q: float


def _reading(spec: LossSpec, kind: str, walk: Walk) -> tuple[dict[str, object], float, float]:
    """What the walk over a row takes, a and b."""
    total, a, b = None, 0.0, 0.0
    if spec.family == "logistic":
        _, _, a, b = formulas(spec.loss, spec.params)
        total = sum_of_phi(spec.loss, spec.params)
    smoothed = ", smoothed" if spec.label_smoothing else ""
    walked = {
        "TARGET": _TARGETS[kind], "WALK": _WALKS[spec.family, kind + smoothed], "SUM": total, **walk.constants(),
    }  # fmt: skip
    return walked, a, b


@functools.lru_cache  # hyper-parameters may change at every step
def _forward(spec: LossSpec, kind: str, finished: bool, walk: Walk) -> Forward:
    walked, a, b = _reading(spec, kind, walk)
    walked["LOGIT"] = _LOGITS[spec.family] if spec.labels else None
    most = _REGISTERS.get((spec.loss, kind), _REGISTERS.get((spec.family, kind)))
    if most is not None:
        walked |= device.limited_registers(walk.fast, most)
    ending = finish.ending(spec, kind == "multi_hot", finished)
    merged = {"TARGET": walked["TARGET"], "MERGE": _MERGES[spec.family, kind], **ending.functions}
    return Forward(
        Kernel(forward_kernel, walk.warps, **walked, **ending.functions),
        Kernel(part_kernel, walk.warps, **walked),
        Kernel(merge_kernel, 1, **merged, PARTS=triton.next_power_of_2(walk.parts)),
        a, b, ending.p, ending.q,
    )  # fmt: skip


def forward(
    logits: Tensor, target: Tensor, spec: LossSpec, outputs: tuple[Tensor | None, Tensor | None, Tensor]
) -> None:
    """outputs: loss and coefficients, unless another kernel fills these, and statistics."""
    num_rows, num_classes = logits.shape
    kind = device.kind_of(target, spec)
    z = device.as_matrix(logits)
    walk = device.walk_of(logits, num_classes, small=device.are_many(logits), halved=kind == "multi_hot")
    labels = device.labels_beside(z, target, spec)
    of = _forward(spec, kind, outputs[0] is not None, walk)
    if walk.parts == 1:
        device.launch(of.rows, (num_rows,), *outputs, *z, num_classes, *labels, of.a, of.b, of.p, of.q)
        return
    parts = logits.new_empty((num_rows, walk.parts, 4), dtype=torch.float32)
    beside = outputs[2] if spec.labels else None
    device.launch(of.parts, (num_rows, walk.parts), parts, beside, *z, num_classes, *labels, of.a, of.b)
    device.launch(of.merge, (num_rows,), *outputs, parts, walk.parts, num_classes, *labels, of.p, of.q)


def _writing(spec: LossSpec, kind: str, walk: Walk, itemsize: int) -> tuple[dict[str, object], float, float]:
    """What the writing of a gradient row takes, a and b."""
    functions, a, b = of_negatives(spec, itemsize)
    return {"TARGET": _TARGETS[kind], "WRITE": _WRITES[kind], **functions, **walk.constants()}, a, b


@functools.lru_cache
def _backward(spec: LossSpec, kind: str, walk: Walk, itemsize: int) -> tuple[Kernel, float, float]:
    written, a, b = _writing(spec, kind, walk, itemsize)
    if (spec.loss, *spec.params, kind, itemsize) == ("ss_lr", 2.0, "index", 2):  # other exponents need more
        written |= device.limited_registers(walk.fast, 64)
    return Kernel(backward_kernel, walk.warps, **written), a, b


def backward(upstream: tuple, logits: Tensor, target: Tensor, spec: LossSpec, in_place: bool) -> Tensor:
    """dlogits (rows, classes). upstream: see ``gradient.upstream``. in_place: the logits themselves, written over."""
    num_rows, num_classes = logits.shape
    z = device.as_matrix(logits)
    dlogits, dz = (logits, z) if in_place else device.empty_gradient(logits, z)
    if num_rows == 0:
        return dlogits
    walk = device.walk_of(logits, num_classes, small=False, merged=False)
    kernel, a, b = _backward(spec, device.kind_of(target, spec), walk, dlogits.element_size())
    labels = device.labels_beside(z, target, spec)
    device.launch(kernel, (num_rows, walk.parts), dz.base, dz.stride, *upstream, *z, num_classes, *labels, a, b)
    return dlogits


@functools.lru_cache
def _at_once(spec: LossSpec, walk: Walk, itemsize: int) -> tuple[Kernel, tuple[float, ...]]:
    """Two loops need more registers than one, and of fewer rows under way more stay in the cache."""
    read, a, b = _reading(spec, "index", walk)
    written, _, _ = _writing(spec, "index", walk, itemsize)
    ending = finish.ending(spec, False, finished=True)
    functions = read | written | ending.functions
    if spec.loss == "ss_lr":  # the assembler would take a few more, and leave room for one program of eight warps
        functions |= device.limited_registers(walk.fast)
    return Kernel(at_once_kernel, walk.warps, **functions), (a, b, ending.p, ending.q)


def _walk_at_once(logits: Tensor) -> Walk:
    return device.walk_of(logits, logits.shape[1], small=False)


def are_whole(logits: Tensor) -> bool:
    """Whether each row is one program's: there are enough to fill the device."""
    return logits.shape[0] > 0 and _walk_at_once(logits).parts == 1


def at_once_(
    grad: Tensor, logits: Tensor, target: Tensor, spec: LossSpec, outputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Class indices, whole rows: fills outputs, loss, coefficients and statistics, and writes over the logits the
    gradient for these upstream gradients (rows,)."""
    num_rows, num_classes = logits.shape
    z = device.as_matrix(logits)
    kernel, numbers = _at_once(spec, _walk_at_once(logits), logits.element_size())
    labels = device.labels_beside(z, target, spec)
    device.launch(kernel, (num_rows,), *outputs, grad, grad.stride(0), *z, num_classes, *labels, *numbers)
