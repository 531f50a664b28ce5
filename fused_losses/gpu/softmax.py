"""The softmax losses: row statistics in one pass over the logits, the gradient in one more. A walk knows no formula."""

import triton
import triton.language as tl

from .formulas import exp
from .rows import SIZES, last_tile, load_tile, open_row, part_of, read_index, rim_classes, tile_lanes, write_gradient
from .sums import add, finish, fold

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: a finite start keeps -inf - top from being NaN


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
def _negatives(logits_ptr, phase, row, row_stride, num_classes, target, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Maximum of the negatives in this program's part of the row, and the sum of exp(z - maximum)."""
    TILE: tl.constexpr = ROWS * LANES
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row_ptr, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    first, behind = part_of(body, TILE)
    last = last_tile(first, behind, target - head, TILE)

    top = tl.full((LANES // VECTOR,), _LOWEST, tl.float32)
    total = tl.zeros((LANES // VECTOR,), tl.float32)
    rest = total
    for i in range(first, behind - 1):
        x = load_tile(body_ptr, i + (i >= last).to(tl.int32), body, ROWS, LANES)
        top, total, rest = _online(top, total, rest, x, VECTOR)
    x = load_tile(body_ptr, last, body, ROWS, LANES)
    x = tl.where(tile_lanes(ROWS, LANES) == target - head - last * TILE, float("-inf"), x)
    top, total, rest = _online(top, total, rest, x, VECTOR)

    rim, inside = rim_classes(head, body, num_classes, VECTOR)
    x = tl.load(row_ptr + rim, mask=inside & (rim != target), other=float("-inf")).to(tl.float32)
    highest = tl.maximum(tl.max(top, axis=0), tl.max(x, axis=0))
    scale = exp(top - highest, True)
    return highest, finish(total * scale, rest * scale) + tl.sum(exp(x - highest, True), axis=0)


@triton.jit
def _finish(
    value_ptr, state_ptr, logits_ptr, phase, row, row_stride, target, live, dead, top, total, a, b, VALUE: tl.constexpr,
):  # fmt: skip
    """Value and state of a row from the statistics of its negatives."""
    z_y_ptr = logits_ptr + (phase + row * row_stride + target)
    z_y = tl.load(z_y_ptr, mask=target >= 0, other=float("-inf")).to(tl.float32)
    finish_row(value_ptr, state_ptr, row, z_y, live, dead, top, total, a, b, VALUE)


@triton.jit
def finish_row(
    value_ptr, state_ptr, row, z_y, live, dead, top, total, a, b, VALUE: tl.constexpr
):  # fmt: skip
    """Value and state of a row from its target's logit, and maximum and sum of exp(z - maximum) of its negatives."""
    nan = float("nan")
    z_y = tl.where(z_y == float("inf"), nan, z_y)
    empty = total == 0.0  # no negative above -inf
    top = tl.where(empty, 0.0, top)
    log_total = tl.where(empty, float("-inf"), tl.log(total))
    margin = (z_y - top) - log_total
    value = tl.where(margin == margin, VALUE(margin, a, b, False), nan)

    tl.store(value_ptr + row, tl.where(live, value, dead))
    tl.store(state_ptr + row * 3, tl.where(live, top, dead))
    tl.store(state_ptr + row * 3 + 1, tl.where(live, log_total, dead))
    tl.store(state_ptr + row * 3 + 2, tl.where(live, z_y, dead))


@triton.jit(do_not_specialize=SIZES)
def softmax_forward_kernel(
    value_ptr,  # (rows,)
    state_ptr,  # (rows, 3)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_stride,  # (rows,)
    num_classes, ignore_index, first_class, all_classes, a, b,
    VALUE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one row."""
    row = tl.program_id(0).to(tl.int64)
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes)
    visited = tl.where(live, num_classes, 0)
    top, total = _negatives(logits_ptr, phase, row, row_stride, visited, target, ROWS, LANES)
    _finish(
        value_ptr, state_ptr, logits_ptr, phase, row, row_stride, target, live, dead, top, total, a, b, VALUE
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def softmax_partial_kernel(
    partial_ptr,  # (rows, parts, 2): maximum, sum
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_stride,  # (rows,)
    num_classes, ignore_index, first_class, all_classes,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row: for rows too few to fill the device."""
    row = tl.program_id(0).to(tl.int64)
    target, live, _ = read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes)
    visited = tl.where(live, num_classes, 0)
    top, total = _negatives(logits_ptr, phase, row, row_stride, visited, target, ROWS, LANES)
    slot = (row * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(partial_ptr + slot, top)
    tl.store(partial_ptr + slot + 1, total)


@triton.jit(do_not_specialize=SIZES)
def softmax_merge_kernel(
    value_ptr,  # (rows,)
    state_ptr,  # (rows, 3)
    partial_ptr, parts,  # (rows, parts, 2)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_stride,  # (rows,)
    num_classes, ignore_index, first_class, all_classes, a, b,
    VALUE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program, one row: its parts in a fixed order, so that the result does not depend on who came first."""
    row = tl.program_id(0).to(tl.int64)
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes)
    part = tl.arange(0, PARTS)
    slot = (row * parts + part) * 2
    tops = tl.load(partial_ptr + slot, mask=part < parts, other=_LOWEST)
    totals = tl.load(partial_ptr + slot + 1, mask=part < parts, other=0.0)
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * exp(tops - top, True), axis=0)
    _finish(
        value_ptr, state_ptr, logits_ptr, phase, row, row_stride, target, live, dead, top, total, a, b, VALUE
    )  # fmt: skip


@triton.jit
def share_of_negatives(z, top, log_total, FAST: tl.constexpr):
    """exp(z) over the sum of exp over the negatives; never top + log_total in one number, which would lose digits."""
    return exp((z - top) - log_total, True)


@triton.jit(do_not_specialize=SIZES)
def softmax_backward_kernel(
    dlogits_ptr, dlogits_stride,  # (rows, classes)
    grad_ptr, grad_stride,  # (rows,)
    state_ptr,  # (rows, 3)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_stride,  # (rows,)
    num_classes, ignore_index, first_class, all_classes, a, b,
    SLOPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row."""
    row = tl.program_id(0).to(tl.int64)
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes)
    top = tl.load(state_ptr + row * 3)
    log_total = tl.load(state_ptr + row * 3 + 1)
    margin = (tl.load(state_ptr + row * 3 + 2) - top) - log_total
    coefficient = tl.load(grad_ptr + row * grad_stride).to(tl.float32) * SLOPE(margin, a, b, False)
    coefficient = tl.where(margin == margin, coefficient, float("nan"))
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)  # every negative is -inf: exp gives 0, not NaN
    write_gradient(
        dlogits_ptr, dlogits_stride, logits_ptr, phase, row, row_stride, num_classes, target, coefficient,
        live & (coefficient == coefficient), dead, -coefficient, share_of_negatives, top, log_total, True, ROWS, LANES,
    )  # fmt: skip
