"""The k hardest negatives of a row: exact, deterministic, lowest class first among equals. Knows no formula.

A set of picks is described by its edge, the last pick: every element above it, and those equal to it up to its position
(``picked``). The edge comes from a search on ordered keys, integers of the logits' own width in the order of the
floats, by counting elements >= a key. NaN compares false everywhere: it is never counted and never picked.

What is searched and picked from is an ``Array``, a row or a list in scratch memory. A *view* says what stands at a
position:

    VIEW(info, array, positions, inside) -> (classes, whether the element can be picked)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .labels import labels_above
from .rows import is_positive, load_tile, rim_positions, tile_lanes

_INF = tl.constexpr(float("inf"))
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_LAST = tl.constexpr(2**31 - 1)  # behind every position


class Bracket(NamedTuple):
    """Two keys, low < high, and how many elements are at or above each."""

    low: tl.tensor
    high: tl.tensor
    count_low: tl.tensor
    count_high: tl.tensor


class Guess(NamedTuple):
    first: tl.tensor  # the value to try first; NaN: none
    reach: tl.tensor  # how far below it the number of elements above has doubled


class Cut(NamedTuple):
    """The edge of a set of picks."""

    edge: tl.tensor
    last: tl.tensor  # the position up to which elements equal to it belong to the set


class Winners(NamedTuple):
    """Blocks of a row, by their numbers, in order."""

    ptr: tl.tensor
    number: tl.tensor


class Moments(NamedTuple):
    """Of what can be picked: maximum, NaN if there is a NaN else 0, sum, sum of squares; sums leave out -inf."""

    top: tl.tensor
    poison: tl.tensor
    total: tl.tensor
    squares: tl.tensor


@triton.jit
def picked(x, positions, cut):
    """Whether elements belong to a set: of those equal to the edge, the first ones."""
    return (x > cut.edge) | ((x == cut.edge) & (positions <= cut.last))


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
    COUNT: tl.constexpr, source, bracket, wanted, enough, guess, ELEMENT: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Narrows a bracket with count(low) >= wanted > count(high) until count(low) <= enough or low and high are
    neighbours.

    count(high) is 0 at the start. Every step but a guess assumes that the log of the count falls linearly between two
    finite ends, as it nearly does in the upper tail of most distributions, and by 1 (base 2) in ``reach`` as long as
    the lower end is as low as can be. A NaN, or two steps in a row that did not halve the interval, ask for its middle,
    so the worst case stays logarithmic; before the first middle, for everything finite, which settles a row that is
    masked but for fewer than ``wanted``. wanted = 0 with count(low) = 0 returns at once.
    """
    low, high, count_low, count_high = bracket.low, bracket.high, bracket.count_low, bracket.count_high
    first = guess.first
    masked = key_of(tl.full((), -_INF, tl.float32), ELEMENT)
    aim = tl.log2((wanted + enough).to(tl.float32) * 0.5)
    log_low = tl.log2(count_low.to(tl.float32))
    log_high = tl.full((), -1.0, tl.float32)  # as if half an element
    stalled = wanted * 0
    while (count_low > enough) & (low + 1 < high):  # the difference of two fp32 keys need not fit 32 bits
        share = (log_low - aim) / (log_low - log_high)
        share += tl.where(share < 0.5, 0.02, -0.02)  # into the longer part: both ends shall move
        below = float_of(low, ELEMENT)
        above = float_of(high, ELEMENT)
        probe = tl.where(
            low <= masked + 1, above + (log_high - aim - 0.1) * guess.reach, below + (above - below) * share
        )
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
    return Bracket(low, high, count_low, count_high)


# --- counts -----------------------------------------------------------------------------------------------------------


