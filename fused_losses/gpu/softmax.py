"""The softmax losses over a row: maximum and sum of exponentials in one pass. Nothing here knows which loss it is."""

import triton
import triton.language as tl

from .formulas import exp
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
    total, rest = add(total * scale, rest * scale, fold(tl.reshape(terms, (x.shape[0], x.shape[1] * VECTOR)), VECTOR))
    return higher, total, rest


@triton.jit
def walk(
    row, target, a, b, PHI: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
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
    highest = tl.maximum(tl.max(top, axis=0), tl.max(x, axis=0))
    scale = exp(top - highest, True)
    total = sum_of(total * scale, rest * scale) + tl.sum(exp(x - highest, True), axis=0)
    alone = tl.program_id(1) == 0
    return highest, total, tl.where(alone, logit_of_target(row, target, alone), 0.0), 0.0


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


# --- one negative -----------------------------------------------------------------------------------------------------


@triton.jit
def share(z, m, l, FAST: tl.constexpr):
    """exp(z) over the sum of exp over the negatives; never m + l in one number, which would lose digits."""
    return exp((z - m) - l, True)


@triton.jit
def below_top(top, a, b):
    """What ``share`` takes besides z while the sum is not yet known."""
    return tl.where(top == -_INF, 0.0, top), 0.0


@triton.jit
def of_row(statistics_ptr, row, a, b):
    """What ``share`` takes besides z in backward."""
    l = tl.load(statistics_ptr + row * 3 + 1)
    return tl.load(statistics_ptr + row * 3), tl.where(l == -_INF, 0.0, l)  # all are -inf: exp gives 0, not NaN
