"""The losses over the k hardest negatives, forward: selection, loss and state in one program per row.

Two ways to find the picks, both exact. ``row_kernel`` searches the row itself, held in registers or read again from the
caches; ``blocks_kernel`` reads it once, writing the maximum of every block of W logits, and searches only the blocks
whose maximum is among the k + 1 largest: they hold the k hardest negatives, whichever block the target is in.
"""

import triton
import triton.language as tl

from . import logistic, softmax
from .formulas import exp, softplus
from .logistic import multi_hot, open_target
from .rows import SIZES, load_tile, open_row, part_of, read_index, tile_lanes
from .select import (
    count_walked,
    count_winners,
    edge,
    float_of,
    index_view,
    key_of,
    list_view,
    load_groups,
    load_winners,
    multi_hot_view,
    open_rim,
    plain_view,
    rank_columns,
    rank_rim,
    search,
    store_columns,
    survey,
    survey_held,
)

_INF = tl.constexpr(float("inf"))
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_SIZES = (*SIZES, "k", "pick_stride", "max_blocks", "capacity")


# --- families ---------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_term(x, top, a, b, VALUE: tl.constexpr, FAST: tl.constexpr):
    return exp(x - top, True)


@triton.jit
def softmax_finish(
    value_ptr, state_ptr, row, live, dead, poison, z_y, pos, positives, top, total, a, b, VALUE: tl.constexpr
):
    softmax.finish_row(value_ptr, state_ptr, row, z_y + poison, live, dead, top, total, a, b, VALUE)


@triton.jit
def logistic_term(x, top, a, b, VALUE: tl.constexpr, FAST: tl.constexpr):
    return VALUE(x, a, b, FAST)


@triton.jit
def logistic_finish(
    sums_ptr, state_ptr, row, live, dead, poison, z_y, pos, positives, top, total, a, b, VALUE: tl.constexpr
):
    logistic.finish_row(
        sums_ptr, state_ptr, row, tl.where(live, pos + poison, dead), tl.where(live, total, dead),
        tl.where(live & (positives > 0), z_y, tl.where(live, 0.0, dead)), positives.to(tl.float32),
    )  # fmt: skip


# --- targets ----------------------------------------------------------------------------------------------------------


@triton.jit
def index_target(
    target_ptr, target_phase, target_stride, row, row_ptr, body_ptr, head, body, num_classes, ignore_index,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """-> (info of its view, live, dead, z_y or -inf, softplus(-z_y), number of positives)"""
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index)
    known = live & (target >= 0)
    z_y = tl.load(row_ptr + target, mask=known, other=-_INF).to(tl.float32)
    return (target,), live, dead, z_y, tl.where(known, softplus(-z_y, False), 0.0), known.to(tl.int32)


@triton.jit
def multi_hot_target(
    target_ptr, target_phase, target_stride, row, row_ptr, body_ptr, head, body, num_classes, ignore_index,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The same from one walk over the row's target: (.., 0, sum of softplus(-z) over the positives, their number)"""
    VECTOR: tl.constexpr = 128 // body_ptr.dtype.element_ty.primitive_bitwidth
    _, target_body_ptr = open_target(target_ptr, target_phase, row, target_stride, VECTOR)
    pos = tl.zeros((LANES,), tl.float32)
    count = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(body, ROWS * LANES)):
        lanes = tile * (ROWS * LANES) + tile_lanes(ROWS, LANES)
        positive = multi_hot(target_body_ptr, lanes, lanes < body)
        z = tl.where(positive, load_tile(body_ptr, tile, body, ROWS, LANES), _INF)  # softplus(-inf) = 0
        pos += tl.sum(softplus(-z, FAST), axis=0)
        count += tl.sum(positive.to(tl.int32), axis=0)
    _, rim_position, rim_inside = open_rim(body_ptr, head, body, num_classes, VECTOR)
    rim_positive = multi_hot(target_body_ptr, rim_position, rim_inside)
    rim = tl.load(body_ptr + rim_position, mask=rim_positive, other=_INF).to(tl.float32)
    pos_sum = tl.sum(pos, axis=0) + tl.sum(softplus(-rim, FAST), axis=0)
    number = tl.sum(count, axis=0) + tl.sum(rim_positive.to(tl.int32), axis=0)
    zero = tl.full((), 0.0, tl.float32)
    return (target_body_ptr,), number >= 0, zero, zero, pos_sum, number


