"""The softmax losses over a row: maximum and sum of exponentials in one pass. Nothing here knows which loss it is."""

import triton
import triton.language as tl

from .formulas import exp
from .labels import walk_around_labels
from .rows import last_tile, load_tile, logit_of_target, part_of, rim_positions, tile_lanes
from .sums import add, fold, sum_of

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: a finite start keeps -inf - top from being NaN
_INF = tl.constexpr(float("inf"))


@triton.jit
def _online(top, total, rest, x, VECTOR: tl.constexpr):
    """Maximum and sum of exp(x - maximum) of every thread, (LANES // VECTOR,), with a tile x (ROWS, LANES) taken in.

    A NaN or +inf turns the sum to NaN and stays there; the maximum alone would lose a NaN.
    """
    x = tl.reshape(x, (x.shape[0], x.shape[1] // VECTOR, VECTOR))
    higher = tl.maximum(top, tl.max(tl.max(x, axis=0), axis=1))
    terms = exp(x - higher[None, :, None], True)
    scale = exp(top - higher, True)
    terms = tl.reshape(terms, (x.shape[0], x.shape[1] * VECTOR))
    total, rest = add(total * scale, rest * scale, fold(terms, VECTOR))
    return higher, total, rest


@triton.jit
def walk(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a row -> (maximum of the negatives, sum of exp(z - maximum), z_y, 0)"""
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    first, behind = part_of(row, TILE)
    position = target.column - row.head
    last = last_tile(first, behind, position, TILE)

    top = tl.full((LANES // VECTOR,), _LOWEST, tl.float32)
    total = tl.zeros((LANES // VECTOR,), tl.float32)
    rest = total
    for i in range(first, behind - 1):
        x = load_tile(row, i + (i >= last).to(tl.int32), ROWS, LANES)
        top, total, rest = _online(top, total, rest, x, VECTOR)
    x = load_tile(row, last, ROWS, LANES)
    x = tl.where(tile_lanes(ROWS, LANES) == position - last * TILE, -_INF, x)
    top, total, rest = _online(top, total, rest, x, VECTOR)

    rim, inside = rim_positions(row)
    x = tl.load(row.ptr + rim, mask=inside & (rim != position), other=-_INF).to(tl.float32)
    highest, total = _of_threads(top, total, rest, x)
    alone = tl.program_id(1) == 0
    return highest, total, tl.where(alone, logit_of_target(row, target, alone), 0.0), 0.0


@triton.jit
def _of_threads(top, total, rest, rim):
    """Maximum and sum of exp(x - maximum) from those of the threads and the rim's logits."""
    highest = tl.maximum(tl.max(top, axis=0), tl.max(rim, axis=0))
    scale = exp(top - highest, True)
    return highest, sum_of(total * scale, rest * scale) + tl.sum(exp(rim - highest, True), axis=0)


@triton.jit
def merge(tops, totals, z_y, none):
    """The same for the row from its parts, (PARTS,) each."""
    top = tl.max(tops, axis=0)
    return top, tl.sum(totals * exp(tops - top, True), axis=0), tl.sum(z_y, axis=0), 0.0


@triton.jit
def statistics(top, total, z_y, none):
    """-> (m, l, z_y) from the maximum, the sum of exp(z - maximum) and the target's logit."""
    empty = total == 0.0  # no negative above -inf
    l = tl.where(empty, -_INF, tl.log(total))
    return tl.where(empty, 0.0, top), l, tl.where(z_y == _INF, float("nan"), z_y)


# --- several labels ---------------------------------------------------------------------------------------------------


@triton.jit
def walk_labels(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a row -> (maximum of the negatives, sum of exp(z - maximum), 0, 0)"""
    return walk_around_labels(row, target, a, b, SUM, FAST, _start, _step, _end, ROWS, LANES)


@triton.jit
def walk_labels_smoothed(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """This program's part of a row -> (maximum of the negatives, sum of exp(z - maximum), sum of z - maximum, their
    number)"""
    return walk_around_labels(
        row, target, a, b, SUM, FAST, _start_smoothed, _step_smoothed, _end_smoothed, ROWS, LANES
    )  # fmt: skip


@triton.jit
def _start(LANES: tl.constexpr, VECTOR: tl.constexpr):
    zeros = tl.zeros((LANES // VECTOR,), tl.float32)
    return tl.full((LANES // VECTOR,), _LOWEST, tl.float32), zeros, zeros


@triton.jit
def _step(state, x, a, b, SUM: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr):
    top, total, rest = state
    return _online(top, total, rest, x, VECTOR)


@triton.jit
def _end(state, rim, inside, number, a, b, SUM: tl.constexpr, FAST: tl.constexpr):
    top, total, rest = state
    highest, total = _of_threads(top, total, rest, rim)
    return highest, total, 0.0, 0.0


@triton.jit
def _start_smoothed(LANES: tl.constexpr, VECTOR: tl.constexpr):
    zeros = tl.zeros((LANES // VECTOR,), tl.float32)
    none = tl.zeros((LANES // VECTOR,), tl.int32)
    return tl.full((LANES // VECTOR,), _LOWEST, tl.float32), zeros, zeros, zeros, zeros, none


@triton.jit
def _step_smoothed(
    state, x, a, b, SUM: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """With the sum of x - maximum. Where padding and labels, which do not count, look like logits of -inf, none of
    these is counted: what is then missing shows that some were logits."""
    top, total, rest, s, s_rest, count = state
    higher, total, rest = _online(top, total, rest, x, VECTOR)
    below = tl.reshape(x, (x.shape[0], x.shape[1] // VECTOR, VECTOR)) - higher[None, :, None]
    below = tl.reshape(below, x.shape)
    if WHOLE:
        number = count * 0 + x.shape[0] * VECTOR
    else:
        below = tl.where(x > -_INF, below, 0.0)
        number = fold((x > -_INF).to(tl.int32), VECTOR)
    s, s_rest = add(s, s_rest, fold(below, VECTOR) - _shift(count, higher, top))
    return higher, total, rest, s, s_rest, count + number


@triton.jit
def _shift(count, higher, top):
    """What the sum of so many x - top is more than that of x - higher."""
    return tl.where(count == 0, 0.0, count.to(tl.float32) * (higher - top))


@triton.jit
def _end_smoothed(state, rim, inside, number, a, b, SUM: tl.constexpr, FAST: tl.constexpr):
    top, total, rest, s, s_rest, count = state
    highest, total = _of_threads(top, total, rest, rim)
    s = sum_of(s - _shift(count, highest, top), s_rest)
    s = tl.where(tl.sum(count, axis=0) < number, -_INF, s) + tl.sum(tl.where(inside, rim - highest, 0.0), axis=0)
    return highest, total, s, (number + tl.sum(inside.to(tl.int32), axis=0)).to(tl.float32)


@triton.jit
def merge_labels(tops, totals, s, counts):
    """The numbers of ``walk_labels`` or ``walk_labels_smoothed`` for the row from its parts, (PARTS,) each."""
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * exp(tops - top, True), axis=0)
    return top, total, tl.sum(s - _shift(counts, top, tops), axis=0), tl.sum(counts, axis=0)


@triton.jit
def label_statistics(top, total, s, count):
    """-> (m, l, s)"""
    empty = total == 0.0  # no negative above -inf
    return tl.where(empty, 0.0, top), tl.where(empty, -_INF, tl.log(total)), s


@triton.jit
def label_logit(z):
    return tl.where(z == _INF, float("nan"), z)


# --- one negative -----------------------------------------------------------------------------------------------------


@triton.jit
def share(z, m, l, FAST: tl.constexpr):
    """exp(z) over the sum of exp over the negatives; never m + l in one number, which would lose digits."""
    return exp((z - m) - l, True)


@triton.jit
def sum_of_shares(z, m, l, FAST: tl.constexpr, VECTOR: tl.constexpr):
    """Over what each thread holds of a tile, (ROWS, LANES) -> (LANES // VECTOR,)"""
    return fold(share(z, m, l, FAST), VECTOR)


@triton.jit
def below_top(top, a, b):
    """What ``share`` takes besides z while the sum is not yet known."""
    return tl.where(top == -_INF, 0.0, top), 0.0


@triton.jit
def below(z, top, beside):
    """What label smoothing sums of a negative."""
    return z - top


@triton.jit
def of_row(statistics_ptr, row, columns, a, b):
    """What ``share`` takes besides z in backward."""
    l = tl.load(statistics_ptr + row * columns + 1)
    return tl.load(statistics_ptr + row * columns), tl.where(l == -_INF, 0.0, l)  # all are -inf: exp gives 0, not NaN
