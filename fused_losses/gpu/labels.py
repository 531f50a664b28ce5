"""Rows with several labels: what they are, a walk around them, a view without them, and what is written at them.

The labels of a row ascend, -1 behind the last. A walk holds the next one as a number, so that only the tiles with a
label in them, and the last one, are masked; every other tile costs what it costs without labels. Labels in another
order may be walked over, but lead to no access outside the row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import load_tile, part_of, rim_positions
from .words import all_bits, bit_at

_INF = tl.constexpr(float("inf"))
CHUNK = tl.constexpr(32)  # labels at a time


class LabelSet(NamedTuple):
    """The labels of one row; what a ``rows.Target`` says of it as well."""

    column: tl.tensor  # the first label's place among the classes at hand, -1 if it is not there
    ignored: tl.tensor
    bad: tl.tensor  # some label is no class at all
    ptr: tl.tensor
    number: tl.tensor  # of places for labels
    first_class: tl.tensor
    num_classes: tl.tensor


@triton.jit
def label_target(labels, row, num_classes, VECTOR: tl.constexpr):
    ptr = labels.ptr + row * labels.stride
    ignored = tl.full((), False, tl.int1)
    if labels.ignore_index is not None:
        ignored = tl.load(ptr) == -1
    # One by one: what the compiler knows of the alignment of a loop's addresses is lost where a reduction bounds it.
    bad = tl.full((), False, tl.int1)
    for place in range(labels.number):
        label = tl.load(ptr + place)
        bad |= (label < -1) | (label >= labels.all_classes)
    column = _column(tl.load(ptr), labels.first_class, num_classes)
    return LabelSet(column, ignored, bad, ptr, labels.number, labels.first_class, num_classes)


@triton.jit
def _column(label, first_class, num_classes):
    column = label - first_class
    here = (label >= 0) & (column >= 0) & (column < num_classes)
    return tl.where(here, column, -1).to(tl.int32)


@triton.jit
def column_of_label(target, place):
    """Among the classes at hand; -1, a class of no row, in an empty place and for a class that is not there."""
    label = tl.load(target.ptr + place, mask=place < target.number, other=-1)
    return _column(label, target.first_class, target.num_classes)


@triton.jit
def without_labels(target, row, positions, allowed):
    for place in range(target.number):
        allowed = allowed & (positions != column_of_label(target, place) - row.head)
    return allowed


@triton.jit
def hide(x, place, VECTOR: tl.constexpr):
    """A tile (ROWS, LANES) with -inf at one place of its row-major order, if that is one of its places.

    Each thread compares the number of one of its own elements with constants: the places of all of them would take as
    many registers as the tile.
    """
    ROWS: tl.constexpr = x.shape[0]
    LANES: tl.constexpr = x.shape[1]
    thread = place % LANES // VECTOR
    own = tl.where(
        (tl.arange(0, LANES // VECTOR) == thread) & (place >= 0), place // LANES * VECTOR + place % VECTOR, -1
    )
    elements = tl.arange(0, ROWS)[:, None, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    hidden = tl.where(own[None, :, None] == elements, -_INF, tl.reshape(x, (ROWS, LANES // VECTOR, VECTOR)))
    return tl.reshape(hidden, (ROWS, LANES))


# --- the walk over all negatives --------------------------------------------------------------------------------------


@triton.jit
def walk_around_labels(
    row, target, a, b, SUM: tl.constexpr, FAST: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr,
    END: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """This program's part of a row -> the four numbers of END.

    What is summed, and how, stands in three functions; a state is a tuple, one number of each for every thread.

        START(LANES, VECTOR) -> state
        STEP(state, x (ROWS, LANES), a, b, SUM, FAST, WHOLE, VECTOR) -> state; labels and padding are -inf in x, but
            where the tile is WHOLE there are none
        END(state, rim, inside, number, a, b, SUM, FAST) -> four numbers; number: elements of the body in S
    """
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    first, behind = part_of(row, TILE)
    number = tl.maximum(tl.minimum(behind * TILE, row.body) - first * TILE, 0)
    place = first * 0
    position = column_of_label(target, place) - row.head
    state = START(LANES, VECTOR)
    tile = first
    while tile < behind:
        while (place < target.number) & (position < tile * TILE):
            place += 1
            position = column_of_label(target, place) - row.head
        masked = tl.where(place < target.number, tl.minimum(position // TILE, behind - 1), behind - 1)
        for i in range(tile, masked):
            state = STEP(state, load_tile(row, i, ROWS, LANES), a, b, SUM, FAST, True, VECTOR)
        x = load_tile(row, masked, ROWS, LANES)
        while (place < target.number) & (position < (masked + 1) * TILE):
            x = hide(x, position - masked * TILE, VECTOR)
            number -= ((position >= masked * TILE) & (position < row.body)).to(tl.int32)
            place += 1
            position = column_of_label(target, place) - row.head
        state = STEP(state, x, a, b, SUM, FAST, False, VECTOR)
        tile = masked + 1

    rim, inside = rim_positions(row)
    inside = without_labels(target, row, rim, inside)
    x = tl.load(row.ptr + rim, mask=inside, other=-_INF).to(tl.float32)
    return END(state, x, inside, number, a, b, SUM, FAST)


# --- the k hardest ----------------------------------------------------------------------------------------------------


@triton.jit
def labels_view(target, row, first, inside, NUMBER: tl.constexpr):
    """A view (see ``select``) of a row without its labels."""
    bits = all_bits(inside, NUMBER)
    for place in range(target.number):
        bits = bits & ~bit_at(column_of_label(target, place) - row.head - first, NUMBER)
    return bits


@triton.jit
def labels_here(row, target, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """-> (what is left out of counts; how many of the row's classes are labels: none in a row without elements)"""
    counts = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, target.number, CHUNK):
        counts += (column_of_label(target, start + tl.arange(0, CHUNK)) >= 0).to(tl.int32)
    return target, tl.minimum(tl.sum(counts, axis=0), row.length)