# --- a row searched as a whole ----------------------------------------------------------------------------------------


@triton.jit
def walk_index(body_ptr, head, body, length, info, z_y, ROWS: tl.constexpr, LANES: tl.constexpr):
    """-> (source of counts, maximum, poison, sum, sum of squares) of a row too long for registers. The counts are taken
    over the whole row, less the target's logit: no test per element."""
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


@triton.jit(do_not_specialize=_SIZES)
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
        target_ptr, target_phase, target_stride, row, row_ptr, body_ptr, head, body, num_classes, ignore_index, FAST,
        ROWS, LANES,
    )  # fmt: skip
    length = tl.where(live, num_classes, 0)
    body = tl.where(live, body, 0)
    wanted = tl.minimum(k, length - positives)

    source, top, poison, total, squares = OPEN(body_ptr, head, body, length, info, z_y, ROWS, LANES)
    first, reach = guess(total, squares, length - positives, quantile, reach)
    low = key_of(tl.full((), -_INF, tl.float32), ELEMENT)
    low, high, count_low, count_high = search(
        COUNT, source, low, key_of(top, ELEMENT) + 1, length - positives, wanted, wanted, first, reach, ELEMENT, ROWS,
        LANES,
    )  # fmt: skip
    at_least, tie, last = edge(
        body_ptr, head, body, length, VIEW, info, low, high, count_low, count_high, wanted, wanted, ELEMENT, GROUPS,
        VECTOR,
    )  # fmt: skip
    top = tl.where(top == -_INF, 0.0, top)
    total = EMIT(
        pick_index_ptr + row * pick_stride, pick_logit_ptr + row * pick_stride, k, row_ptr, body_ptr, head, body,
        length, VIEW, info, at_least, tie, last, wanted, TERM, top, a, b, VALUE, FAST, GROUPS, VECTOR,
    )  # fmt: skip
    poison = tl.where(z_y == z_y, poison, float("nan"))
    FINISH(result_ptr, state_ptr, row, live, dead, poison, z_y, pos, positives, top, total, a, b, VALUE)


# --- a row read once, then only the blocks that can hold a pick -------------------------------------------------------


@triton.jit
def _maximum_of_groups(x):
    """Maxima of the rows of (GROUPS, VECTOR), NaN if there is one, (GROUPS,): a tree inside each thread's vectors.

    tl.max would lose a NaN, and a reduction with a combine function of our own is one call per element in the
    interpreter.
    """
    GROUPS: tl.constexpr = x.shape[0]
    VECTOR: tl.constexpr = x.shape[1]
    if VECTOR == 8:
        left, right = tl.split(tl.reshape(x, (GROUPS, 4, 2)))
        x = tl.maximum(left, right, propagate_nan=_ALL)
    left, right = tl.split(tl.reshape(x, (GROUPS, 2, 2)))
    left, right = tl.split(tl.maximum(left, right, propagate_nan=_ALL))
    return tl.maximum(left, right, propagate_nan=_ALL)


