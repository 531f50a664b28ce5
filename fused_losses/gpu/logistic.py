"""The logistic losses: two sums per row in one pass over the logits, the gradient in one more. A walk knows no formula.

A row's positives are one class index or the entries != 0 of a multi-hot row. What differs in forward stands in two
jitted functions, which the kernels take as constexpr.
"""

import triton
import triton.language as tl

from .formulas import sigmoid, softplus
from .rows import (
    SIZES,
    last_tile,
    load_tile,
    open_row,
    part_of,
    read_index,
    rim_classes,
    store_tile,
    tile_lanes,
    write_gradient,
)
from .sums import add, finish, fold


@triton.jit
def index_row(
    logits_ptr, phase, row, row_stride, num_classes, target_ptr, target_phase, target_stride, ignore_index,
    first_class, all_classes, a, b, VALUE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """This program's part of a row with a class index -> (pos, neg, z_y, number of positives)"""
    TILE: tl.constexpr = ROWS * LANES
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes)
    visited = tl.where(live, num_classes, 0)
    row_ptr, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, visited)
    first, behind = part_of(body, TILE)
    last = last_tile(first, behind, target - head, TILE)

    # Padding and the target enter as -inf, where every VALUE is 0.
    sums = tl.zeros((LANES // VECTOR,), tl.float32)
    rest = tl.zeros((LANES // VECTOR,), tl.float32)
    for i in range(first, behind - 1):
        z = load_tile(body_ptr, i + (i >= last).to(tl.int32), body, ROWS, LANES)
        sums, rest = add(sums, rest, fold(VALUE(z, a, b, FAST), VECTOR))
    z = load_tile(body_ptr, last, body, ROWS, LANES)
    z = tl.where(tile_lanes(ROWS, LANES) == target - head - last * TILE, float("-inf"), z)
    sums, rest = add(sums, rest, fold(VALUE(z, a, b, FAST), VECTOR))

    rim, inside = rim_classes(head, body, visited, VECTOR)
    z = tl.load(row_ptr + rim, mask=inside & (rim != target), other=float("-inf")).to(tl.float32)
    neg = finish(sums, rest) + tl.sum(VALUE(z, a, b, FAST), axis=0)

    counted = live & (target >= 0) & (tl.program_id(1) == 0)
    z_y = tl.load(row_ptr + target, mask=counted, other=0.0).to(tl.float32)
    pos = tl.where(counted, softplus(-z_y, False), 0.0)
    return tl.where(live, pos, dead), tl.where(live, neg, dead), tl.where(live, z_y, dead), counted.to(tl.float32)


@triton.jit
def open_target(target_ptr, target_phase, row, target_stride, VECTOR: tl.constexpr):
    """-> (address of class 0, address of the first class of the logits' body)"""
    start = target_phase + row * target_stride
    return target_ptr + start, target_ptr + (start + (VECTOR - 1)) // VECTOR * VECTOR


@triton.jit
def multi_hot(target_ptr, lanes, inside):
    """Which of these classes are positives."""
    target = tl.load(target_ptr + lanes, mask=inside, other=0)
    if target.dtype.is_floating():
        target = target.to(tl.float32)
    return target != 0


@triton.jit
def multi_hot_row(
    logits_ptr, phase, row, row_stride, num_classes, target_ptr, target_phase, target_stride, ignore_index,
    first_class, all_classes, a, b, VALUE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """This program's part of a multi-hot row -> (pos, neg, 0, number of positives)

    target's rows begin at the same remainders by VECTOR classes as the logits' rows: both bodies are the same classes.
    """
    TILE: tl.constexpr = ROWS * LANES
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row_ptr, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    target_row_ptr, target_body_ptr = open_target(target_ptr, target_phase, row, target_stride, VECTOR)
    lanes = tile_lanes(ROWS, LANES)
    first, behind = part_of(body, TILE)

    zeros = tl.zeros((LANES // VECTOR,), tl.float32)
    pos, pos_rest, neg, neg_rest, count = zeros, zeros, zeros, zeros, zeros
    for tile in range(first, behind):
        z = load_tile(body_ptr, tile, body, ROWS, LANES)
        positive = multi_hot(target_body_ptr + tile * TILE, lanes, lanes < body - tile * TILE)
        pos, pos_rest = add(pos, pos_rest, fold(tl.where(positive, softplus(-z, FAST), 0.0), VECTOR))
        neg, neg_rest = add(neg, neg_rest, fold(tl.where(positive, 0.0, VALUE(z, a, b, FAST)), VECTOR))
        count += fold(positive.to(tl.float32), VECTOR)

    rim, inside = rim_classes(head, body, num_classes, VECTOR)
    z = tl.load(row_ptr + rim, mask=inside, other=float("-inf")).to(tl.float32)
    positive = multi_hot(target_row_ptr, rim, inside)
    return (
        finish(pos, pos_rest) + tl.sum(tl.where(positive, softplus(-z, FAST), 0.0), axis=0),
        finish(neg, neg_rest) + tl.sum(tl.where(positive, 0.0, VALUE(z, a, b, FAST)), axis=0),
        0.0,
        tl.sum(count, axis=0) + tl.sum(positive.to(tl.float32), axis=0),
    )


@triton.jit
def finish_row(sums_ptr, state_ptr, row, pos, neg, z_y, count):
    """A NaN among the logits of a row turns both sums and the state to NaN."""
    poison = tl.where(pos + neg == pos + neg, 0.0, float("nan"))
    tl.store(sums_ptr + row * 2, pos + poison)
    tl.store(sums_ptr + row * 2 + 1, neg + poison)
    tl.store(state_ptr + row * 2, z_y + poison)
    tl.store(state_ptr + row * 2 + 1, count)


@triton.jit(do_not_specialize=SIZES)
def logistic_forward_kernel(
    sums_ptr, state_ptr,  # (rows, 2) each
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_phase, target_stride,  # (rows,) or (rows, classes)
    num_classes, ignore_index, first_class, all_classes, a, b,
    ROW: tl.constexpr, VALUE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one row."""
    row = tl.program_id(0).to(tl.int64)
    pos, neg, z_y, count = ROW(
        logits_ptr, phase, row, row_stride, num_classes, target_ptr, target_phase, target_stride, ignore_index,
        first_class, all_classes, a, b, VALUE, FAST, ROWS, LANES,
    )  # fmt: skip
    finish_row(sums_ptr, state_ptr, row, pos, neg, z_y, count)


@triton.jit(do_not_specialize=SIZES)
def logistic_partial_kernel(
    partial_ptr,  # (rows, parts, 4): pos, neg, z_y, number of positives
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_phase, target_stride,  # (rows,) or (rows, classes)
    num_classes, ignore_index, first_class, all_classes, a, b,
    ROW: tl.constexpr, VALUE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row: for rows too few to fill the device."""
    row = tl.program_id(0).to(tl.int64)
    pos, neg, z_y, count = ROW(
        logits_ptr, phase, row, row_stride, num_classes, target_ptr, target_phase, target_stride, ignore_index,
        first_class, all_classes, a, b, VALUE, FAST, ROWS, LANES,
    )  # fmt: skip
    slot = (row * tl.num_programs(1) + tl.program_id(1)) * 4
    tl.store(partial_ptr + slot, pos)
    tl.store(partial_ptr + slot + 1, neg)
    tl.store(partial_ptr + slot + 2, z_y)
    tl.store(partial_ptr + slot + 3, count)


@triton.jit(do_not_specialize=SIZES)
def logistic_merge_kernel(
    sums_ptr, state_ptr,  # (rows, 2) each
    partial_ptr, parts,  # (rows, parts, 4)
    PARTS: tl.constexpr,
):  # fmt: skip
    """One program, one row: its parts in a fixed order, so that the result does not depend on who came first."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    slot = (row * parts + part) * 4
    inside = part < parts
    finish_row(
        sums_ptr, state_ptr, row,
        tl.sum(tl.load(partial_ptr + slot, mask=inside, other=0.0), axis=0),
        tl.sum(tl.load(partial_ptr + slot + 1, mask=inside, other=0.0), axis=0),
        tl.sum(tl.load(partial_ptr + slot + 2, mask=inside, other=0.0), axis=0),
        tl.sum(tl.load(partial_ptr + slot + 3, mask=inside, other=0.0), axis=0),
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def index_backward_kernel(
    dlogits_ptr, dlogits_stride,  # (rows, classes)
    grad_ptr, grad_row_stride, grad_stride,  # (rows, 2)
    state_ptr,  # (rows, 2)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_stride,  # (rows,)
    num_classes, ignore_index, first_class, all_classes, a, b,
    SLOPE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row."""
    row = tl.program_id(0).to(tl.int64)
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes)
    grad_pos = tl.load(grad_ptr + row * grad_row_stride).to(tl.float32)
    grad_neg = tl.load(grad_ptr + row * grad_row_stride + grad_stride).to(tl.float32)
    z_y = tl.load(state_ptr + row * 2)
    write_gradient(
        dlogits_ptr, dlogits_stride, logits_ptr, phase, row, row_stride, num_classes, target,
        -grad_pos * sigmoid(-z_y, False), live & (z_y == z_y), dead, grad_neg, SLOPE, a, b, FAST, ROWS, LANES,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def multi_hot_backward_kernel(
    dlogits_ptr, dlogits_stride,  # (rows, classes)
    grad_ptr, grad_row_stride, grad_stride,  # (rows, 2)
    state_ptr,  # (rows, 2)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_phase, target_stride,  # (rows, classes)
    num_classes, a, b,
    SLOPE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row. No row is ignored; a row with a NaN becomes NaN by way of its coefficients."""
    TILE: tl.constexpr = ROWS * LANES
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    poison = tl.load(state_ptr + row * 2)  # 0 or NaN
    grad_pos = tl.load(grad_ptr + row * grad_row_stride).to(tl.float32) + poison
    grad_neg = tl.load(grad_ptr + row * grad_row_stride + grad_stride).to(tl.float32) + poison

    row_ptr, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    drow_ptr, dbody_ptr, _, _ = open_row(dlogits_ptr, phase, row, dlogits_stride, num_classes)
    target_row_ptr, target_body_ptr = open_target(target_ptr, target_phase, row, target_stride, VECTOR)
    lanes = tile_lanes(ROWS, LANES)
    first, behind = part_of(body, TILE)
    for tile in range(first, behind):
        z = load_tile(body_ptr, tile, body, ROWS, LANES)
        positive = multi_hot(target_body_ptr + tile * TILE, lanes, lanes < body - tile * TILE)
        values = tl.where(positive, -grad_pos * sigmoid(-z, FAST), grad_neg * SLOPE(z, a, b, FAST))
        store_tile(dbody_ptr, tile, body, values, ROWS, LANES)

    rim, inside = rim_classes(head, body, num_classes, VECTOR)
    z = tl.load(row_ptr + rim, mask=inside, other=0.0).to(tl.float32)
    positive = multi_hot(target_row_ptr, rim, inside)
    values = tl.where(positive, -grad_pos * sigmoid(-z, FAST), grad_neg * SLOPE(z, a, b, FAST))
    tl.store(drow_ptr + rim, values.to(dlogits_ptr.dtype.element_ty), mask=inside)