@triton.jit
def labels_above(target, row, t):
    """How many labels have a logit >= t, t > -inf."""
    counts = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, target.number, CHUNK):
        column = column_of_label(target, start + tl.arange(0, CHUNK))
        z = tl.load(row.ptr + (column - row.head), mask=column >= 0, other=-_INF).to(tl.float32)
        counts += (z >= t).to(tl.int32)
    return tl.sum(counts, axis=0)


# --- statistics -------------------------------------------------------------------------------------------------------


@triton.jit
def write_label_logits(statistics_ptr, number, row, target, LOGIT: tl.constexpr):
    """The labels' logits behind the other statistics of a row, -inf where there is none: 0 in an ignored row, NaN in
    one with a bad label. The first program of a row does so.

    -> NaN if there is one among them, else 0
    """
    behind_others = statistics_ptr + number * (3 + target.number) + 3
    nans = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, tl.where(tl.program_id(1) == 0, target.number, 0), CHUNK):
        place = start + tl.arange(0, CHUNK)
        column = column_of_label(target, place)
        z = tl.load(row.ptr + (column - row.head), mask=column >= 0, other=-_INF).to(tl.float32)
        nans += (z != z).to(tl.int32)
        z = tl.where(target.bad, float("nan"), LOGIT(z))
        tl.store(behind_others + place, tl.where(target.ignored, 0.0, z), mask=place < target.number)
    return tl.where(tl.sum(nans, axis=0) > 0, float("nan"), 0.0)


@triton.jit
def with_label_logits(statistics_ptr, number, row, target, statistics, LOGIT: tl.constexpr):
    """Writes them -> the other statistics, the second of them NaN if there is a NaN among the labels"""
    poison = write_label_logits(statistics_ptr, number, row, target, LOGIT)
    return statistics[0], statistics[1] + poison, statistics[2]
