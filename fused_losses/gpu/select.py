"""The k hardest negatives of a row: exact, deterministic, lowest class first among equals. Knows no formula.

A set of picks is described by three numbers, (at_least, tie, last): every element >= at_least, and those == tie up to
position ``last``. They come from a search on ordered keys, integers of the logits' own width in the order of the
floats, by counting elements >= a key. NaN compares false everywhere: it is never counted and never picked.

What is searched and picked from is an *array*: elements of one row around a 16-byte-aligned body (``rows.py``),
addressed by their position, the offset from the body's first element (negative in front of it). A *view* says what
stands at a position:

    VIEW(info, head, positions, inside) -> (classes, whether the element can be picked)
"""

import triton
import triton.language as tl

from .logistic import multi_hot
from .rows import load_tile, tile_lanes
from .sums import add, finish

_INF = tl.constexpr(float("inf"))
_ALL = tl.constexpr(tl.PropagateNan.ALL)


# --- ordered keys -----------------------------------------------------------------------------------------------------


@triton.jit
def key_of(x, ELEMENT: tl.constexpr):
    """Integer (int32) of a float rounded to ELEMENT, in the order of the floats, the same for -0 and +0."""
    if ELEMENT.primitive_bitwidth == 16:
        bits = x.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def float_of(key, ELEMENT: tl.constexpr):
    """Inverse of key_of, in fp32."""
    bits = key ^ ((key >> 31) & (0x7FFF if ELEMENT.primitive_bitwidth == 16 else 0x7FFFFFFF))
    if tl.bfloat16 == ELEMENT:  # by hand: Triton's interpreter turns its subnormals to 0
        return (bits << 16).to(tl.float32, bitcast=True)
    if tl.float16 == ELEMENT:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def search(
    COUNT: tl.constexpr, source, low, high, count_low, wanted, enough, first, reach, ELEMENT: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Narrows the keys low < high with count(low) >= wanted > count(high) until count(low) <= enough or they are
    neighbours.

    -> (low, high, count(low), count(high)); count(high) is 0 at the start. ``first``, unless it is NaN, is tried first.
    Every other step assumes that the log of the count falls linearly between two finite ends, as it nearly does in the
    upper tail of most distributions, and by 1 (base 2) in ``reach`` as long as the lower end is as low as can be. A
    NaN, or two steps in a row that did not halve the interval, ask for its middle, so the worst case stays logarithmic;
    before the first middle, for everything finite, which settles a row that is masked but for fewer than ``wanted``.
    wanted = 0 with count(low) = 0 returns at once.
    """
    masked = key_of(tl.full((), -_INF, tl.float32), ELEMENT)
    aim = tl.log2((wanted + enough).to(tl.float32) * 0.5)
    log_low = tl.log2(count_low.to(tl.float32))
    log_high = tl.full((), -1.0, tl.float32)  # as if half an element
    count_high = wanted * 0
    stalled = wanted * 0
    while (count_low > enough) & (low + 1 < high):  # the difference of two fp32 keys need not fit 32 bits
        share = (log_low - aim) / (log_low - log_high)
        share += tl.where(share < 0.5, 0.02, -0.02)  # into the longer part: both ends shall move
        below = float_of(low, ELEMENT)
        above = float_of(high, ELEMENT)
        probe = tl.where(low <= masked + 1, above + (log_high - aim - 0.1) * reach, below + (above - below) * share)
        probe = tl.where(first == first, first, probe)
        centre = tl.where(low == masked, low + 1, (low >> 1) + (high >> 1) + (low & high & 1))
        bisect = (stalled == 2) | (probe != probe)
        middle = tl.where(bisect, centre, key_of(tl.where(bisect, 0.0, probe), ELEMENT))
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        first = tl.full((), float("nan"), tl.float32)

        count = COUNT(source, float_of(middle, ELEMENT), ROWS, LANES)
        log_count = tl.log2(tl.maximum(count.to(tl.float32), 0.5))
        many = count >= wanted
        halved = many == (middle >= centre)
        stalled = tl.where(bisect | halved, 0, stalled + 1)
        low = tl.where(many, middle, low)
        count_low = tl.where(many, count, count_low)
        log_low = tl.where(many, log_count, log_low)
        high = tl.where(many, high, middle)
        count_high = tl.where(many, count_high, count)
        log_high = tl.where(many, log_high, log_count)
    return low, high, count_low, count_high


# --- counts -----------------------------------------------------------------------------------------------------------


@triton.jit
def count_walked(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of an array in memory, less one excluded value; source is (body_ptr, body, rim,
    excluded)."""
    body_ptr, body, rim, excluded = source
    counts = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(body, ROWS * LANES)):
        counts += tl.sum((load_tile(body_ptr, tile, body, ROWS, LANES) >= t).to(tl.int32), axis=0)
    return tl.sum(counts, axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0) - (excluded >= t).to(tl.int32)


