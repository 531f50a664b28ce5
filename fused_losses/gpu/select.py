"""The k hardest negatives of a row: exact, deterministic, lowest class first among equals. Knows no formula.

A set of picks is described by its edge, the last pick: every element above it, and those equal to it up to its position
(``picked``). The edge comes from a search on ordered keys, integers of the logits' own width in the order of the
floats, by counting elements >= a key. NaN compares false everywhere: it is never counted and never picked.

What is searched and picked from is an ``Array``, a row or a list in scratch memory. A *view* says what stands at a
position:

    VIEW(info, array, first, inside, NUMBER) -> bits of which of the NUMBER elements from each position on can be picked
    HIDES(info, array, first, behind) -> whether anything from a position up to another cannot
    CLASS(info, array, positions, inside) -> classes
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .formulas import log2
from .labels import labels_above
from .rows import is_positive, rim_positions
from .words import (
    all_bits,
    at_least,
    bit_at,
    bits_of,
    count,
    element_of,
    equal,
    float_of,
    floats,
    higher,
    kept,
    key_of,
    load_words,
    masked_key,
    masks_of,
    no_words,
    number_of,
    of_thread,
    words_of,
)

_INF = tl.constexpr(float("inf"))
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

    above: tl.tensor  # every element of at least this key, above that of -inf, belongs to the set,
    tie: tl.tensor  # and those with this key
    last: tl.tensor  # up to this position
    ties: tl.tensor  # so many, of more; 0: none, or all that there are


class Winners(NamedTuple):
    """Blocks of a row, by their numbers, in order."""

    ptr: tl.tensor
    number: tl.tensor


class Moments(NamedTuple):
    """Of what can be picked: maximum, +inf if there is a NaN; NaN if there is a NaN else 0. Of a part of it: number,
    sum, sum of squares, less what is -inf."""

    top: tl.tensor
    poison: tl.tensor
    number: tl.tensor
    total: tl.tensor
    squares: tl.tensor


@triton.jit
def picked(x, positions, cut, ELEMENT: tl.constexpr):
    """Whether elements belong to a set."""
    return (x >= float_of(cut.above, ELEMENT)) | ((x == float_of(cut.tie, ELEMENT)) & (positions <= cut.last))


# --- search -----------------------------------------------------------------------------------------------------------


@triton.jit
def search(
    COUNT: tl.constexpr, source, bracket, wanted, enough, guess, ELEMENT: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr,
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
    masked = masked_key(ELEMENT)
    aim = log2((wanted + enough).to(tl.float32) * 0.5, FAST)
    log_low = log2(count_low.to(tl.float32), FAST)
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

        number = COUNT(source, middle, VECTOR, ROWS, LANES, FAST)
        log_number = log2(tl.maximum(number.to(tl.float32), 0.5), FAST)
        many = number >= wanted
        halved = many == (middle >= centre)
        stalled = tl.where(bisect | halved, 0, stalled + 1)
        low = tl.where(many, middle, low)
        count_low = tl.where(many, number, count_low)
        log_low = tl.where(many, log_number, log_low)
        high = tl.where(many, high, middle)
        count_high = tl.where(many, count_high, number)
        log_high = tl.where(many, log_high, log_number)
    return Bracket(low, high, count_low, count_high)


# --- counts -----------------------------------------------------------------------------------------------------------


@triton.jit
def count_walked(source, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr):
    """Elements of at least a key, above that of -inf, of an array in memory, less one excluded value; source is (array,
    rim, excluded)."""
    row, rim, excluded = source
    t = float_of(key, row.ptr.dtype.element_ty)
    number = _count_walked(row, key, VECTOR, ROWS, LANES, FAST)
    return number + tl.sum((rim >= t).to(tl.int32), axis=0) - (excluded >= t).to(tl.int32)


@triton.jit
def count_walked_labels(source, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr):
    """The same, less the labels of a row; source is (row, rim, target)."""
    row, rim, target = source
    t = float_of(key, row.ptr.dtype.element_ty)
    number = _count_walked(row, key, VECTOR, ROWS, LANES, FAST)
    return number + tl.sum((rim >= t).to(tl.int32), axis=0) - labels_above(target, row, t)


@triton.jit
def count_walked_multi_hot(
    source, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """The same, less the positives of a row; source is (row, rim without positives, target)."""
    row, rim, target = source
    ELEMENT: tl.constexpr = row.ptr.dtype.element_ty
    counts = tl.zeros((LANES // VECTOR,), tl.int32)
    for tile in range(tl.cdiv(row.body, ROWS * LANES)):
        words, first, inside = load_words(row, tile, ROWS * LANES // VECTOR, VECTOR, FAST)
        negative = masks_of(multi_hot_view(target, row, first, inside, VECTOR), VECTOR, ELEMENT, FAST)
        counts += count(at_least(words, key, ELEMENT, FAST) & negative, LANES // VECTOR, ELEMENT, FAST)
    return tl.sum(counts, axis=0) + tl.sum((rim >= float_of(key, ELEMENT)).to(tl.int32), axis=0)


@triton.jit
def count_listed(source, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr):
    """The same of a list in memory that is padded with -inf; source is the array."""
    return _count_walked(source, key, VECTOR, ROWS, LANES, FAST)


@triton.jit
def _count_walked(array, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr):
    ELEMENT: tl.constexpr = array.ptr.dtype.element_ty
    counts = tl.zeros((LANES // VECTOR,), tl.int32)
    for tile in range(tl.cdiv(array.body, ROWS * LANES)):
        words, _, _ = load_words(array, tile, ROWS * LANES // VECTOR, VECTOR, FAST)
        counts += count(at_least(words, key, ELEMENT, FAST), LANES // VECTOR, ELEMENT, FAST)
    return tl.sum(counts, axis=0)


@triton.jit
def count_winners(source, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr):
    """The same of the winning blocks of a row and of its rim, less one excluded value.

    source is (row, winners, elements per block (constexpr), rim, excluded).
    """
    row, winners, WIDTH, rim, excluded = source
    t = float_of(key, row.ptr.dtype.element_ty)
    return _count_winners(row, winners, WIDTH, rim, key, t, VECTOR, LANES, FAST) - (excluded >= t).to(tl.int32)


@triton.jit
def count_winners_labels(
    source, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """The same, less the labels of the row; source is (row, winners, elements per block, rim, target)."""
    row, winners, WIDTH, rim, target = source
    t = float_of(key, row.ptr.dtype.element_ty)
    return _count_winners(row, winners, WIDTH, rim, key, t, VECTOR, LANES, FAST) - labels_above(target, row, t)


@triton.jit
def _count_winners(
    row, winners, WIDTH: tl.constexpr, rim, key, t, VECTOR: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    ELEMENT: tl.constexpr = row.ptr.dtype.element_ty
    GROUPS: tl.constexpr = LANES // VECTOR
    counts = tl.zeros((GROUPS,), tl.int32)
    for tile in range(tl.cdiv(winners.number * (WIDTH // VECTOR), GROUPS)):
        words, _, _ = load_winners(row, winners, tile, WIDTH, GROUPS, FAST)
        counts += count(at_least(words, key, ELEMENT, FAST), GROUPS, ELEMENT, FAST)
    return tl.sum(counts, axis=0) + tl.sum((rim >= t).to(tl.int32), axis=0)


@triton.jit
def count_held(source, key, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr):
    """The same of a row in registers; source is (words, rim, the row)."""
    words, rim, row = source
    ELEMENT: tl.constexpr = row.ptr.dtype.element_ty
    counts = count(at_least(words, key, ELEMENT, FAST), words.shape[0] // ROWS, ELEMENT, FAST)
    return tl.sum(counts, axis=0) + tl.sum((rim >= float_of(key, ELEMENT)).to(tl.int32), axis=0)


# --- arrays -----------------------------------------------------------------------------------------------------------


@triton.jit
def index_view(target, row, first, inside, NUMBER: tl.constexpr):
    """A row whose positive is one class, or not there."""
    return all_bits(inside, NUMBER) & ~bit_at(target.column - row.head - first, NUMBER)


@triton.jit
def index_hides(target, row, first, behind):
    position = target.column - row.head
    return (target.column >= 0) & (position >= first) & (position < behind)


@triton.jit
def multi_hot_view(target, row, first, inside, NUMBER: tl.constexpr):
    lane = tl.arange(0, NUMBER)[None, :]
    positive = is_positive(target, first[:, None] + lane, inside[:, None] & (lane >= 0))
    return all_bits(inside, NUMBER) & tl.sum(tl.where(positive, 0, 1 << lane), axis=1)


@triton.jit
def hides(target, row, first, behind):
    return True


@triton.jit
def row_class(target, row, positions, inside):
    return row.head + positions


@triton.jit
def plain_view(info, array, first, inside, NUMBER: tl.constexpr):
    """An array whose elements have no class."""
    return all_bits(inside, NUMBER)


@triton.jit
def list_view(info, array, first, inside, NUMBER: tl.constexpr):
    """A list of elements in scratch memory; info is (address of the class of element 0, number of elements)."""
    listed = tl.minimum(tl.maximum(info[1] - first, 0), NUMBER)
    return tl.where(inside, (1 << listed) - 1, 0)


@triton.jit
def list_hides(info, array, first, behind):
    """What is behind the last is -inf."""
    return False


@triton.jit
def list_class(info, array, positions, inside):
    return tl.load(info[0] + positions, mask=inside, other=-1)


@triton.jit
def open_rim(array):
    """-> (elements in fp32, -inf where there is none; positions; which lanes hold one) of the rim, (2 * VECTOR,)"""
    positions, inside = rim_positions(array)
    return tl.load(array.ptr + positions, mask=inside, other=-_INF).to(tl.float32), positions, inside


@triton.jit
def load_winners(row, winners, tile, WIDTH: tl.constexpr, GROUPS: tl.constexpr, FAST: tl.constexpr):
    """``load_words`` for the winning blocks of WIDTH elements, in the order of their list, -inf behind the last."""
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    PIECES: tl.constexpr = WIDTH // VECTOR
    group = tile * GROUPS + tl.arange(0, GROUPS)
    inside = group < winners.number * PIECES
    block = tl.load(winners.ptr + group // PIECES, mask=inside, other=0)
    first = block * WIDTH + group % PIECES * VECTOR
    inside = inside & (first < row.body)
    return words_of(row.ptr + first, inside, VECTOR, FAST), first, inside


@triton.jit
def chosen_bits(words, start, first, allowed, cut, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Bits of the elements that belong to a set, of those allowed. start: the position of the first vector."""
    above = at_least(words, cut.above, ELEMENT, FAST)
    bits = bits_of(above, ELEMENT, FAST)
    if start <= cut.last:
        up_to = tl.minimum(tl.maximum(cut.last - first, -1), 30) + 1
        bits |= bits_of(equal(words, cut.tie, above, ELEMENT, FAST), ELEMENT, FAST) & ((1 << up_to) - 1)
    return bits & allowed