@triton.jit
def count_walked(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of an array in memory, less one excluded value; source is (array, rim, excluded)."""
    array, rim, excluded = source
    return _count_walked(array, rim, t, ROWS, LANES) - (excluded >= t).to(tl.int32)


@triton.jit
def count_walked_labels(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The same, less the labels of a row; source is (row, rim, target)."""
    row, rim, target = source
    return _count_walked(row, rim, t, ROWS, LANES) - labels_above(target, row, t)


@triton.jit
def _count_walked(array, rim, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    counts = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(array.body, ROWS * LANES)):
        counts += tl.sum((load_tile(array, tile, ROWS, LANES) >= t).to(tl.int32), axis=0)
    return tl.sum(counts, axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0)


@triton.jit
def count_walked_multi_hot(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of a row in memory that are not positives; source is (row, rim, target)."""
    row, rim, target = source
    counts = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(row.body, ROWS * LANES)):
        positions = tile * (ROWS * LANES) + tile_lanes(ROWS, LANES)
        above = load_tile(row, tile, ROWS, LANES) >= t
        counts += tl.sum((above & ~is_positive(target, positions, positions < row.body)).to(tl.int32), axis=0)
    return tl.sum(counts, axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0)


@triton.jit
def count_winners(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of the winning blocks of a row and of its rim, less one excluded value.

    source is (row, winners, elements per block (constexpr), rim, excluded).
    """
    row, winners, WIDTH, rim, excluded = source
    return _count_winners(row, winners, WIDTH, rim, t, LANES) - (excluded >= t).to(tl.int32)


@triton.jit
def count_winners_labels(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The same, less the labels of the row; source is (row, winners, elements per block, rim, target)."""
    row, winners, WIDTH, rim, target = source
    return _count_winners(row, winners, WIDTH, rim, t, LANES) - labels_above(target, row, t)


@triton.jit
def _count_winners(row, winners, WIDTH: tl.constexpr, rim, t, LANES: tl.constexpr):
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    GROUPS: tl.constexpr = LANES // VECTOR
    counts = tl.zeros((GROUPS,), tl.int32)
    for tile in range(tl.cdiv(winners.number * (WIDTH // VECTOR), GROUPS)):
        x, _, _ = load_winners(row, winners, tile, WIDTH, GROUPS)
        counts += tl.sum((x >= t).to(tl.int32), axis=1)
    return tl.sum(counts, axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0)


@triton.jit
def count_held(source, t, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements >= t, t > -inf, of a row in registers; source is (x (ROWS, LANES), rim)."""
    x, rim = source
    return tl.sum(tl.sum((x >= t).to(tl.int32), axis=0), axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0)


# --- arrays -----------------------------------------------------------------------------------------------------------


@triton.jit
def index_view(target, row, positions, inside):
    """A row whose positive is one class, or not there."""
    return row.head + positions, inside & (row.head + positions != target.column)


@triton.jit
def multi_hot_view(target, row, positions, inside):
    return row.head + positions, inside & ~is_positive(target, positions, inside)


@triton.jit
def plain_view(info, array, positions, inside):
    """An array whose elements have no class."""
    return positions, inside


@triton.jit
def list_view(info, array, positions, inside):
    """A list of elements in scratch memory; info is (address of the class of element 0, number of elements)."""
    listed = inside & (positions < info[1])
    return tl.load(info[0] + positions, mask=listed, other=-1), listed


@triton.jit
def open_rim(array):
    """-> (elements in fp32, -inf where there is none; positions; which lanes hold one) of the rim, (2 * VECTOR,)"""
    positions, inside = rim_positions(array)
    return tl.load(array.ptr + positions, mask=inside, other=-_INF).to(tl.float32), positions, inside


@triton.jit
def load_groups(array, tile, GROUPS: tl.constexpr):
    """-> (elements in fp32, -inf behind the body; positions, in order; inside) of a tile of vectors, (GROUPS,
    VECTOR)"""
    VECTOR: tl.constexpr = 128 // array.ptr.dtype.element_ty.primitive_bitwidth
    lanes = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    offset = tile * (GROUPS * VECTOR)
    inside = lanes < array.body - offset
    x = tl.load(array.ptr + offset + lanes, mask=inside, other=-_INF).to(tl.float32)
    return x, offset + lanes, inside


@triton.jit
def load_winners(row, winners, tile, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The same for the winning blocks of WIDTH elements, in the order of their list, -inf behind the last."""
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    PIECES: tl.constexpr = WIDTH // VECTOR
    group = tile * GROUPS + tl.arange(0, GROUPS)
    block = tl.load(winners.ptr + group // PIECES, mask=group < winners.number * PIECES, other=0)
    positions = (block * WIDTH + group % PIECES * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = (group < winners.number * PIECES)[:, None] & (positions < row.body)
    return tl.load(row.ptr + positions, mask=inside, other=-_INF).to(tl.float32), positions, inside


@triton.jit
def rank(chosen):
    """-> (number of chosen elements before each, in row-major order, (GROUPS, VECTOR); number of all)"""
    ones = chosen.to(tl.int32)
    in_group = tl.sum(ones, axis=1)
    before = tl.cumsum(in_group, axis=0) - in_group
    return before[:, None] + tl.cumsum(ones, axis=1) - ones, tl.sum(in_group, axis=0)


@triton.jit
def rank_rim(chosen):
    """The same for a rim, (2 * VECTOR,); what lies between its two ends is not counted."""
    ones = chosen.to(tl.int32)
    return tl.cumsum(ones, axis=0) - ones


@triton.jit
def nth_tie(array, VIEW: tl.constexpr, info, tie, nth, GROUPS: tl.constexpr):
    """Position of element number nth, from 0, of those that equal ``tie`` and can be picked."""
    rim, rim_position, rim_inside = open_rim(array)
    rim_tied = (rim == tie) & VIEW(info, array, rim_position, rim_inside)[1]
    in_head = tl.sum((rim_tied & (rim_position < 0)).to(tl.int32), axis=0)

    seen = in_head
    last_tile = nth * 0
    before_last = in_head
    for tile in range(tl.cdiv(array.body, GROUPS * (rim.shape[0] // 2))):
        x, positions, inside = load_groups(array, tile, GROUPS)
        tied = (x == tie) & VIEW(info, array, positions, inside)[1]
        last_tile = tl.where(seen <= nth, tile, last_tile)
        before_last = tl.where(seen <= nth, seen, before_last)
        seen += tl.sum(tl.sum(tied.to(tl.int32), axis=1), axis=0)

    x, positions, inside = load_groups(array, last_tile, GROUPS)
    tied = (x == tie) & VIEW(info, array, positions, inside)[1]
    ranks, _ = rank(tied)
    in_body = tl.sum(tl.sum(tl.where(tied & (ranks == nth - before_last), positions, 0), axis=1), axis=0)
    rim_nth = tl.where(nth < in_head, nth, nth - (seen - in_head))
    in_rim = tl.sum(tl.where(rim_tied & (rank_rim(rim_tied) == rim_nth), rim_position, 0), axis=0)
    return tl.where((nth < in_head) | (nth >= seen), in_rim, in_body)


@triton.jit
def cut_at(array, VIEW: tl.constexpr, info, bracket, wanted, enough, GROUPS: tl.constexpr):
    """The Cut from what ``search`` returned: ``enough`` elements at most, the first ``wanted`` if that needs ties."""
    edge = float_of(bracket.low, array.ptr.dtype.element_ty)
    last = wanted * 0 + _LAST
    if bracket.count_low > enough:
        last = nth_tie(array, VIEW, info, edge, wanted - bracket.count_high - 1, GROUPS)
    return Cut(edge, last)


@triton.jit
def survey(array, VIEW: tl.constexpr, info, rim, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The Moments of an array in memory."""
    highest = tl.full((ROWS, LANES), -_INF, tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    for tile in range(tl.cdiv(array.body, ROWS * LANES)):
        x = load_tile(array, tile, ROWS, LANES)
        positions = tile * (ROWS * LANES) + tile_lanes(ROWS, LANES)
        x = tl.where(VIEW(info, array, positions, positions < array.body)[1], x, -_INF)
        highest = tl.maximum(highest, x, propagate_nan=_ALL)
        finite = tl.where(x > -_INF, x, 0.0)
        sums += tl.sum(finite, axis=0)
        squares += tl.sum(finite * finite, axis=0)
    return _moments(highest, rim, sums, squares)


@triton.jit
def survey_held(x, rim):
    """The same of a row in registers, (ROWS, LANES)."""
    finite = tl.where(x > -_INF, x, 0.0)
    return _moments(x, rim, tl.sum(finite, axis=0), tl.sum(finite * finite, axis=0))


@triton.jit
def _moments(highest, rim, sums, squares):
    nans = tl.sum(tl.sum((highest != highest).to(tl.int32), axis=0), axis=0) + tl.sum((rim != rim).to(tl.int32), axis=0)
    top = tl.max(tl.max(tl.where(highest == highest, highest, -_INF), axis=0), axis=0)
    top = tl.maximum(top, tl.max(tl.where(rim == rim, rim, -_INF), axis=0))
    finite = tl.where(rim > -_INF, rim, 0.0)
    total = tl.sum(sums, axis=0) + tl.sum(finite, axis=0)
    total_of_squares = tl.sum(squares, axis=0) + tl.sum(finite * finite, axis=0)
    return Moments(top, tl.where(nans > 0, float("nan"), 0.0), total, total_of_squares)


@triton.jit
def guess(moments, number, quantile, reach):
    """Where a normal distribution with these moments has its upper quantile."""
    number = tl.maximum(number, 1).to(tl.float32)
    mean = moments.total / number
    deviation = tl.sqrt(tl.maximum(moments.squares / number - mean * mean, 0.0))
    return Guess(mean + deviation * quantile, deviation * reach)
