"""What is written of the picks of a row: all of them in the compact form, the edge in the threshold form.

EMIT(picks, array, VIEW, HIDES, CLASS, info, bracket, SUM, SMOOTH, p, q, FAST, ROW, VECTOR, ROWS, LANES)
    -> (sum of phi or of shares over the picks; sum of SMOOTH, or 0 where that is None)

ROW: the array is a row, with a rim, of which few elements are picks; else a list, of which many are.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .select import (
    chosen_bits,
    cut_at,
    edge_of,
    no_ties,
    open_rim,
    picked,
    place_of_tie,
    rank,
    rank_rim,
    rim_ties,
    see_ties,
)
from .sums import add, fold, sum_of
from .words import (
    at_least,
    columns,
    count,
    element_of,
    equal,
    float_of,
    floats,
    kept,
    load_words,
    lower,
    masked_key,
    masks_of,
    number_of,
    of_vector,
)

_INF = tl.constexpr(float("inf"))
_NOWHERE = tl.constexpr(-(2**31))


class Picks(NamedTuple):
    """Where a row's picks go."""

    index_ptr: tl.tensor
    logit_ptr: tl.tensor
    slots: tl.tensor  # of the compact form: k
    wanted: tl.tensor  # how many there are, at most slots
    row_ptr: tl.tensor  # to the logit of class 0


# --- forms ------------------------------------------------------------------------------------------------------------