@triton.jit
def rank(number):
    """-> (the sum of the numbers before each; of all)"""
    return tl.cumsum(number, axis=0) - number, tl.sum(number, axis=0)


@triton.jit
def rank_rim(chosen):
    """The same for a rim, (2 * VECTOR,); what lies between its two ends is not counted."""
    ones = chosen.to(tl.int32)
    return tl.cumsum(ones, axis=0) - ones


class Ties(NamedTuple):
    """What a walk has seen of the elements that equal a value: their number, and the tile that the nth is in, or the
    last one, with their number before that."""

    seen: tl.tensor
    tile: tl.tensor
    before: tl.tensor


@triton.jit
def no_ties(in_head):
    """in_head: those in front of the first tile."""
    return Ties(in_head, in_head * 0, in_head)


@triton.jit
def see_ties(ties, tile, number, nth):
    ahead = ties.seen <= nth
    tile = tl.where(ahead, tile, ties.tile)
    return Ties(ties.seen + number, tile, tl.where(ahead, ties.seen, ties.before))


@triton.jit
def rim_ties(array, VIEW: tl.constexpr, info, value):
    """-> (which lanes of the rim equal a value and can be picked; their positions; their number in front)"""
    rim, position, inside = open_rim(array)
    tied = (rim == value) & (VIEW(info, array, position, inside, 1) != 0)
    return tied, position, tl.sum((tied & (position < 0)).to(tl.int32), axis=0)