@triton.jit
def count_walked_multi_hot(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of a row in memory that are not positives; source is (body_ptr, body, rim,
    target_body_ptr)."""
    body_ptr, body, rim, target_body_ptr = source
    counts = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(body, ROWS * LANES)):
        lanes = tile * (ROWS * LANES) + tile_lanes(ROWS, LANES)
        x = load_tile(body_ptr, tile, body, ROWS, LANES)
        counts += tl.sum(((x >= t) & ~multi_hot(target_body_ptr, lanes, lanes < body)).to(tl.int32), axis=0)
    return tl.sum(counts, axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0)


@triton.jit
def count_winners(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of the blocks of a row whose numbers are listed, and of its rim, less one excluded
    value.

    source is (body_ptr, body, blocks_ptr, number of blocks, elements per block (constexpr), rim, excluded).
    """
    body_ptr, body, blocks_ptr, num_blocks, WIDTH, rim, excluded = source
    VECTOR: tl.constexpr = 128 // body_ptr.dtype.element_ty.primitive_bitwidth
    GROUPS: tl.constexpr = LANES // VECTOR
    counts = tl.zeros((GROUPS,), tl.int32)
    for tile in range(tl.cdiv(num_blocks * (WIDTH // VECTOR), GROUPS)):
        x, _, _ = load_winners(body_ptr, body, blocks_ptr, num_blocks, tile, WIDTH, GROUPS, VECTOR)
        counts += tl.sum((x >= t).to(tl.int32), axis=1)
    return tl.sum(counts, axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0) - (excluded >= t).to(tl.int32)


@triton.jit
def count_held(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of a row in registers; source is (x (ROWS, LANES), rim)."""
    x, rim = source
    return tl.sum(tl.sum((x >= t).to(tl.int32), axis=0), axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0)


# --- arrays -----------------------------------------------------------------------------------------------------------


@triton.jit
def index_view(info, head, positions, inside):
    """A row whose positive is one class or -1; info is (class,)."""
    return head + positions, inside & (head + positions != info[0])


@triton.jit
def multi_hot_view(info, head, positions, inside):
    """A row with multi-hot targets; info is (address of the target's entry at position 0,)."""
    return head + positions, inside & ~multi_hot(info[0], positions, inside)


@triton.jit
def plain_view(info, head, positions, inside):
    """An array whose elements have no class."""
    return positions, inside


@triton.jit
def list_view(info, head, positions, inside):
    """A list of elements in scratch memory; info is (address of the class of element 0, number of elements)."""
    listed = inside & (positions < info[1])
    return tl.load(info[0] + positions, mask=listed, other=-1), listed


@triton.jit
def rim_positions(head, body, length, VECTOR: tl.constexpr):
    """-> (positions, which lanes hold an element) of the rim, (2 * VECTOR,): the front in the lower half"""
    lane = tl.arange(0, 2 * VECTOR)
    positions = tl.where(lane < VECTOR, lane - head, body + lane - VECTOR)
    return positions, ((lane < VECTOR) & (lane < tl.minimum(head, length))) | (
        (lane >= VECTOR) & (head + positions < length)
    )


@triton.jit
def open_rim(body_ptr, head, body, length, VECTOR: tl.constexpr):
    """-> (elements in fp32, -inf where there is none; positions; which lanes hold one) of the rim, (2 * VECTOR,)"""
    positions, inside = rim_positions(head, body, length, VECTOR)
    return tl.load(body_ptr + positions, mask=inside, other=-_INF).to(tl.float32), positions, inside


@triton.jit
def load_groups(body_ptr, tile, body, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """-> (elements in fp32, -inf behind the body; positions, in order; inside) of a tile of vectors, (GROUPS,
    VECTOR)"""
    lanes = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    offset = tile * (GROUPS * VECTOR)
    inside = lanes < body - offset
    x = tl.load(body_ptr + offset + lanes, mask=inside, other=-_INF).to(tl.float32)
    return x, offset + lanes, inside


@triton.jit
def load_winners(
    body_ptr, body, blocks_ptr, num_blocks, tile, WIDTH: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """The same for the listed blocks of WIDTH elements, in the order of the list, -inf behind the last."""
    PIECES: tl.constexpr = WIDTH // VECTOR
    group = tile * GROUPS + tl.arange(0, GROUPS)
    block = tl.load(blocks_ptr + group // PIECES, mask=group < num_blocks * PIECES, other=0)
    positions = (block * WIDTH + group % PIECES * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = (group < num_blocks * PIECES)[:, None] & (positions < body)
    return tl.load(body_ptr + positions, mask=inside, other=-_INF).to(tl.float32), positions, inside


@triton.jit
def rank(picked):
    """-> (number of picked elements before each, in row-major order, (GROUPS, VECTOR); number of all)"""
    ones = picked.to(tl.int32)
    in_group = tl.sum(ones, axis=1)
    before = tl.cumsum(in_group, axis=0) - in_group
    return before[:, None] + tl.cumsum(ones, axis=1) - ones, tl.sum(in_group, axis=0)


@triton.jit
def columns(x):
    """The VECTOR columns of (GROUPS, VECTOR), (GROUPS,) each, without leaving the threads that hold them."""
    GROUPS: tl.constexpr = x.shape[0]
    if x.shape[1] == 4:
        found = _four_columns(x)
    else:
        even, odd = tl.split(tl.reshape(x, (GROUPS, 4, 2)))
        x0, x2, x4, x6 = _four_columns(even)
        x1, x3, x5, x7 = _four_columns(odd)
        found = (x0, x1, x2, x3, x4, x5, x6, x7)
    return found


@triton.jit
def _four_columns(x):
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def rank_columns(picked):
    """-> (which elements are picked, as columns; number of picked elements before each, in row-major order; number of
    all)"""
    ones = columns(picked.to(tl.int32))
    in_group = tl.sum(picked.to(tl.int32), axis=1)
    before = tl.cumsum(in_group, axis=0) - in_group
    ranks = (before,)
    for i in tl.static_range(picked.shape[1] - 1):
        before = before + ones[i]
        ranks = ranks + (before,)  # noqa: RUF005
    return ones, ranks, tl.sum(in_group, axis=0)


@triton.jit
def store_columns(ptr, ranks, picked, room, values):
    """Writes the picked elements of values (GROUPS, VECTOR) one behind the other, as far as there is room.

    One store of the whole tile would be laid out anew, element by element through shared memory: its addresses are
    scattered.
    """
    of_column = columns(values)
    for i in tl.static_range(values.shape[1]):
        tl.store(ptr + ranks[i], of_column[i], mask=(picked[i] != 0) & (ranks[i] < room))


@triton.jit
def rank_rim(picked):
    """The same for a rim, (2 * VECTOR,); what lies between its two ends is not counted."""
    ones = picked.to(tl.int32)
    return tl.cumsum(ones, axis=0) - ones


@triton.jit
def nth_tie(
    body_ptr, head, body, length, VIEW: tl.constexpr, info, tie, nth, GROUPS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Position of element number nth, from 0, of those that equal ``tie`` and can be picked."""
    rim, rim_position, rim_inside = open_rim(body_ptr, head, body, length, VECTOR)
    rim_tied = (rim == tie) & VIEW(info, head, rim_position, rim_inside)[1]
    in_head = tl.sum((rim_tied & (rim_position < 0)).to(tl.int32), axis=0)

    seen = in_head
    last_tile = nth * 0
    before_last = in_head
    for tile in range(tl.cdiv(body, GROUPS * VECTOR)):
        x, positions, inside = load_groups(body_ptr, tile, body, GROUPS, VECTOR)
        tied = (x == tie) & VIEW(info, head, positions, inside)[1]
        last_tile = tl.where(seen <= nth, tile, last_tile)
        before_last = tl.where(seen <= nth, seen, before_last)
        seen += tl.sum(tl.sum(tied.to(tl.int32), axis=1), axis=0)

    x, positions, inside = load_groups(body_ptr, last_tile, body, GROUPS, VECTOR)
    tied = (x == tie) & VIEW(info, head, positions, inside)[1]
    ranks, _ = rank(tied)
    in_body = tl.sum(tl.sum(tl.where(tied & (ranks == nth - before_last), positions, 0), axis=1), axis=0)
    rim_nth = tl.where(nth < in_head, nth, nth - (seen - in_head))
    in_rim = tl.sum(tl.where(rim_tied & (rank_rim(rim_tied) == rim_nth), rim_position, 0), axis=0)
    return tl.where((nth < in_head) | (nth >= seen), in_rim, in_body)


@triton.jit
def edge(
    body_ptr, head, body, length, VIEW: tl.constexpr, info, low, high, count_low, count_high, wanted, enough,
    ELEMENT: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(at_least, tie, last) from what ``search`` returned: ``enough`` elements at most, the first ``wanted`` if that
    needs ties."""
    at_least = float_of(low, ELEMENT)
    tie = tl.full((), float("nan"), tl.float32)
    last = wanted * 0
    if count_low > enough:
        at_least = float_of(high, ELEMENT)
        tie = float_of(low, ELEMENT)
        last = nth_tie(body_ptr, head, body, length, VIEW, info, tie, wanted - count_high - 1, GROUPS, VECTOR)
    return at_least, tie, last


@triton.jit
def survey(
    body_ptr, head, body, length, VIEW: tl.constexpr, info, rim, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """-> (maximum, NaN if there is a NaN else 0, sum, sum of squares) of what can be picked; sums leave out -inf."""
    highest = tl.full((ROWS, LANES), -_INF, tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    for tile in range(tl.cdiv(body, ROWS * LANES)):
        x = load_tile(body_ptr, tile, body, ROWS, LANES)
        positions = tile * (ROWS * LANES) + tile_lanes(ROWS, LANES)
        x = tl.where(VIEW(info, head, positions, positions < body)[1], x, -_INF)
        highest = tl.maximum(highest, x, propagate_nan=_ALL)
        finite = tl.where(x > -_INF, x, 0.0)
        sums += tl.sum(finite, axis=0)
        squares += tl.sum(finite * finite, axis=0)
    return _summary(highest, rim, sums, squares)


@triton.jit
def survey_held(x, rim):
    """The same of a row in registers, (ROWS, LANES)."""
    finite = tl.where(x > -_INF, x, 0.0)
    return _summary(x, rim, tl.sum(finite, axis=0), tl.sum(finite * finite, axis=0))


@triton.jit
def _summary(highest, rim, sums, squares):
    nans = tl.sum(tl.sum((highest != highest).to(tl.int32), axis=0), axis=0) + tl.sum((rim != rim).to(tl.int32), axis=0)
    top = tl.max(tl.max(tl.where(highest == highest, highest, -_INF), axis=0), axis=0)
    top = tl.maximum(top, tl.max(tl.where(rim == rim, rim, -_INF), axis=0))
    finite = tl.where(rim > -_INF, rim, 0.0)
    total = tl.sum(sums, axis=0) + tl.sum(finite, axis=0)
    return top, tl.where(nans > 0, float("nan"), 0.0), total, tl.sum(squares, axis=0) + tl.sum(finite * finite, axis=0)


# --- emission ---------------------------------------------------------------------------------------------------------


@triton.jit
def emit_compact(
    pick_index_ptr, pick_logit_ptr, k, row_ptr, body_ptr, head, body, length, VIEW: tl.constexpr, info, at_least, tie,
    last, wanted, TERM: tl.constexpr, top, a, b, VALUE: tl.constexpr, FAST: tl.constexpr, GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the picks, (k,), in order of their classes, and returns the sum of TERM over them.

    No slot behind ``wanted`` is written, whatever a row with a NaN, where counts need not agree, would ask for.
    """
    element = pick_logit_ptr.dtype.element_ty
    rim, rim_position, rim_inside = open_rim(body_ptr, head, body, length, VECTOR)
    rim_classes, rim_allowed = VIEW(info, head, rim_position, rim_inside)
    rim_picked = rim_allowed & ((rim >= at_least) | ((rim == tie) & (rim_position <= last)))
    in_tail = rim_position >= 0
    sums = tl.zeros((GROUPS,), tl.float32)
    rest = tl.zeros((GROUPS,), tl.float32)
    in_head = tl.sum((rim_picked & ~in_tail).to(tl.int32), axis=0)
    taken = in_head
    for tile in range(tl.cdiv(body, GROUPS * VECTOR)):
        x, positions, inside = load_groups(body_ptr, tile, body, GROUPS, VECTOR)
        classes, allowed = VIEW(info, head, positions, inside)
        picked = allowed & ((x >= at_least) | ((x == tie) & (positions <= last)))
        sums, rest = add(sums, rest, tl.sum(tl.where(picked, TERM(x, top, a, b, VALUE, FAST), 0.0), axis=1))
        picked_columns, ranks, number = rank_columns(picked)
        store_columns(pick_index_ptr + taken, ranks, picked_columns, wanted - taken, classes)
        store_columns(pick_logit_ptr + taken, ranks, picked_columns, wanted - taken, x.to(element))
        taken += number

    rim_slots = rank_rim(rim_picked) + tl.where(in_tail, taken - in_head, 0)
    tl.store(pick_index_ptr + rim_slots, rim_classes, mask=rim_picked & (rim_slots < wanted))
    tl.store(pick_logit_ptr + rim_slots, rim.to(element), mask=rim_picked & (rim_slots < wanted))
    taken += tl.sum((rim_picked & in_tail).to(tl.int32), axis=0)
    for start in range(tl.minimum(taken, wanted), k, GROUPS):  # empty slots
        slot = start + tl.arange(0, GROUPS)
        tl.store(pick_index_ptr + slot, -1, mask=slot < k)
        tl.store(pick_logit_ptr + slot, tl.full((GROUPS,), -_INF, tl.float32).to(element), mask=slot < k)
    return finish(sums, rest) + tl.sum(tl.where(rim_picked, TERM(rim, top, a, b, VALUE, FAST), 0.0), axis=0)


@triton.jit
def emit_threshold(
    pick_index_ptr, pick_logit_ptr, k, row_ptr, body_ptr, head, body, length, VIEW: tl.constexpr, info, at_least, tie,
    last, wanted, TERM: tl.constexpr, top, a, b, VALUE: tl.constexpr, FAST: tl.constexpr, GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the edge, the last pick in the order of picking, (1,), and returns the sum of TERM over the picks."""
    rim, rim_position, rim_inside = open_rim(body_ptr, head, body, length, VECTOR)
    rim_classes, rim_allowed = VIEW(info, head, rim_position, rim_inside)
    rim_picked = rim_allowed & ((rim >= at_least) | ((rim == tie) & (rim_position <= last)))
    total = tl.sum(tl.where(rim_picked, TERM(rim, top, a, b, VALUE, FAST), 0.0), axis=0)
    sums = tl.zeros((GROUPS,), tl.float32)
    rest = tl.zeros((GROUPS,), tl.float32)
    lowest = tl.full((GROUPS, VECTOR), _INF, tl.float32)  # of every lane, and its highest class
    lowest_class = tl.full((GROUPS, VECTOR), -1, tl.int32)
    for tile in range(tl.cdiv(body, GROUPS * VECTOR)):
        x, positions, inside = load_groups(body_ptr, tile, body, GROUPS, VECTOR)
        classes, allowed = VIEW(info, head, positions, inside)
        picked = allowed & ((x >= at_least) | ((x == tie) & (positions <= last)))
        sums, rest = add(sums, rest, tl.sum(tl.where(picked, TERM(x, top, a, b, VALUE, FAST), 0.0), axis=1))
        lower = picked & (x <= lowest)
        lowest = tl.where(lower, x, lowest)
        lowest_class = tl.where(lower, classes, lowest_class)

    rim = tl.where(rim_picked, rim, _INF)
    bottom = tl.minimum(tl.min(tl.min(lowest, axis=1), axis=0), tl.min(rim, axis=0))
    edge_class = tl.max(tl.max(tl.where(lowest == bottom, lowest_class, -1), axis=1), axis=0)
    edge_class = tl.maximum(edge_class, tl.max(tl.where(rim_picked & (rim == bottom), rim_classes, -1), axis=0))
    tl.store(pick_index_ptr, edge_class)
    tl.store(pick_logit_ptr, tl.load(row_ptr + edge_class, mask=edge_class >= 0, other=-_INF))
    return total + finish(sums, rest)
