"""The losses over the k hardest negatives, backward: one launch that writes every element of the gradient once.

``scatter_kernel`` (compact form) fills the row and then writes the picks' gradients into it; no logit is read.
``threshold_kernel`` walks the logits again and asks of each whether it is a pick.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .formulas import sigmoid
from .gradient import fill, fill_of_row, filled_here, of_negative, write_labels
from .rows import (
    SIZES,
    Labels,
    is_positive,
    load_tile,
    open_row,
    part_of,
    rim_positions,
    same_classes,
    store_rim,
    store_tile,
    tile_lanes,
)

_SIZES = (*SIZES, "k")


# --- the compact form -------------------------------------------------------------------------------------------------


@triton.jit
def index_fill(row, target, positions, inside, scale, FAST: tl.constexpr):
    """What stands in the gradient before the picks are written."""
    return tl.full(positions.shape, 0.0, tl.float32)


@triton.jit
def multi_hot_fill(row, target, positions, inside, scale, FAST: tl.constexpr):
    positive = is_positive(target, positions, inside)
    z = tl.load(row.ptr + positions, mask=positive, other=0.0).to(tl.float32)
    return tl.where(positive, scale.t * sigmoid(-z, FAST), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def scatter_kernel(
    dlogits_ptr, dlogits_phase, dlogits_stride,  # (rows, classes)
    grad_ptr, grad_stride,  # (rows,) or, with stride 0, ()
    coefficients_ptr, statistics_ptr,  # (rows, 2 | 2 + labels), (rows, 3 | 4 | 3 + labels)
    pick_index_ptr, pick_logit_ptr, k,  # (rows, k)
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes), read at multi-hot positives only
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    a, b,
    TARGET: tl.constexpr, FILL: tl.constexpr, SCALE: tl.constexpr, PARAMETERS: tl.constexpr, NEGATIVE: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row. It writes the picks whose classes it has filled itself, so a barrier orders the
    two."""
    VECTOR: tl.constexpr = 128 // dlogits_ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    element = dlogits_ptr.dtype.element_ty
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, VECTOR)
    scale = SCALE(grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, number, num_labels, a, b, PARAMETERS)
    drow = open_row(dlogits_ptr, dlogits_phase, number, dlogits_stride, num_classes)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    value, filled = fill_of_row(target, scale)
    value = tl.where(filled, value, 0.0)
    first, behind = part_of(drow, TILE)
    for tile in range(first, behind):
        positions = tile * TILE + tile_lanes(ROWS, LANES)
        in_tile = FILL(row, target, positions, positions < drow.body, scale, FAST)
        store_tile(drow, tile, tl.where(filled, value, in_tile), ROWS, LANES)
    rim, inside = rim_positions(drow)
    in_rim = FILL(row, target, rim, inside, scale, FAST)
    store_rim(drow, rim, tl.where(filled, value, in_rim), inside)

    if num_labels is not None:
        if ~filled:
            write_labels(drow, target, scale, TILE)
        tl.debug_barrier()
    else:
        tl.debug_barrier()
        position = target.column - drow.head
        has_target = (target.column >= 0) & filled_here(position, drow, TILE) & ~filled
        tl.store(drow.ptr + position, scale.t.to(element), mask=has_target)
    for start in range(0, tl.where(filled, 0, k), LANES):
        slot = start + tl.arange(0, LANES)
        classes = tl.load(pick_index_ptr + number * k + slot, mask=slot < k, other=-1)
        z = tl.load(pick_logit_ptr + number * k + slot, mask=slot < k, other=float("-inf")).to(tl.float32)
        here = (classes >= 0) & (classes < num_classes) & filled_here(classes - drow.head, drow, TILE)
        values = of_negative(z, scale, NEGATIVE, FAST)
        tl.store(drow.ptr + (classes - drow.head), values.to(element), mask=here)


# --- the threshold form -----------------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """The last of a row's picks."""

    value: tl.tensor
    last: tl.tensor  # its position


@triton.jit
def picked(x, positions, edge):
    """Whether elements are picks: of those equal to the edge, the first ones."""
    return (x > edge.value) | ((x == edge.value) & (positions <= edge.last))


@triton.jit
def _gradient(
    z, row, target, positions, inside, scale, edge, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    if POSITIVE is None:
        values = tl.where(picked(z, positions, edge), of_negative(z, scale, NEGATIVE, FAST), 0.0)
    else:
        positive, gradient = POSITIVE(z, row, target, positions, inside, scale, FAST)
        of_pick = tl.where(picked(z, positions, edge), of_negative(z, scale, NEGATIVE, FAST), 0.0)
        values = tl.where(positive, gradient, of_pick)
    return values


@triton.jit(do_not_specialize=_SIZES)
def threshold_kernel(
    dlogits_ptr, dlogits_stride,  # (rows, classes), of the logits' phase
    grad_ptr, grad_stride,  # (rows,) or, with stride 0, ()
    coefficients_ptr, statistics_ptr,  # (rows, 2 | 2 + labels), (rows, 3 | 4 | 3 + labels)
    pick_index_ptr, pick_logit_ptr,  # (rows, 1)
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes)
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    a, b,
    TARGET: tl.constexpr, POSITIVE: tl.constexpr, SCALE: tl.constexpr, PARAMETERS: tl.constexpr,
    NEGATIVE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, VECTOR)
    scale = SCALE(grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, number, num_labels, a, b, PARAMETERS)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    drow = same_classes(open_row(dlogits_ptr, phase, number, dlogits_stride, num_classes), row)
    last_class = tl.load(pick_index_ptr + number)
    value = tl.load(pick_logit_ptr + number).to(tl.float32)
    edge = Edge(tl.where(last_class < 0, float("nan"), value), last_class - row.head)  # nothing lies above NaN
    value, filled = fill_of_row(target, scale)
    if filled:
        fill(drow, value, ROWS, LANES)
    else:
        first, behind = part_of(row, TILE)
        for tile in range(first, behind):
            positions = tile * TILE + tile_lanes(ROWS, LANES)
            z = load_tile(row, tile, ROWS, LANES)
            values = _gradient(
                z, row, target, positions, positions < row.body, scale, edge, POSITIVE, NEGATIVE, FAST
            )  # fmt: skip
            store_tile(drow, tile, values, ROWS, LANES)
        rim, inside = rim_positions(row)
        z = tl.load(row.ptr + rim, mask=inside, other=0.0).to(tl.float32)
        values = _gradient(z, row, target, rim, inside, scale, edge, POSITIVE, NEGATIVE, FAST)
        store_rim(drow, rim, values, inside)
        if num_labels is not None:
            write_labels(drow, target, scale, TILE)
