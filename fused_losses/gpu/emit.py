"""What is written of the picks of a row: all of them in the compact form, the edge in the threshold form.

EMIT(picks, array, VIEW, info, cut, TERM, SMOOTH, p, q, FAST, GROUPS) -> (sum of TERM over the picks, sum of SMOOTH,
    or 0 where that is None)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .select import load_groups, open_rim, picked, rank_rim
from .sums import add, sum_of

_INF = tl.constexpr(float("inf"))


class Picks(NamedTuple):
    """Where a row's picks go."""

    index_ptr: tl.tensor
    logit_ptr: tl.tensor
    slots: tl.tensor  # of the compact form: k
    wanted: tl.tensor  # how many there are, at most slots
    row_ptr: tl.tensor  # to the logit of class 0


# --- elements in order ------------------------------------------------------------------------------------------------


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
def rank_columns(chosen):
    """-> (which elements are chosen, as columns; number of chosen elements before each, in row-major order; number of
    all)"""
    ones = columns(chosen.to(tl.int32))
    in_group = tl.sum(chosen.to(tl.int32), axis=1)
    before = tl.cumsum(in_group, axis=0) - in_group
    ranks = (before,)
    for i in tl.static_range(chosen.shape[1] - 1):
        before = before + ones[i]
        ranks = ranks + (before,)  # noqa: RUF005
    return ones, ranks, tl.sum(in_group, axis=0)


@triton.jit
def store_columns(ptr, ranks, chosen, room, values):
    """Writes the chosen elements of values (GROUPS, VECTOR) one behind the other, as far as there is room.

    One store of the whole tile would be laid out anew, element by element through shared memory: its addresses are
    scattered.
    """
    of_column = columns(values)
    for i in tl.static_range(values.shape[1]):
        tl.store(ptr + ranks[i], of_column[i], mask=(chosen[i] != 0) & (ranks[i] < room))


# --- forms ------------------------------------------------------------------------------------------------------------


@triton.jit
def _smoothed(s, rest, rim, rim_picked, SMOOTH: tl.constexpr, p, q):
    """The sum of SMOOTH over the picks from that of the body."""
    if SMOOTH is None:
        total = 0.0
    else:
        total = sum_of(s, rest) + tl.sum(tl.where(rim_picked, SMOOTH(rim, p, q), 0.0), axis=0)
    return total