@triton.jit
def tie_bits(
    array, VIEW: tl.constexpr, info, cut, tile, VECTOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Bits of the elements of a tile that equal the edge and can be picked."""
    ELEMENT: tl.constexpr = array.ptr.dtype.element_ty
    words, first, inside = load_words(array, tile, ROWS * LANES // VECTOR, VECTOR, FAST)
    above = at_least(words, cut.above, ELEMENT, FAST)
    bits = bits_of(equal(words, cut.tie, above, ELEMENT, FAST), ELEMENT, FAST)
    return bits & VIEW(info, array, first, inside, VECTOR)


@triton.jit
def place_of_tie(
    array, VIEW: tl.constexpr, RIM: tl.constexpr, info, cut, ties, nth, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Position of element number nth, from 0, of those that equal the edge."""
    bits = tie_bits(array, VIEW, info, cut, ties.tile, VECTOR, ROWS, LANES, FAST)
    number = number_of(bits, FAST)
    before = nth - ties.before - (tl.cumsum(number, axis=0) - number)
    here = (before >= 0) & (before < number)
    # Of one vector its number, which of its elements are ties, and how many of these come before.
    found = tl.sum(tl.where(here, tl.arange(0, ROWS * LANES // VECTOR) << 11 | bits << 3 | before, 0), axis=0)
    left = (found >> 3) & 0xFF
    for _ in range(found & 7):
        left &= left - 1
    in_vector = number_of(((left & -left) - 1) & 0xFF, FAST)
    position = ties.tile * (ROWS * LANES) + (found >> 11) * VECTOR + in_vector
    if RIM:
        rim_tied, rim_position, in_head = rim_ties(array, VIEW, info, float_of(cut.tie, array.ptr.dtype.element_ty))
        rim_nth = tl.where(nth < in_head, nth, nth - (ties.seen - in_head))
        in_rim = tl.sum(tl.where(rim_tied & (rank_rim(rim_tied) == rim_nth), rim_position, 0), axis=0)
        position = tl.where((nth < in_head) | (nth >= ties.seen), in_rim, position)
    return position


@triton.jit
def edge_of(bracket, wanted, enough, ELEMENT: tl.constexpr):
    """The Cut from what ``search`` returned, ``enough`` elements at most, the first ``wanted`` if that needs ties; of
    these the last is not yet known."""
    masked = masked_key(ELEMENT)
    cut = bracket.count_low > enough
    above = tl.where(cut, bracket.high, tl.maximum(bracket.low, masked + 1))
    last = tl.where((bracket.low == masked) & ~cut, _LAST, -_LAST)
    return Cut(above, bracket.low, last, tl.where(cut, wanted - bracket.count_high, 0))


@triton.jit
def cut_at(
    array, VIEW: tl.constexpr, RIM: tl.constexpr, info, bracket, wanted, enough, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The same, with the last tie."""
    cut = edge_of(bracket, wanted, enough, array.ptr.dtype.element_ty)
    last = cut.last
    if cut.ties > 0:
        in_head = cut.ties * 0
        if RIM:
            _tied, _position, in_head = rim_ties(array, VIEW, info, float_of(cut.tie, array.ptr.dtype.element_ty))
        ties = no_ties(in_head)
        for tile in range(tl.cdiv(array.body, ROWS * LANES)):
            number = number_of(tie_bits(array, VIEW, info, cut, tile, VECTOR, ROWS, LANES, FAST), FAST)
            ties = see_ties(ties, tile, tl.sum(number, axis=0), cut.ties - 1)
        last = place_of_tie(array, VIEW, RIM, info, cut, ties, cut.ties - 1, VECTOR, ROWS, LANES, FAST)
    return Cut(cut.above, cut.tie, last, cut.ties)


@triton.jit
def survey(
    array, VIEW: tl.constexpr, HIDES: tl.constexpr, info, rim, ROWS: tl.constexpr, LANES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The Moments of an array in memory; rim: what can be picked of it, or None."""
    ELEMENT: tl.constexpr = array.ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    highest = no_words(LANES // VECTOR, ELEMENT, FAST)
    sums = tl.zeros((TILE // VECTOR,), tl.float32)
    squares = sums
    for tile in range(tl.cdiv(array.body, TILE)):
        words, first, inside = load_words(array, tile, TILE // VECTOR, VECTOR, FAST)
        if HIDES(info, array, tile * TILE, tile * TILE + TILE):
            allowed = VIEW(info, array, first, inside, VECTOR)
            words = kept(words, masks_of(allowed, VECTOR, ELEMENT, FAST), ELEMENT, FAST)
        highest_here = of_thread(words, higher, LANES // VECTOR, ELEMENT, FAST)
        highest = higher(highest, highest_here, ELEMENT, FAST)
        x = _sample(words, ELEMENT, FAST)
        sums += tl.sum(x, axis=1)
        squares += tl.sum(x * x, axis=1)
    return _moments(highest, rim, array.body, sums, squares, ELEMENT, FAST)


@triton.jit
def survey_held(words, rim, body, THREADS: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """The same of a row in registers."""
    x = _sample(words, ELEMENT, FAST)
    highest = of_thread(words, higher, THREADS, ELEMENT, FAST)
    return _moments(highest, rim, body, tl.sum(x, axis=1), tl.sum(x * x, axis=1), ELEMENT, FAST)


@triton.jit
def _sample(words, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Of each four elements one, in fp32, 0 where that is -inf or NaN: enough for a guess."""
    GROUPS: tl.constexpr = words.shape[0]
    left, _ = tl.split(tl.reshape(words, (GROUPS, words.shape[1] // 2, 2)))
    left, _ = tl.split(tl.reshape(left, (GROUPS, left.shape[1] // 2, 2)))
    x = floats(left, ELEMENT, FAST)
    return tl.where(x > -_INF, x, 0.0)


@triton.jit
def _moments(highest, rim, body, sums, squares, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    top = tl.max(_key_or_last(element_of(highest, higher, ELEMENT, FAST)), axis=0)
    if rim is not None:
        top = tl.maximum(top, tl.max(_key_or_last(rim), axis=0))
    poisoned = top == _LAST
    top = tl.where(poisoned, _INF, float_of(top, tl.float32))
    return Moments(top, tl.where(poisoned, float("nan"), 0.0), body // 4, tl.sum(sums, axis=0), tl.sum(squares, axis=0))


@triton.jit
def _key_or_last(x):
    """In the order of the floats, NaN last: integers, whose maximum is one instruction for a warp."""
    return tl.where(x == x, key_of(x, tl.float32), _LAST)


@triton.jit
def guess(moments, quantile, reach):
    """Where a normal distribution with these moments has its upper quantile."""
    number = tl.maximum(moments.number, 1).to(tl.float32)
    mean = moments.total / number
    deviation = tl.sqrt(tl.maximum(moments.squares / number - mean * mean, 0.0))
    return Guess(mean + deviation * quantile, deviation * reach)