@triton.jit
def write_maxima(
    maxima_ptr, body_ptr, body, WIDTH: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Maxima of this program's part of a row's blocks, NaN where a block has one, -inf behind the last block of the
    last tile."""
    TILE: tl.constexpr = GROUPS * VECTOR
    PIECES: tl.constexpr = WIDTH // VECTOR
    BLOCKS: tl.constexpr = TILE // WIDTH
    first, behind = part_of(body, TILE)
    for tile in range(first, behind):
        x, _, _ = load_groups(body_ptr, tile, body, GROUPS, VECTOR)
        maxima = _maximum_of_groups(x)
        if PIECES > 1:
            pieces = tl.reshape(maxima, (BLOCKS, PIECES))
            nans = tl.max((pieces != pieces).to(tl.int32), axis=1)
            maxima = tl.where(nans > 0, float("nan"), tl.max(pieces, axis=1))
        tl.store(maxima_ptr + tile * BLOCKS + tl.arange(0, BLOCKS), maxima.to(maxima_ptr.dtype.element_ty))


@triton.jit
def list_blocks(
    blocks_ptr, maxima_ptr, num_blocks, at_least, tie, last, capacity, GROUPS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Writes the numbers of the winning blocks in order -> how many"""
    taken = capacity * 0
    for tile in range(tl.cdiv(num_blocks, GROUPS * VECTOR)):
        x, blocks, inside = load_groups(maxima_ptr, tile, num_blocks, GROUPS, VECTOR)
        won = inside & ((x >= at_least) | ((x == tie) & (blocks <= last)))
        won_columns, ranks, number = rank_columns(won)
        store_columns(blocks_ptr + taken, ranks, won_columns, capacity - taken, blocks)
        taken += number
    return tl.minimum(taken, capacity)


@triton.jit
def list_candidates(
    class_ptr, logit_ptr, taken, capacity, body_ptr, head, body, length, target, blocks_ptr, num_blocks, at_least,
    at_most, WIDTH: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Appends the negatives within [at_least, at_most] of the winning blocks and the rim, in order, as far as there is
    room.

    -> (how many the list would hold now, their maximum)
    """
    element = logit_ptr.dtype.element_ty
    rim, rim_position, rim_inside = open_rim(body_ptr, head, body, length, VECTOR)
    rim_classes = head + rim_position
    rim_kept = rim_inside & (rim >= at_least) & (rim <= at_most) & (rim_classes != target)
    in_tail = rim_position >= 0
    in_head = tl.sum((rim_kept & ~in_tail).to(tl.int32), axis=0)
    rim_slots = taken + rank_rim(rim_kept)
    taken += in_head
    before_body = taken
    tops = tl.full((GROUPS,), -_INF, tl.float32)
    for tile in range(tl.cdiv(num_blocks * (WIDTH // VECTOR), GROUPS)):
        x, positions, inside = load_winners(body_ptr, body, blocks_ptr, num_blocks, tile, WIDTH, GROUPS, VECTOR)
        kept = inside & (x >= at_least) & (x <= at_most) & (head + positions != target)
        tops = tl.maximum(tops, tl.max(tl.where(kept, x, -_INF), axis=1))
        kept_columns, ranks, number = rank_columns(kept)
        store_columns(class_ptr + taken, ranks, kept_columns, capacity - taken, head + positions)
        store_columns(logit_ptr + taken, ranks, kept_columns, capacity - taken, x.to(element))
        taken += number

    rim_slots += tl.where(in_tail, taken - before_body, 0)
    tl.store(class_ptr + rim_slots, rim_classes, mask=rim_kept & (rim_slots < capacity))
    tl.store(logit_ptr + rim_slots, rim.to(element), mask=rim_kept & (rim_slots < capacity))
    taken += tl.sum((rim_kept & in_tail).to(tl.int32), axis=0)
    return taken, tl.maximum(tl.max(tops, axis=0), tl.max(tl.where(rim_kept, rim, -_INF), axis=0))


@triton.jit
def _select_from_blocks(
    result_ptr, state_ptr, pick_index_ptr, pick_logit_ptr, pick_stride, maxima_ptr, blocks_ptr, max_blocks, class_ptr,
    logit_ptr, capacity, row, row_ptr, body_ptr, head, body, target, live, dead, z_y, pos, positives, num_classes, k,
    quantile, reach, a, b, EMIT: tl.constexpr, TERM: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Everything after the maxima of a row's blocks are written."""
    ELEMENT: tl.constexpr = logit_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    BLOCKS: tl.constexpr = ROWS * LANES // WIDTH
    length = tl.where(live, num_classes, 0)
    wanted = tl.minimum(k, length - positives)
    lowest = key_of(tl.full((), -_INF, tl.float32), ELEMENT)
    nowhere = tl.full((), float("nan"), tl.float32)
    no_rim = tl.full((2 * VECTOR,), -_INF, tl.float32)
    rim, _positions, _inside = open_rim(body_ptr, head, body, length, VECTOR)

    # Winners: at least the k + 1 largest maxima, equal ones by number. One of them may owe its maximum to the target;
    # the others hold a negative each that is as hard as any element outside the winners, or equal and in front of it.
    num_blocks = tl.cdiv(body, ROWS * LANES) * BLOCKS
    top, poison, total, squares = survey(maxima_ptr, 0, num_blocks, num_blocks, plain_view, (0,), no_rim, 1, LANES)
    poison = tl.where(tl.sum((rim != rim).to(tl.int32), axis=0) > 0, float("nan"), poison)
    needed = tl.minimum(k + 1, num_blocks)
    first, reach = guess(total, squares, num_blocks, quantile, reach)
    low, high, count_low, count_high = search(
        count_walked, (maxima_ptr, num_blocks, no_rim, nowhere), lowest, key_of(top, ELEMENT) + 1, num_blocks, needed,
        max_blocks, first, reach, ELEMENT, 1, LANES,
    )  # fmt: skip
    at_least, tie, last = edge(
        maxima_ptr, 0, num_blocks, num_blocks, plain_view, (0,), low, high, count_low, count_high, needed, max_blocks,
        ELEMENT, GROUPS, VECTOR,
    )  # fmt: skip
    num_blocks = list_blocks(blocks_ptr, maxima_ptr, num_blocks, at_least, tie, last, max_blocks, GROUPS, VECTOR)
    tl.debug_barrier()

    # Candidates: what the winners hold above the smallest of their maxima. Where that is more than there is room for,
    # many equal logits or a few blocks that hold them all, the bound is searched and they are listed again; where the
    # bound itself is shared by too many, after all that lies above it. One listing in a loop, not three: each is long.
    low = key_of(tl.where(tie == tie, tie, at_least), ELEMENT)
    at_least = float_of(low, ELEMENT)
    at_most = tl.full((), _INF, tl.float32)
    number = wanted * 0
    turns = number + 3  # to go, of three; the first says how many more there are
    while turns > 0:
        number, highest = list_candidates(
            class_ptr, logit_ptr, number, capacity, body_ptr, head, body, length, target, blocks_ptr, num_blocks,
            at_least, at_most, WIDTH, GROUPS, VECTOR,
        )  # fmt: skip
        tl.debug_barrier()  # the next listing, or the padding, overwrites this one
        if turns == 3:
            top = highest
            turns = number * 0
            if number > capacity:
                low, high, number, _above = search(
                    count_winners, (body_ptr, body, blocks_ptr, num_blocks, WIDTH, rim, z_y), low,
                    key_of(top, ELEMENT) + 1, number, wanted, capacity, nowhere, nowhere, ELEMENT, 1, LANES,
                )  # fmt: skip
                tied = number > capacity
                turns = tl.where(tied, 2, 1)
                at_least = float_of(tl.where(tied, high, low), ELEMENT)
                number = wanted * 0
        else:
            turns -= 1
            at_least = float_of(low, ELEMENT)
            at_most = at_least
    high = key_of(top, ELEMENT) + 1
    number = tl.minimum(number, capacity)
    whole = tl.cdiv(number, VECTOR) * VECTOR
    padding = number + tl.arange(0, VECTOR)
    tl.store(logit_ptr + padding, tl.full((VECTOR,), -_INF, tl.float32).to(ELEMENT), mask=padding < whole)
    tl.debug_barrier()

    info = (class_ptr, number)
    low, high, count_low, count_high = search(
        count_walked, (logit_ptr, whole, no_rim, nowhere), low, high, number, wanted, wanted, nowhere, nowhere, ELEMENT,
        1, LANES,
    )  # fmt: skip
    at_least, tie, last = edge(
        logit_ptr, 0, whole, whole, list_view, info, low, high, count_low, count_high, wanted, wanted, ELEMENT, GROUPS,
        VECTOR,
    )  # fmt: skip
    top = tl.where(top == -_INF, 0.0, top)
    total = EMIT(
        pick_index_ptr + row * pick_stride, pick_logit_ptr + row * pick_stride, k, row_ptr, logit_ptr, 0, whole, whole,
        list_view, info, at_least, tie, last, wanted, TERM, top, a, b, VALUE, FAST, GROUPS, VECTOR,
    )  # fmt: skip
    poison = tl.where(z_y == z_y, poison, float("nan"))
    FINISH(result_ptr, state_ptr, row, live, dead, poison, z_y, pos, positives, top, total, a, b, VALUE)


@triton.jit
def _scratch_of_row(
    scratch_logit_ptr, scratch_index_ptr, row, num_classes, max_blocks, capacity, TILE: tl.constexpr,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """-> addresses of a row's block maxima, winning blocks, candidates' classes and logits. All are multiples of 16
    bytes."""
    row_maxima = tl.cdiv(num_classes, TILE) * (TILE // WIDTH)
    room = capacity // VECTOR * VECTOR + VECTOR
    maxima_ptr = scratch_logit_ptr + row * (row_maxima + room)
    blocks_ptr = scratch_index_ptr + row * (max_blocks + capacity)
    return maxima_ptr, blocks_ptr, blocks_ptr + max_blocks, maxima_ptr + row_maxima


@triton.jit(do_not_specialize=_SIZES)
def blocks_kernel(
    result_ptr, state_ptr,  # value (rows,), state (rows, 3), or sums (rows, 2), state (rows, 2)
    pick_index_ptr, pick_logit_ptr, pick_stride,  # (rows, k) or (rows, 1)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_phase, target_stride,  # (rows,)
    num_classes, ignore_index, k, quantile, reach, a, b,
    scratch_logit_ptr, scratch_index_ptr, max_blocks, capacity,  # see _scratch_of_row
    READ: tl.constexpr, EMIT: tl.constexpr, TERM: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program, one row. READ writes the maxima of its blocks, unless ``maxima_kernel`` has done so."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    maxima_ptr, blocks_ptr, class_ptr, logit_ptr = _scratch_of_row(
        scratch_logit_ptr, scratch_index_ptr, row, num_classes, max_blocks, capacity, ROWS * LANES, WIDTH, VECTOR
    )
    row_ptr, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    info, live, dead, z_y, pos, positives = index_target(
        target_ptr, target_phase, target_stride, row, row_ptr, body_ptr, head, body, num_classes, ignore_index, FAST,
        ROWS, LANES,
    )  # fmt: skip
    body = tl.where(live, body, 0)
    READ(maxima_ptr, body_ptr, body, WIDTH, ROWS * LANES // VECTOR, VECTOR)
    tl.debug_barrier()
    _select_from_blocks(
        result_ptr, state_ptr, pick_index_ptr, pick_logit_ptr, pick_stride, maxima_ptr, blocks_ptr, max_blocks,
        class_ptr, logit_ptr, capacity, row, row_ptr, body_ptr, head, body, info[0], live, dead, z_y, pos, positives,
        num_classes, k, quantile, reach, a, b, EMIT, TERM, FINISH, VALUE, FAST, ROWS, LANES, GROUPS, WIDTH,
    )  # fmt: skip


@triton.jit
def maxima_written(maxima_ptr, body_ptr, body, WIDTH: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    pass


@triton.jit(do_not_specialize=_SIZES)
def maxima_kernel(
    logits_ptr, phase, row_stride,  # (rows, classes)
    num_classes, scratch_logit_ptr, scratch_index_ptr, max_blocks, capacity,
    ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row: for rows too few to fill the device."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    maxima_ptr, _, _, _ = _scratch_of_row(
        scratch_logit_ptr, scratch_index_ptr, row, num_classes, max_blocks, capacity, ROWS * LANES, WIDTH, VECTOR
    )
    _, body_ptr, _, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    write_maxima(maxima_ptr, body_ptr, body, WIDTH, ROWS * LANES // VECTOR, VECTOR)