@triton.jit
def emit_compact(
    picks, array, VIEW: tl.constexpr, HIDES: tl.constexpr, CLASS: tl.constexpr, info, bracket, SUM: tl.constexpr,
    SMOOTH: tl.constexpr, p, q, FAST: tl.constexpr, ROW: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Writes the picks, (k,), in order of their classes, and returns the sums over them.

    No slot behind ``wanted`` is written, whatever a row with a NaN, where counts need not agree, would ask for.
    """
    ELEMENT: tl.constexpr = picks.logit_ptr.dtype.element_ty
    GROUPS: tl.constexpr = LANES // VECTOR
    cut = cut_at(array, VIEW, ROW, info, bracket, picks.wanted, picks.wanted, VECTOR, ROWS, LANES, FAST)
    sums = tl.zeros((GROUPS,), tl.float32)
    rest, s, s_rest = sums, sums, sums
    in_head = picks.wanted * 0
    if ROW:
        rim, rim_position, rim_inside = open_rim(array)
        rim_picked = (VIEW(info, array, rim_position, rim_inside, 1) != 0) & picked(rim, rim_position, cut, ELEMENT)
        in_tail = rim_position >= 0
        in_head = tl.sum((rim_picked & ~in_tail).to(tl.int32), axis=0)
    taken = in_head
    for tile in range(tl.cdiv(array.body, LANES)):
        words, first, inside = load_words(array, tile, GROUPS, VECTOR, FAST)
        bits = chosen_bits(words, tile * LANES, first, VIEW(info, array, first, inside, VECTOR), cut, ELEMENT, FAST)
        number = number_of(bits, FAST)
        before, of_all = rank(number)
        slot = taken + before
        taken += of_all
        if ROW:  # a turn for each pick of the thread that has most
            for _ in range(tl.max(number, axis=0)):
                some = bits != 0
                position = first + number_of(((bits & -bits) - 1) & 0xFF, FAST)
                x = tl.load(array.ptr + position, mask=some, other=-_INF)
                z = x.to(tl.float32)
                sums, rest = add(sums, rest, SUM(z[None, :], p, q, FAST, 1))
                if SMOOTH is not None:
                    s, s_rest = add(s, s_rest, tl.where(some, SMOOTH(z, p, q), 0.0))
                room = some & (slot < picks.wanted)
                tl.store(picks.index_ptr + slot, CLASS(info, array, position, room), mask=room)
                tl.store(picks.logit_ptr + slot, x, mask=room)
                bits &= bits - 1
                slot += 1
        else:
            masks = masks_of(bits, VECTOR, ELEMENT, FAST)
            z = tl.reshape(floats(kept(words, masks, ELEMENT, FAST), ELEMENT, FAST), (1, LANES))
            sums, rest = add(sums, rest, SUM(z, p, q, FAST, VECTOR))
            if SMOOTH is not None:
                x = floats(words, ELEMENT, FAST)
                chosen = (bits[:, None] >> tl.arange(0, VECTOR)[None, :]) & 1
                s, s_rest = add(s, s_rest, tl.sum(tl.where(chosen != 0, SMOOTH(x, p, q), 0.0), axis=1))
            values = columns(words, ELEMENT, FAST)
            for i in tl.static_range(VECTOR):
                room = (((bits >> i) & 1) != 0) & (slot < picks.wanted)
                tl.store(picks.index_ptr + slot, CLASS(info, array, first + i, room), mask=room)
                tl.store(picks.logit_ptr + slot, values[i], mask=room)
                slot += (bits >> i) & 1

    total = sum_of(sums, rest)
    smoothed = 0.0
    if SMOOTH is not None:
        smoothed = sum_of(s, s_rest)
    if ROW:
        rim_slots = rank_rim(rim_picked) + tl.where(in_tail, taken - in_head, 0)
        room = rim_picked & (rim_slots < picks.wanted)
        tl.store(picks.index_ptr + rim_slots, CLASS(info, array, rim_position, room), mask=room)
        tl.store(picks.logit_ptr + rim_slots, rim.to(ELEMENT), mask=room)
        taken += tl.sum((rim_picked & in_tail).to(tl.int32), axis=0)
        total += tl.sum(SUM(tl.where(rim_picked, rim, -_INF)[None, :], p, q, FAST, 1), axis=0)
        if SMOOTH is not None:
            smoothed += tl.sum(tl.where(rim_picked, SMOOTH(rim, p, q), 0.0), axis=0)
    for start in range(tl.minimum(taken, picks.wanted), picks.slots, GROUPS):  # empty slots
        slot = start + tl.arange(0, GROUPS)
        tl.store(picks.index_ptr + slot, -1, mask=slot < picks.slots)
        nothing = tl.full((GROUPS,), -_INF, tl.float32).to(ELEMENT)
        tl.store(picks.logit_ptr + slot, nothing, mask=slot < picks.slots)
    return total, smoothed


@triton.jit
def emit_threshold(
    picks, array, VIEW: tl.constexpr, HIDES: tl.constexpr, CLASS: tl.constexpr, info, bracket, SUM: tl.constexpr,
    SMOOTH: tl.constexpr, p, q, FAST: tl.constexpr, ROW: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Writes the edge, the last pick in the order of picking, (1,), and returns the sums over the picks.

    Picks that equal the edge where others do that are none are summed as one, times their number.
    """
    ELEMENT: tl.constexpr = picks.logit_ptr.dtype.element_ty
    TILE: tl.constexpr = ROWS * LANES
    GROUPS: tl.constexpr = TILE // VECTOR
    cut = edge_of(bracket, picks.wanted, picks.wanted, ELEMENT)
    value = float_of(cut.tie, ELEMENT)
    rim, rim_position, rim_inside = open_rim(array)
    rim_allowed = VIEW(info, array, rim_position, rim_inside, 1) != 0
    rim_above = rim_allowed & (rim >= float_of(cut.above, ELEMENT))
    sums = tl.zeros((LANES // VECTOR,), tl.float32)
    rest, s, s_rest = sums, sums, sums
    counts = tl.zeros((LANES // VECTOR,), tl.int32)
    lowest = tl.full((GROUPS,), _INF, tl.float32)  # of every thread's vectors, and its last tile
    lowest_tile = tl.full((GROUPS,), -1, tl.int32)
    _tied, _position, in_head = rim_ties(array, VIEW, info, value)
    ties = no_ties(in_head)
    for tile in range(tl.cdiv(array.body, TILE)):
        words, first, inside = load_words(array, tile, GROUPS, VECTOR, FAST)
        masks = at_least(words, cut.above, ELEMENT, FAST)
        hidden = HIDES(info, array, tile * TILE, tile * TILE + TILE) | (cut.tie == masked_key(ELEMENT))
        if hidden:
            masks &= masks_of(VIEW(info, array, first, inside, VECTOR), VECTOR, ELEMENT, FAST)
        z = tl.reshape(floats(kept(words, masks, ELEMENT, FAST), ELEMENT, FAST), (ROWS, LANES))
        sums, rest = add(sums, rest, SUM(z, p, q, FAST, VECTOR))
        if SMOOTH is not None:
            s, s_rest = add(s, s_rest, fold(tl.where(z > -_INF, SMOOTH(z, p, q), 0.0), VECTOR))
            counts += count(masks, LANES // VECTOR, ELEMENT, FAST)
        if (cut.ties > 0) | (cut.last >= 0):
            equals = equal(words, cut.tie, masks, ELEMENT, FAST)
            if hidden:
                equals &= masks_of(VIEW(info, array, first, inside, VECTOR), VECTOR, ELEMENT, FAST)
            number = tl.sum(count(equals, LANES // VECTOR, ELEMENT, FAST), axis=0)
            ties = see_ties(ties, tile, number, cut.ties - 1)
            masks |= equals
        if cut.ties == 0:
            kept_here = kept(words, masks, ELEMENT, FAST, _INF)
            lowest_here = element_of(of_vector(kept_here, lower, ELEMENT, FAST), lower, ELEMENT, FAST)
            lower_here = (lowest_here <= lowest) & (tl.sum(masks, axis=1) != 0)
            lowest_tile = tl.where(lower_here, tile, lowest_tile)
            lowest = tl.where(lower_here, lowest_here, lowest)

    if cut.ties > 0:
        position = place_of_tie(array, VIEW, ROW, info, cut, ties, cut.ties - 1, VECTOR, ROWS, LANES, FAST)
    else:
        rim_picked = rim_allowed & picked(rim, rim_position, cut, ELEMENT)
        rim_lowest = tl.where(rim_picked, rim, _INF)
        bottom = tl.minimum(tl.min(lowest, axis=0), tl.min(rim_lowest, axis=0))
        vector = tl.max(tl.where(lowest == bottom, lowest_tile * GROUPS + tl.arange(0, GROUPS), -1), axis=0)
        lane = vector * VECTOR + tl.arange(0, VECTOR)
        allowed = VIEW(info, array, lane, (lane >= 0) & (lane < array.body), 1) != 0
        x = tl.load(array.ptr + lane, mask=allowed, other=float("nan")).to(tl.float32)
        position = tl.max(tl.where(x == bottom, lane, _NOWHERE), axis=0)
        in_rim = tl.max(tl.where(rim_picked & (rim == bottom), rim_position, _NOWHERE), axis=0)
        position = tl.maximum(position, in_rim)
    found = (position >= -array.head) & (position < array.length - array.head)
    edge_class = tl.where(found, CLASS(info, array, position, found), -1)
    tl.store(picks.index_ptr, edge_class)
    tl.store(picks.logit_ptr, tl.load(picks.row_ptr + edge_class, mask=edge_class >= 0, other=-_INF))

    VACANT: tl.constexpr = rim.shape[0] // 2 - 1  # the lane behind the longest head
    of_ties = (tl.arange(0, rim.shape[0]) == VACANT) & (cut.ties > 0)
    of_rim = SUM(tl.where(of_ties, value, tl.where(rim_above, rim, -_INF))[None, :], p, q, FAST, 1)
    total = sum_of(sums, rest) + tl.sum(tl.where(of_ties, cut.ties.to(tl.float32) * of_rim, of_rim), axis=0)
    smoothed = 0.0
    if SMOOTH is not None:
        smoothed = sum_of(s, s_rest) + tl.sum(tl.where(rim_above, SMOOTH(rim, p, q), 0.0), axis=0)
        ties = picks.wanted - tl.sum(counts, axis=0) - tl.sum(rim_above.to(tl.int32), axis=0)
        smoothed += tl.where(ties > 0, ties.to(tl.float32) * SMOOTH(value, p, q), 0.0)
    return total, smoothed
