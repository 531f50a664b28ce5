"""The losses over the k hardest negatives, forward: selection, loss and state in one program per row.

Two ways to find the picks, both exact. ``row_kernel`` searches the row itself, held in registers or read again from the caches;
``blocks_kernel`` reads it once, writing the maximum of every block of W logits, and searches only the blocks whose maximum is among
the k + 1 largest: they hold the k hardest negatives, whichever block the target is in.
"""

import triton
import triton.language as tl

from . import logistic, softmax
from .formulas import exp, softplus
from .logistic import multi_hot, open_target
from .rows import load_tile, open_row, read_index, tile_lanes
from .select import edge, index_view, key_of, multi_hot_view, open_rim, search, survey, survey_held

_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_SCALARS = [
    "phase", "row_stride", "target_phase", "target_stride", "num_classes", "ignore_index", "k", "num_blocks", "capacity",
]  # fmt: skip


# --- families ---------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_term(x, top, a, b, VALUE: tl.constexpr, FAST: tl.constexpr):
    return exp(x - top)


@triton.jit
def softmax_finish(
    value_ptr, state_ptr, row, live, dead, poison, z_y, pos, positives, top, total, a, b, VALUE: tl.constexpr, FAST: tl.constexpr
):
    softmax.finish_row(value_ptr, state_ptr, row, z_y + poison, live, dead, top, total, a, b, VALUE, FAST)


@triton.jit
def logistic_term(x, top, a, b, VALUE: tl.constexpr, FAST: tl.constexpr):
    return VALUE(x, a, b, FAST)


@triton.jit
def logistic_finish(
    sums_ptr, state_ptr, row, live, dead, poison, z_y, pos, positives, top, total, a, b, VALUE: tl.constexpr, FAST: tl.constexpr
):
    logistic.finish_row(
        sums_ptr, state_ptr, row, tl.where(live, pos + poison, dead), tl.where(live, total, dead),
        tl.where(live & (positives > 0), z_y, tl.where(live, 0.0, dead)), positives.to(tl.float32),
    )  # fmt: skip


# --- targets ----------------------------------------------------------------------------------------------------------


@triton.jit
def index_target(
    target_ptr, target_phase, target_stride, row, row_ptr, body_ptr, head, body, num_classes, ignore_index, FAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """-> (info of its view, live, dead, z_y or -inf, softplus(-z_y), number of positives)"""
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index)
    known = live & (target >= 0)
    z_y = tl.load(row_ptr + target, mask=known, other=-_INF).to(tl.float32)
    return (target,), live, dead, z_y, tl.where(known, softplus(-z_y), 0.0), known.to(tl.int32)


@triton.jit
def multi_hot_target(
    target_ptr, target_phase, target_stride, row, row_ptr, body_ptr, head, body, num_classes, ignore_index, FAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The same from one walk over the row's target: (.., 0, sum of softplus(-z) over the positives, their number)"""
    VECTOR: tl.constexpr = 128 // body_ptr.dtype.element_ty.primitive_bitwidth
    _, target_body_ptr = open_target(target_ptr, target_phase, row, target_stride, VECTOR)
    pos = tl.zeros((LANES,), tl.float32)
    count = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(body, ROWS * LANES)):
        lanes = tile * (ROWS * LANES) + tile_lanes(ROWS, LANES)
        positive = multi_hot(target_body_ptr, lanes, lanes < body)
        z = tl.load(body_ptr + lanes, mask=positive, other=_INF).to(tl.float32)  # softplus(-inf) = 0
        pos += tl.sum(softplus(-z), axis=0)
        count += tl.sum(positive.to(tl.int32), axis=0)
    _, positions, inside = open_rim(body_ptr, head, body, num_classes, VECTOR)
    positive = multi_hot(target_body_ptr, positions, inside)
    z = tl.load(body_ptr + positions, mask=positive, other=_INF).to(tl.float32)
    pos_sum = tl.sum(pos, axis=0) + tl.sum(softplus(-z), axis=0)
    number = tl.sum(count, axis=0) + tl.sum(positive.to(tl.int32), axis=0)
    return (target_body_ptr,), number >= 0, pos_sum * 0.0, pos_sum * 0.0, pos_sum, number


# --- a row searched as a whole ----------------------------------------------------------------------------------------


@triton.jit
def walk_index(body_ptr, head, body, length, info, z_y, ROWS: tl.constexpr, LANES: tl.constexpr):
    """-> (source of counts, maximum, poison, sum, sum of squares) of a row too long for registers. The counts are taken over the
    whole row, less the target's logit: no test per element."""
    VECTOR: tl.constexpr = 128 // body_ptr.dtype.element_ty.primitive_bitwidth
    rim, positions, inside = open_rim(body_ptr, head, body, length, VECTOR)
    negatives = tl.where(index_view(info, head, positions, inside)[1], rim, -_INF)
    top, poison, total, squares = survey(body_ptr, head, body, length, index_view, info, negatives, ROWS, LANES)
    return (body_ptr, body, rim, z_y), top, poison, total, squares