@triton.jit
def emit_compact(
    picks, array, VIEW: tl.constexpr, info, cut, TERM: tl.constexpr, SMOOTH: tl.constexpr, p, q,
    FAST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Writes the picks, (k,), in order of their classes, and returns the sums over them.

    No slot behind ``wanted`` is written, whatever a row with a NaN, where counts need not agree, would ask for.
    """
    element = picks.logit_ptr.dtype.element_ty
    rim, rim_position, rim_inside = open_rim(array)
    rim_classes, rim_allowed = VIEW(info, array, rim_position, rim_inside)
    rim_picked = rim_allowed & picked(rim, rim_position, cut)
    in_tail = rim_position >= 0
    sums = tl.zeros((GROUPS,), tl.float32)
    rest, s, s_rest = sums, sums, sums
    in_head = tl.sum((rim_picked & ~in_tail).to(tl.int32), axis=0)
    taken = in_head
    for tile in range(tl.cdiv(array.body, GROUPS * (rim.shape[0] // 2))):
        x, positions, inside = load_groups(array, tile, GROUPS)
        classes, allowed = VIEW(info, array, positions, inside)
        chosen = allowed & picked(x, positions, cut)
        sums, rest = add(sums, rest, tl.sum(tl.where(chosen, TERM(x, p, q, FAST), 0.0), axis=1))
        if SMOOTH is not None:
            s, s_rest = add(s, s_rest, tl.sum(tl.where(chosen, SMOOTH(x, p, q), 0.0), axis=1))
        chosen_columns, ranks, number = rank_columns(chosen)
        store_columns(picks.index_ptr + taken, ranks, chosen_columns, picks.wanted - taken, classes)
        store_columns(picks.logit_ptr + taken, ranks, chosen_columns, picks.wanted - taken, x.to(element))
        taken += number

    rim_slots = rank_rim(rim_picked) + tl.where(in_tail, taken - in_head, 0)
    tl.store(picks.index_ptr + rim_slots, rim_classes, mask=rim_picked & (rim_slots < picks.wanted))
    tl.store(picks.logit_ptr + rim_slots, rim.to(element), mask=rim_picked & (rim_slots < picks.wanted))
    taken += tl.sum((rim_picked & in_tail).to(tl.int32), axis=0)
    for start in range(tl.minimum(taken, picks.wanted), picks.slots, GROUPS):  # empty slots
        slot = start + tl.arange(0, GROUPS)
        tl.store(picks.index_ptr + slot, -1, mask=slot < picks.slots)
        nothing = tl.full((GROUPS,), -_INF, tl.float32).to(element)
        tl.store(picks.logit_ptr + slot, nothing, mask=slot < picks.slots)
    total = sum_of(sums, rest) + tl.sum(tl.where(rim_picked, TERM(rim, p, q, FAST), 0.0), axis=0)
    return total, _smoothed(s, s_rest, rim, rim_picked, SMOOTH, p, q)


@triton.jit
def emit_threshold(
    picks, array, VIEW: tl.constexpr, info, cut, TERM: tl.constexpr, SMOOTH: tl.constexpr, p, q,
    FAST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Writes the edge, the last pick in the order of picking, (1,), and returns the sums over the picks."""
    rim, rim_position, rim_inside = open_rim(array)
    rim_classes, rim_allowed = VIEW(info, array, rim_position, rim_inside)
    rim_picked = rim_allowed & picked(rim, rim_position, cut)
    total = tl.sum(tl.where(rim_picked, TERM(rim, p, q, FAST), 0.0), axis=0)
    VECTOR: tl.constexpr = rim.shape[0] // 2
    sums = tl.zeros((GROUPS,), tl.float32)
    rest, s, s_rest = sums, sums, sums
    lowest = tl.full((GROUPS, VECTOR), _INF, tl.float32)  # of every lane, and its highest class
    lowest_class = tl.full((GROUPS, VECTOR), -1, tl.int32)
    for tile in range(tl.cdiv(array.body, GROUPS * VECTOR)):
        x, positions, inside = load_groups(array, tile, GROUPS)
        classes, allowed = VIEW(info, array, positions, inside)
        chosen = allowed & picked(x, positions, cut)
        sums, rest = add(sums, rest, tl.sum(tl.where(chosen, TERM(x, p, q, FAST), 0.0), axis=1))
        if SMOOTH is not None:
            s, s_rest = add(s, s_rest, tl.sum(tl.where(chosen, SMOOTH(x, p, q), 0.0), axis=1))
        lower = chosen & (x <= lowest)
        lowest = tl.where(lower, x, lowest)
        lowest_class = tl.where(lower, classes, lowest_class)

    smoothed = _smoothed(s, s_rest, rim, rim_picked, SMOOTH, p, q)
    rim = tl.where(rim_picked, rim, _INF)
    bottom = tl.minimum(tl.min(tl.min(lowest, axis=1), axis=0), tl.min(rim, axis=0))
    edge_class = tl.max(tl.max(tl.where(lowest == bottom, lowest_class, -1), axis=1), axis=0)
    edge_class = tl.maximum(edge_class, tl.max(tl.where(rim_picked & (rim == bottom), rim_classes, -1), axis=0))
    tl.store(picks.index_ptr, edge_class)
    tl.store(picks.logit_ptr, tl.load(picks.row_ptr + edge_class, mask=edge_class >= 0, other=-_INF))
    return total + sum_of(sums, rest), smoothed
