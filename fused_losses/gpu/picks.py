"""The losses over the k hardest negatives, forward: selection, statistics and loss in one program per row.

Two ways to find the picks, both exact. ``row_kernel`` searches the row itself, held in registers or read again from the
caches; ``blocks_kernel`` reads it once, writing the maximum of every block of W logits, and searches only the blocks
whose maximum is among the largest, k and one for every label: they hold the k hardest negatives, whichever blocks the
labels are in.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .emit import Picks
from .finish import Outputs, end_row
from .formulas import softplus
from .labels import with_label_logits
from .rows import (
    SIZES,
    Array,
    Labels,
    is_positive,
    load_tile,
    logit_of_target,
    only_if,
    open_row,
    part_of,
    tile_lanes,
)
from .select import (
    Bracket,
    Guess,
    Winners,
    chosen_bits,
    count_listed,
    cut_at,
    guess,
    list_class,
    list_hides,
    list_view,
    load_winners,
    open_rim,
    plain_view,
    rank,
    rank_rim,
    row_class,
    search,
    survey,
    survey_held,
)
from .sums import add, fold, sum_of
from .words import (
    at_least,
    bits_of,
    columns,
    element_of,
    equal,
    float_of,
    higher,
    kept,
    key_of,
    load_words,
    masked_key,
    masks_of,
    number_of,
    of_vector,
)

_INF = tl.constexpr(float("inf"))
_SIZES = (*SIZES, "k", "pick_stride", "max_blocks", "capacity")


# --- positives --------------------------------------------------------------------------------------------------------


@triton.jit
def index_positives(row, target, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """-> (z_y, or -inf; number of positives)"""
    return logit_of_target(row, target, True), (target.column >= 0).to(tl.int32)


@triton.jit
def multi_hot_positives(row, target, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """-> (sum of softplus(-z) over the positives, their number), from one walk over the row's target"""
    VECTOR: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    pos = tl.zeros((LANES // VECTOR,), tl.float32)
    rest = pos
    count = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(row.body, ROWS * LANES)):
        positions = tile * (ROWS * LANES) + tile_lanes(ROWS, LANES)
        positive = is_positive(target, positions, positions < row.body)
        z = tl.where(positive, load_tile(row, tile, ROWS, LANES), _INF)  # softplus(-inf) = 0
        pos, rest = add(pos, rest, fold(softplus(-z, FAST), VECTOR))
        count += tl.sum(positive.to(tl.int32), axis=0)
    _, rim_position, rim_inside = open_rim(row)
    rim_positive = is_positive(target, rim_position, rim_inside)
    rim = tl.load(row.ptr + rim_position, mask=rim_positive, other=_INF).to(tl.float32)
    number = tl.sum(count, axis=0) + tl.sum(rim_positive.to(tl.int32), axis=0)
    return sum_of(pos, rest) + tl.sum(softplus(-rim, FAST), axis=0), number


# Four numbers of a row, as STATISTICS takes them: SEEN(top, total, s, at_positives, poison, positives)


@triton.jit
def seen_with_positives(top, total, s, at_positives, poison, positives):
    return top, total, at_positives + poison, positives


@triton.jit
def seen_of_labels(top, total, s, at_positives, poison, positives):
    return top, total + poison, s, positives


# --- a row searched as a whole ----------------------------------------------------------------------------------------


@triton.jit
def walk_index(
    row, target, z_y, VIEW: tl.constexpr, HIDES: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """-> (source of counts, moments) of a row too long for registers. The counts are taken over the whole row, less the
    target's logit: no test per element."""
    rim, positions, inside = open_rim(row)
    negatives = tl.where(VIEW(target, row, positions, inside, 1) != 0, rim, -_INF)
    return (row, rim, z_y), survey(row, VIEW, HIDES, target, negatives, ROWS, LANES, FAST)


@triton.jit
def walk_multi_hot(
    row, target, pos, VIEW: tl.constexpr, HIDES: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    rim, positions, inside = open_rim(row)
    negatives = tl.where(VIEW(target, row, positions, inside, 1) != 0, rim, -_INF)
    return (row, negatives, target), survey(row, VIEW, HIDES, target, negatives, ROWS, LANES, FAST)


@triton.jit
def hold(
    row, target, at_positives, VIEW: tl.constexpr, HIDES: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The same of a row held in registers as one tile: every count is free of loads."""
    ELEMENT: tl.constexpr = row.ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    rim, positions, inside = open_rim(row)
    rim = tl.where(VIEW(target, row, positions, inside, 1) != 0, rim, -_INF)
    words, first, inside = load_words(row, 0, ROWS * LANES // VECTOR, VECTOR, FAST)
    negative = masks_of(VIEW(target, row, first, inside, VECTOR), VECTOR, ELEMENT, FAST)
    words = kept(words, negative, ELEMENT, FAST)
    return (words, rim, row), survey_held(words, rim, row.body, LANES // VECTOR, ELEMENT, FAST)


@triton.jit(do_not_specialize=_SIZES)
def row_kernel(
    loss_ptr, coefficients_ptr, statistics_ptr,  # see Outputs
    pick_index_ptr, pick_logit_ptr, pick_stride, k,  # (rows, k) or (rows, 1)
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes)
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    quantile, reach, a, b, p, q,
    TARGET: tl.constexpr, POSITIVES: tl.constexpr, VIEW: tl.constexpr, HIDES: tl.constexpr, OPEN: tl.constexpr,
    COUNT: tl.constexpr, EMIT: tl.constexpr, SUM: tl.constexpr, SMOOTH: tl.constexpr, PARAMETERS: tl.constexpr,
    SEEN: tl.constexpr, LOGIT: tl.constexpr, STATISTICS: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr,
    SLOPE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """One program, one row. SUMMED: rows of a tile whose picks are summed at a time."""
    ELEMENT: tl.constexpr = logits_ptr.dtype.element_ty
    number = tl.program_id(0).to(tl.int64)
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    target = TARGET(labels, number, num_classes, VECTOR)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    row = only_if(~(target.ignored | target.bad), row)
    at_positives, positives = POSITIVES(row, target, FAST, ROWS, LANES)
    negatives = row.length - positives
    wanted = tl.minimum(k, negatives)
    slots = number * pick_stride
    picks = Picks(pick_index_ptr + slots, pick_logit_ptr + slots, k, wanted, row.ptr - row.head)

    source, moments = OPEN(row, target, at_positives, VIEW, HIDES, FAST, ROWS, LANES)
    bracket = Bracket(masked_key(ELEMENT), key_of(moments.top, ELEMENT) + 1, negatives, wanted * 0)
    first = guess(moments, quantile, reach)
    bracket = search(COUNT, source, bracket, wanted, wanted, first, ELEMENT, VECTOR, ROWS, LANES, FAST)
    at, beside = PARAMETERS(moments.top, a, b)
    total, s = EMIT(
        picks, row, VIEW, HIDES, row_class, target, bracket, SUM, SMOOTH, at, beside, FAST, True, VECTOR, SUMMED,
        LANES,
    )  # fmt: skip
    seen = SEEN(moments.top, total, s, at_positives, moments.poison, positives)
    outputs = Outputs(loss_ptr, coefficients_ptr, statistics_ptr, num_labels)
    statistics = STATISTICS(*seen)
    if num_labels is not None:
        statistics = with_label_logits(statistics_ptr, number, row, target, statistics, LOGIT)
    end_row(outputs, number, target, statistics, p, q, FINISH, VALUE, SLOPE)


# --- a row read once, then only the blocks that can hold a pick -------------------------------------------------------


class Scratch(NamedTuple):
    """Memory of one row. All addresses are multiples of 16 bytes."""

    maxima_ptr: tl.tensor  # of the blocks
    blocks_ptr: tl.tensor  # numbers of the winning blocks
    max_blocks: tl.tensor  # room for them
    class_ptr: tl.tensor  # of the candidates
    logit_ptr: tl.tensor
    capacity: tl.tensor  # room for them


@triton.jit
def _scratch_of_row(
    logit_ptr, index_ptr, row, num_classes, max_blocks, capacity, TILE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    VECTOR: tl.constexpr = 128 // logit_ptr.dtype.element_ty.primitive_bitwidth
    row_maxima = tl.cdiv(num_classes, TILE) * (TILE // WIDTH)
    room = capacity // VECTOR * VECTOR + VECTOR
    maxima_ptr = logit_ptr + row * (row_maxima + room)
    blocks_ptr = index_ptr + row * (max_blocks + capacity)
    return Scratch(maxima_ptr, blocks_ptr, max_blocks, blocks_ptr + max_blocks, maxima_ptr + row_maxima, capacity)


@triton.jit
def write_maxima(maxima_ptr, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr, FAST: tl.constexpr):
    """Maxima of this program's part of a row's blocks, NaN where a block has one, -inf behind the last block of the
    last tile."""
    ELEMENT: tl.constexpr = row.ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    TILE: tl.constexpr = GROUPS * VECTOR
    PIECES: tl.constexpr = WIDTH // VECTOR
    BLOCKS: tl.constexpr = TILE // WIDTH
    first, behind = part_of(row, TILE)
    for tile in range(first, behind):
        words, _, _ = load_words(row, tile, GROUPS, VECTOR, FAST)
        maxima = element_of(of_vector(words, higher, ELEMENT, FAST), higher, ELEMENT, FAST)
        if PIECES > 1:
            pieces = tl.reshape(maxima, (BLOCKS, PIECES))
            nans = tl.max((pieces != pieces).to(tl.int32), axis=1)
            maxima = tl.where(nans > 0, float("nan"), tl.max(pieces, axis=1))
        place = tl.max_contiguous(tile * BLOCKS + tl.arange(0, BLOCKS), 1)  # stored by the threads that have them
        tl.store(maxima_ptr + place, maxima.to(maxima_ptr.dtype.element_ty))


@triton.jit
def maxima_written(maxima_ptr, row, WIDTH: tl.constexpr, GROUPS: tl.constexpr, FAST: tl.constexpr):
    pass


@triton.jit
def winning_blocks(
    scratch, num_blocks, poison, k, labels, quantile, reach, LANES: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """At least the blocks of the largest maxima, k and one for every label, equal ones by number. As many as there are
    labels may owe their maximum to one; the others hold a negative each that is as hard as any element outside the
    winners, or equal and in front of it.

    -> (Winners, the key of the smallest of their maxima, NaN if there is a NaN in the row)
    """
    ELEMENT: tl.constexpr = scratch.maxima_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    maxima = Array(scratch.maxima_ptr, 0, num_blocks, num_blocks)
    moments = survey(maxima, plain_view, list_hides, (0,), None, 1, LANES, FAST)
    needed = tl.minimum(k + labels, num_blocks)
    bracket = Bracket(masked_key(ELEMENT), key_of(moments.top, ELEMENT) + 1, num_blocks, needed * 0)
    first = guess(moments, quantile, reach)
    bracket = search(
        count_listed, maxima, bracket, needed, scratch.max_blocks, first, ELEMENT, VECTOR, 1, LANES, FAST
    )  # fmt: skip
    cut = cut_at(maxima, plain_view, False, (0,), bracket, needed, scratch.max_blocks, VECTOR, 1, LANES, FAST)
    winners = Winners(scratch.blocks_ptr, _list_blocks(scratch, maxima, cut, LANES // VECTOR, FAST))
    return winners, bracket.low, poison + moments.poison


@triton.jit
def _list_blocks(scratch, maxima, cut, GROUPS: tl.constexpr, FAST: tl.constexpr):
    """Writes the numbers of the winning blocks in order -> how many"""
    ELEMENT: tl.constexpr = maxima.ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    taken = scratch.max_blocks * 0
    for tile in range(tl.cdiv(maxima.body, GROUPS * VECTOR)):
        words, first, inside = load_words(maxima, tile, GROUPS, VECTOR, FAST)
        allowed = plain_view((0,), maxima, first, inside, VECTOR)
        bits = chosen_bits(words, tile * (GROUPS * VECTOR), first, allowed, cut, ELEMENT, FAST)
        before, number = rank(number_of(bits, FAST))
        slot = taken + before
        for i in tl.static_range(VECTOR):
            won = (bits >> i) & 1
            tl.store(scratch.blocks_ptr + slot, first + i, mask=(won != 0) & (slot < scratch.max_blocks))
            slot += won
        taken += number
    return tl.minimum(taken, scratch.max_blocks)


@triton.jit
def candidates(
    scratch, row, target, at_positives, winners, bound, wanted, VIEW: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Lists the negatives of the winning blocks and the rim that are not below the smallest of the winners' maxima, of
    which bound is the key.

    Where that is more than there is room for, many equal logits or a few blocks that hold them all, the bound is
    searched and they are listed again; where the bound itself is shared by too many, after all that lies above it. One
    listing in a loop, not three: each is long.

    -> (number of candidates, the bracket of their search, their maximum)
    """
    ELEMENT: tl.constexpr = scratch.logit_ptr.dtype.element_ty
    nothing = tl.full((), float("nan"), tl.float32)
    rim, _positions, _inside = open_rim(row)
    low = bound
    first = low
    behind = key_of(tl.full((), _INF, tl.float32), ELEMENT) + 1
    top = tl.full((), _INF, tl.float32)
    number = wanted * 0
    turns = number + 3  # to go, of three; the first says how many more there are
    while turns > 0:
        number, highest = _list_candidates(
            scratch, number, row, target, winners, first, behind, VIEW, WIDTH, LANES, FAST
        )  # fmt: skip
        tl.debug_barrier()  # the next listing, or the padding, overwrites this one
        if turns == 3:
            top = highest
            turns = number * 0
            if number > scratch.capacity:
                bracket = search(
                    COUNT, (row, winners, WIDTH, rim, at_positives),
                    Bracket(low, key_of(top, ELEMENT) + 1, number, wanted * 0), wanted, scratch.capacity,
                    Guess(nothing, nothing), ELEMENT, 128 // ELEMENT.primitive_bitwidth, 1, LANES, FAST,
                )  # fmt: skip
                low = bracket.low
                tied = bracket.count_low > scratch.capacity
                turns = tl.where(tied, 2, 1)
                first = tl.where(tied, bracket.high, low)
                number = wanted * 0
        else:
            turns -= 1
            behind = first
            first = low
    number = tl.minimum(number, scratch.capacity)
    return number, Bracket(low, key_of(top, ELEMENT) + 1, number, wanted * 0), top


@triton.jit
def _list_candidates(
    scratch, taken, row, target, winners, low, behind, VIEW: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Appends the negatives of the winning blocks and the rim whose keys are at least low and below behind, in order,
    as far as there is room.

    -> (how many the list would hold now, their maximum)
    """
    ELEMENT: tl.constexpr = scratch.logit_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    GROUPS: tl.constexpr = LANES // VECTOR
    PIECES: tl.constexpr = WIDTH // VECTOR
    capacity = scratch.capacity
    rim, rim_position, rim_inside = open_rim(row)
    rim_kept = (VIEW(target, row, rim_position, rim_inside, 1) != 0) & (rim >= float_of(low, ELEMENT))
    rim_kept = rim_kept & ~(rim >= float_of(behind, ELEMENT))
    in_tail = rim_position >= 0
    in_head = tl.sum((rim_kept & ~in_tail).to(tl.int32), axis=0)
    rim_slots = taken + rank_rim(rim_kept)
    taken += in_head
    before_body = taken
    masked = masked_key(ELEMENT)
    tops = tl.full((GROUPS,), -_INF, tl.float32)
    for tile in range(tl.cdiv(winners.number * PIECES, GROUPS)):
        words, first, inside = load_winners(row, winners, tile, WIDTH, GROUPS, FAST)
        above = at_least(words, tl.maximum(low, masked + 1), ELEMENT, FAST)
        masks = above & ~at_least(words, behind, ELEMENT, FAST)
        if low == masked:
            masks |= equal(words, low, above, ELEMENT, FAST)
        bits = bits_of(masks, ELEMENT, FAST)
        bits &= VIEW(target, row, first, inside, VECTOR)
        in_list = kept(words, masks_of(bits, VECTOR, ELEMENT, FAST), ELEMENT, FAST)
        highest = element_of(of_vector(in_list, higher, ELEMENT, FAST), higher, ELEMENT, FAST)
        tops = tl.maximum(tops, highest)
        before, number = rank(number_of(bits, FAST))
        slot = taken + before
        logits = columns(words, ELEMENT, FAST)
        for i in tl.static_range(VECTOR):
            here = (bits >> i) & 1
            room = (here != 0) & (slot < capacity)
            tl.store(scratch.class_ptr + slot, row.head + first + i, mask=room)
            tl.store(scratch.logit_ptr + slot, logits[i], mask=room)
            slot += here
        taken += number

    rim_slots += tl.where(in_tail, taken - before_body, 0)
    tl.store(scratch.class_ptr + rim_slots, row.head + rim_position, mask=rim_kept & (rim_slots < capacity))
    tl.store(scratch.logit_ptr + rim_slots, rim.to(ELEMENT), mask=rim_kept & (rim_slots < capacity))
    taken += tl.sum((rim_kept & in_tail).to(tl.int32), axis=0)
    return taken, tl.maximum(tl.max(tops, axis=0), tl.max(tl.where(rim_kept, rim, -_INF), axis=0))


@triton.jit
def listed(scratch, number, VECTOR: tl.constexpr):
    """The candidates as an array of whole vectors: what is behind the last in its vector is filled."""
    ELEMENT: tl.constexpr = scratch.logit_ptr.dtype.element_ty
    whole = tl.cdiv(number, VECTOR) * VECTOR
    padding = number + tl.arange(0, VECTOR)
    tl.store(scratch.logit_ptr + padding, tl.full((VECTOR,), -_INF, tl.float32).to(ELEMENT), mask=padding < whole)
    return Array(scratch.logit_ptr, 0, whole, whole)


@triton.jit(do_not_specialize=_SIZES)
def blocks_kernel(
    loss_ptr, coefficients_ptr, statistics_ptr,  # see Outputs
    pick_index_ptr, pick_logit_ptr, pick_stride, k,  # (rows, k) or (rows, 1)
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes)
    target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels,  # see Labels
    scratch_logit_ptr, scratch_index_ptr, max_blocks, capacity,  # see _scratch_of_row
    quantile, reach, a, b, p, q,
    READ: tl.constexpr, TARGET: tl.constexpr, POSITIVES: tl.constexpr, VIEW: tl.constexpr, HIDES: tl.constexpr,
    COUNT: tl.constexpr, EMIT: tl.constexpr, SUM: tl.constexpr, SMOOTH: tl.constexpr, PARAMETERS: tl.constexpr,
    SEEN: tl.constexpr, LOGIT: tl.constexpr, STATISTICS: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr,
    SLOPE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """One program, one row. READ writes the maxima of its blocks, unless ``maxima_kernel`` has done so. LISTED:
    candidates that a thread takes at a time."""
    ELEMENT: tl.constexpr = logits_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    number = tl.program_id(0).to(tl.int64)
    scratch = _scratch_of_row(
        scratch_logit_ptr, scratch_index_ptr, number, num_classes, max_blocks, capacity, TILE, WIDTH
    )
    labels = Labels(target_ptr, target_phase, target_stride, ignore_index, first_class, all_classes, num_labels)
    target = TARGET(labels, number, num_classes, VECTOR)
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    row = only_if(~(target.ignored | target.bad), row)
    at_positives, positives = POSITIVES(row, target, FAST, ROWS, LANES)
    wanted = tl.minimum(k, row.length - positives)
    slots = number * pick_stride
    picks = Picks(pick_index_ptr + slots, pick_logit_ptr + slots, k, wanted, row.ptr - row.head)

    READ(scratch.maxima_ptr, row, WIDTH, TILE // VECTOR, FAST)
    tl.debug_barrier()
    num_blocks = tl.cdiv(row.body, TILE) * (TILE // WIDTH)
    rim, _positions, _inside = open_rim(row)
    poison = tl.where(tl.sum((rim != rim).to(tl.int32), axis=0) > 0, float("nan"), 0.0)
    labels_at_most = 1 if num_labels is None else num_labels
    winners, bound, poison = winning_blocks(
        scratch, num_blocks, poison, k, labels_at_most, quantile, reach, LANES, FAST
    )  # fmt: skip
    tl.debug_barrier()
    found, bracket, top = candidates(
        scratch, row, target, at_positives, winners, bound, wanted, VIEW, COUNT, WIDTH, LANES, FAST
    )  # fmt: skip
    array = listed(scratch, found, LISTED)
    tl.debug_barrier()

    nothing = tl.full((), float("nan"), tl.float32)
    info = (scratch.class_ptr, found)
    TAKEN: tl.constexpr = LANES // VECTOR * LISTED
    bracket = search(
        count_listed, array, bracket, wanted, wanted, Guess(nothing, nothing), ELEMENT, LISTED, 1, TAKEN, FAST
    )  # fmt: skip
    at, beside = PARAMETERS(top, a, b)
    total, s = EMIT(
        picks, array, list_view, list_hides, list_class, info, bracket, SUM, SMOOTH, at, beside, FAST, False, LISTED, 1,
        TAKEN,
    )  # fmt: skip
    seen = SEEN(top, total, s, at_positives, poison, positives)
    outputs = Outputs(loss_ptr, coefficients_ptr, statistics_ptr, num_labels)
    statistics = STATISTICS(*seen)
    if num_labels is not None:
        statistics = with_label_logits(statistics_ptr, number, row, target, statistics, LOGIT)
    end_row(outputs, number, target, statistics, p, q, FINISH, VALUE, SLOPE)


@triton.jit(do_not_specialize=_SIZES)
def maxima_kernel(
    logits_ptr, phase, row_stride, num_classes,  # (rows, classes)
    scratch_logit_ptr, scratch_index_ptr, max_blocks, capacity,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row: for rows too few to fill the device."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    number = tl.program_id(0).to(tl.int64)
    scratch = _scratch_of_row(
        scratch_logit_ptr, scratch_index_ptr, number, num_classes, max_blocks, capacity, ROWS * LANES, WIDTH
    )
    row = open_row(logits_ptr, phase, number, row_stride, num_classes)
    write_maxima(scratch.maxima_ptr, row, WIDTH, ROWS * LANES // VECTOR, FAST)