@triton.jit
def walk_multi_hot(body_ptr, head, body, length, info, z_y, ROWS: tl.constexpr, LANES: tl.constexpr):
    VECTOR: tl.constexpr = 128 // body_ptr.dtype.element_ty.primitive_bitwidth
    rim, positions, inside = open_rim(body_ptr, head, body, length, VECTOR)
    negatives = tl.where(multi_hot_view(info, head, positions, inside)[1], rim, -_INF)
    top, poison, total, squares = survey(body_ptr, head, body, length, multi_hot_view, info, negatives, ROWS, LANES)
    return (body_ptr, body, negatives, info[0]), top, poison, total, squares


@triton.jit
def _hold(body_ptr, head, body, length, VIEW: tl.constexpr, info, ROWS: tl.constexpr, LANES: tl.constexpr):
    VECTOR: tl.constexpr = 128 // body_ptr.dtype.element_ty.primitive_bitwidth
    rim, positions, inside = open_rim(body_ptr, head, body, length, VECTOR)
    rim = tl.where(VIEW(info, head, positions, inside)[1], rim, -_INF)
    positions = tile_lanes(ROWS, LANES)
    x = tl.where(VIEW(info, head, positions, positions < body)[1], load_tile(body_ptr, 0, body, ROWS, LANES), -_INF)
    top, poison, total, squares = survey_held(x, rim)
    return (x, rim), top, poison, total, squares


@triton.jit
def hold_index(body_ptr, head, body, length, info, z_y, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The same of a row held in registers as one tile: every count is free of loads."""
    return _hold(body_ptr, head, body, length, index_view, info, ROWS, LANES)


@triton.jit
def hold_multi_hot(body_ptr, head, body, length, info, z_y, ROWS: tl.constexpr, LANES: tl.constexpr):
    return _hold(body_ptr, head, body, length, multi_hot_view, info, ROWS, LANES)


@triton.jit
def guess(total, squares, number, quantile, reach):
    """-> (where a normal distribution with these moments has its upper quantile, reach of ``search``)"""
    number = tl.maximum(number, 1).to(tl.float32)
    mean = total / number
    deviation = tl.sqrt(tl.maximum(squares / number - mean * mean, 0.0))
    return mean + deviation * quantile, deviation * reach


@triton.jit(do_not_specialize=_SCALARS)
def row_kernel(
    result_ptr, state_ptr,  # value (rows,), state (rows, 3), or sums (rows, 2), state (rows, 2)
    pick_index_ptr, pick_logit_ptr, pick_stride,  # (rows, k) or (rows, 1)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_phase, target_stride,  # (rows,) or (rows, classes)
    num_classes, ignore_index, k, quantile, reach, a, b,
    TARGET: tl.constexpr, VIEW: tl.constexpr, OPEN: tl.constexpr, COUNT: tl.constexpr, EMIT: tl.constexpr,
    TERM: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program, one row."""
    ELEMENT: tl.constexpr = logits_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    info, live, dead, z_y, pos, positives = TARGET(
        target_ptr, target_phase, target_stride, row, row_ptr, body_ptr, head, body, num_classes, ignore_index, FAST, ROWS, LANES
    )
    length = tl.where(live, num_classes, 0)
    body = tl.minimum(body, length)
    wanted = tl.minimum(k, length - positives)

    source, top, poison, total, squares = OPEN(body_ptr, head, body, length, info, z_y, ROWS, LANES)
    first, reach = guess(total, squares, length - positives, quantile, reach)
    low = key_of(tl.full((), -_INF, tl.float32), ELEMENT)
    low, high, count_low, count_high = search(
        COUNT, source, low, key_of(top, ELEMENT) + 1, length - positives, wanted, wanted, first, reach, ELEMENT, ROWS, LANES
    )
    at_least, tie, last = edge(
        body_ptr, head, body, length, VIEW, info, low, high, count_low, count_high, wanted, wanted, ELEMENT, GROUPS, VECTOR
    )
    top = tl.where(top == -_INF, 0.0, top)
    total = EMIT(
        pick_index_ptr + row * pick_stride, pick_logit_ptr + row * pick_stride, k, row_ptr, body_ptr, head, body, length, VIEW,
        info, at_least, tie, last, wanted, TERM, top, a, b, VALUE, FAST, GROUPS, VECTOR,
    )  # fmt: skip
    poison = tl.where(z_y == z_y, poison, _NAN)
    FINISH(result_ptr, state_ptr, row, live, dead, poison, z_y, pos, positives, top, total, a, b, VALUE, FAST)
