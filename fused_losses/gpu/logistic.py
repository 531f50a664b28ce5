"""The logistic losses over a row: sums of phi over the negatives, and of softplus(-z) over the positives of a multi-hot
target, in one pass. Nothing here knows which phi it is."""

import triton
import triton.language as tl

from .formulas import softplus, sum_of_softplus
from .labels import walk_around_labels
from .rows import is_positive, last_tile, load_tile, logit_of_target, part_of, rim_positions, tile_lanes
from .sums import add, fold, sum_of

_INF = tl.constexpr(float("inf"))

# Padding and positives enter the sums of phi as -inf, where every phi is 0.


@triton.jit
def _sum_of_rim(z, a, b, SUM: tl.constexpr, FAST: tl.constexpr):
    """Two vectors, of which no thread need have neighbours."""
    return tl.sum(SUM(z[None, :], a, b, FAST, 1), axis=0)


@triton.jit
def walk_index(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a row -> (maximum of the negatives, neg, z_y, 0)"""
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    first, behind = part_of(row, TILE)
    position = target.column - row.head
    last = last_tile(first, behind, position, TILE)

    tops = tl.full((LANES,), -_INF, tl.float32)
    sums = tl.zeros((LANES // VECTOR,), tl.float32)
    rest = sums
    for i in range(first, behind - 1):
        z = load_tile(row, i + (i >= last).to(tl.int32), ROWS, LANES)
        tops = tl.maximum(tops, tl.max(z, axis=0))
        sums, rest = add(sums, rest, SUM(z, a, b, FAST, VECTOR))
    z = load_tile(row, last, ROWS, LANES)
    z = tl.where(tile_lanes(ROWS, LANES) == position - last * TILE, -_INF, z)
    tops = tl.maximum(tops, tl.max(z, axis=0))
    sums, rest = add(sums, rest, SUM(z, a, b, FAST, VECTOR))

    rim, inside = rim_positions(row)
    z = tl.load(row.ptr + rim, mask=inside & (rim != position), other=-_INF).to(tl.float32)
    top = tl.maximum(tl.max(tops, axis=0), tl.max(z, axis=0))
    neg = sum_of(sums, rest) + _sum_of_rim(z, a, b, SUM, FAST)
    alone = tl.program_id(1) == 0
    return top, neg, tl.where(alone, logit_of_target(row, target, alone), 0.0), 0.0


@triton.jit
def walk_multi_hot(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a row -> (maximum of the negatives, neg, pos, number of positives)"""
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    first, behind = part_of(row, TILE)
    tops = tl.full((LANES,), -_INF, tl.float32)
    zeros = tl.zeros((LANES // VECTOR,), tl.float32)
    pos, pos_rest, neg, neg_rest, count = zeros, zeros, zeros, zeros, zeros
    for tile in range(first, behind):
        z = load_tile(row, tile, ROWS, LANES)
        positions = tile * TILE + tile_lanes(ROWS, LANES)
        positive = is_positive(target, positions, positions < row.body)
        pos, pos_rest = add(pos, pos_rest, sum_of_softplus(tl.where(positive, -z, -_INF), FAST, VECTOR))
        tops = tl.maximum(tops, tl.max(tl.where(positive, -_INF, z), axis=0))
        neg, neg_rest = add(neg, neg_rest, SUM(tl.where(positive, -_INF, z), a, b, FAST, VECTOR))
        count += fold(positive.to(tl.float32), VECTOR)

    rim, inside = rim_positions(row)
    z = tl.load(row.ptr + rim, mask=inside, other=-_INF).to(tl.float32)
    positive = is_positive(target, rim, inside)
    of_rim = tl.sum(tl.where(positive, softplus(-z, FAST), 0.0), axis=0)
    z = tl.where(positive, -_INF, z)
    return (
        tl.maximum(tl.max(tops, axis=0), tl.max(z, axis=0)),
        sum_of(neg, neg_rest) + _sum_of_rim(z, a, b, SUM, FAST),
        sum_of(pos, pos_rest) + of_rim,
        tl.sum(count, axis=0) + tl.sum(positive.to(tl.float32), axis=0),
    )


@triton.jit
def merge(tops, neg, third, count):
    """The same for the row from its parts, (PARTS,) each."""
    return tl.max(tops, axis=0), tl.sum(neg, axis=0), tl.sum(third, axis=0), tl.sum(count, axis=0)


@triton.jit
def index_statistics(top, neg, z_y, none):
    """-> (m, neg, z_y)"""
    return top, neg, z_y


@triton.jit
def multi_hot_statistics(top, neg, pos, count):
    """-> (m, neg, pos, positives)"""
    return top, neg, pos, count.to(tl.float32)


# --- several labels ---------------------------------------------------------------------------------------------------


@triton.jit
def walk_labels(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a row -> (maximum of the negatives, neg, 0, 0)"""
    return walk_around_labels(row, target, a, b, SUM, FAST, _start, _step, _end, ROWS, LANES)


@triton.jit
def walk_labels_smoothed(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a row -> (maximum of the negatives, neg, sum of z, 0)"""
    return walk_around_labels(
        row, target, a, b, SUM, FAST, _start_smoothed, _step_smoothed, _end_smoothed, ROWS, LANES
    )  # fmt: skip


@triton.jit
def _start(LANES: tl.constexpr, VECTOR: tl.constexpr):
    zeros = tl.zeros((LANES // VECTOR,), tl.float32)
    return tl.full((LANES,), -_INF, tl.float32), zeros, zeros


@triton.jit
def _step(state, z, a, b, SUM: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr):
    tops, sums, rest = state
    sums, rest = add(sums, rest, SUM(z, a, b, FAST, VECTOR))
    return tl.maximum(tops, tl.max(z, axis=0)), sums, rest


@triton.jit
def _end(state, rim, inside, number, a, b, SUM: tl.constexpr, FAST: tl.constexpr):
    tops, sums, rest = state
    top = tl.maximum(tl.max(tops, axis=0), tl.max(rim, axis=0))
    return top, sum_of(sums, rest) + _sum_of_rim(rim, a, b, SUM, FAST), 0.0, 0.0


@triton.jit
def _start_smoothed(LANES: tl.constexpr, VECTOR: tl.constexpr):
    tops, zeros, _ = _start(LANES, VECTOR)
    return tops, zeros, zeros, zeros, zeros, tl.zeros((LANES // VECTOR,), tl.int32)


@triton.jit
def _step_smoothed(
    state, z, a, b, SUM: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """With the sum of z. Where padding and labels, which do not count, look like logits of -inf, none of these is
    counted: what is then missing shows that some were logits."""
    tops, sums, rest, s, s_rest, count = state
    tops, sums, rest = _step((tops, sums, rest), z, a, b, SUM, FAST, WHOLE, VECTOR)
    if WHOLE:
        count += z.shape[0] * VECTOR
    else:
        count += fold((z > -_INF).to(tl.int32), VECTOR)
        z = tl.where(z > -_INF, z, 0.0)
    s, s_rest = add(s, s_rest, fold(z, VECTOR))
    return tops, sums, rest, s, s_rest, count


@triton.jit
def _end_smoothed(state, rim, inside, number, a, b, SUM: tl.constexpr, FAST: tl.constexpr):
    tops, sums, rest, s, s_rest, count = state
    top, neg, _, _ = _end((tops, sums, rest), rim, inside, number, a, b, SUM, FAST)
    s = tl.where(tl.sum(count, axis=0) < number, -_INF, sum_of(s, s_rest))
    return top, neg, s + tl.sum(tl.where(inside, rim, 0.0), axis=0), 0.0


@triton.jit
def label_statistics(top, neg, s, none):
    """-> (m, neg, s)"""
    return top, neg, s


@triton.jit
def label_logit(z):
    return z


# --- one negative -----------------------------------------------------------------------------------------------------


@triton.jit
def hyper_parameters(top, a, b):
    """What phi takes besides z."""
    return a, b


@triton.jit
def itself(z, a, b):
    """What label smoothing sums of a negative."""
    return z


@triton.jit
def hyper_parameters_of_row(statistics_ptr, row, columns, a, b):
    return a, b
