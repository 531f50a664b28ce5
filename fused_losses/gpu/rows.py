"""The walk over one row, whatever its class count: where its 16-byte vectors lie, and how its gradient is written.

A row of logits rarely begins or ends at a 16-byte boundary (class counts are odd). It is cut into the *body*, the whole
16-byte vectors inside it, and the *rim*, the fewer than VECTOR classes at either end. The body is walked in tiles of
(ROWS, LANES), one vector per thread and tile row, by loads and stores of 16 bytes with int32 offsets from an int64
base; the rim is one access of 2 * VECTOR lanes. Nothing outside the row is ever touched.

One tile of every walk holds the target: it is left out of the loop and comes last, so that the loop tests no positions.
"""

import triton
import triton.language as tl

# Integers that no kernel is specialised on: one binary serves odd and even class counts, any stride and any batch.
SIZES = (
    "phase",
    "row_stride",
    "target_phase",
    "target_stride",
    "dlogits_stride",
    "grad_row_stride",
    "grad_stride",
    "num_classes",
    "ignore_index",
    "first_class",
    "all_classes",
    "parts",
)


@triton.jit
def read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes):
    """-> (class or -1, whether the row counts, what its outputs become if it does not: 0 ignored, NaN bad target)"""
    index = tl.load(target_ptr + row * target_stride).to(tl.int64)
    ignored = index == ignore_index
    live = (index >= 0) & (index < all_classes) & (index != ignore_index)
    column = index - first_class
    inside = live & (column >= 0) & (column < num_classes)
    return tl.where(inside, column, -1).to(tl.int32), live, tl.where(ignored, 0.0, float("nan"))


@triton.jit
def open_row(ptr, phase, row, row_stride, num_classes):
    """-> (address of class 0, address of the body, distance between the two, classes in the body)

    A row that ends before the next boundary has an empty body, behind its end. ptr is 16-byte aligned; class c of a row
    stands phase + row * row_stride + c elements behind it.
    """
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    start = phase + row * row_stride
    aligned = (start + (VECTOR - 1)) // VECTOR * VECTOR
    head = (aligned - start).to(tl.int32)
    body = tl.maximum(num_classes - head, 0) // VECTOR * VECTOR
    return ptr + start, ptr + aligned, head, body


@triton.jit
def rim_classes(head, body, num_classes, VECTOR: tl.constexpr):
    """-> (classes of the rim, which lanes hold one), both (2 * VECTOR,). The first program of a row has the rim."""
    mine = tl.program_id(1) == 0
    lane = tl.arange(0, 2 * VECTOR)
    behind = head + body + lane - VECTOR
    length = tl.where(mine, num_classes, 0)
    inside = (lane < tl.minimum(head, length)) | ((lane >= VECTOR) & (behind < length))
    return tl.where(lane < VECTOR, lane, behind), inside


@triton.jit
def tile_lanes(ROWS: tl.constexpr, LANES: tl.constexpr):
    """Offsets within a tile, (ROWS, LANES)."""
    return tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def load_tile(body_ptr, tile, body, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Logits of a tile in fp32, -inf behind the body, (ROWS, LANES)."""
    offset = tile * (ROWS * LANES)
    lanes = tile_lanes(ROWS, LANES)
    return tl.load(body_ptr + offset + lanes, mask=lanes < body - offset, other=float("-inf")).to(tl.float32)


@triton.jit
def store_tile(body_ptr, tile, body, values, ROWS: tl.constexpr, LANES: tl.constexpr):
    offset = tile * (ROWS * LANES)
    lanes = tile_lanes(ROWS, LANES)
    tl.store(body_ptr + offset + lanes, values.to(body_ptr.dtype.element_ty), mask=lanes < body - offset)


@triton.jit
def part_of(body, TILE: tl.constexpr):
    """-> (first tile, behind the last tile) of this program, which shares the row with the others of its grid column"""
    tiles = tl.cdiv(body, TILE)
    each = tl.cdiv(tiles, tl.num_programs(1))
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, tiles)


@triton.jit
def last_tile(first, behind, column, TILE: tl.constexpr):
    """The tile to take last: the target's (column counts from the body), or any other if that is not among them."""
    return tl.maximum(tl.minimum(column // TILE, behind - 1), first)


@triton.jit
def write_gradient(
    dlogits_ptr, dlogits_stride, logits_ptr, phase, row, row_stride, num_classes, target, at_target, live, dead, scale,
    NEGATIVE: tl.constexpr, a, b, FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """This program's part of a gradient row: at_target at the target, scale * NEGATIVE(z) elsewhere. Fills a dead row.

    dlogits has the logits' phase and a row stride of the same remainder by 16 bytes: both bodies are the same classes.
    """
    TILE: tl.constexpr = ROWS * LANES
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row_ptr, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    drow_ptr, dbody_ptr, _, _ = open_row(dlogits_ptr, phase, row, dlogits_stride, num_classes)
    first, behind = part_of(body, TILE)
    rim, inside = rim_classes(head, body, num_classes, VECTOR)
    if live:
        last = last_tile(first, behind, target - head, TILE)
        for i in range(first, behind - 1):
            tile = i + (i >= last).to(tl.int32)
            z = load_tile(body_ptr, tile, body, ROWS, LANES)
            store_tile(dbody_ptr, tile, body, scale * NEGATIVE(z, a, b, FAST), ROWS, LANES)
        z = load_tile(body_ptr, last, body, ROWS, LANES)
        here = tile_lanes(ROWS, LANES) == target - head - last * TILE
        store_tile(dbody_ptr, last, body, tl.where(here, at_target, scale * NEGATIVE(z, a, b, FAST)), ROWS, LANES)
        z = tl.load(row_ptr + rim, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(rim == target, at_target, scale * NEGATIVE(z, a, b, FAST))
        tl.store(drow_ptr + rim, values.to(dlogits_ptr.dtype.element_ty), mask=inside)
    else:
        fill = tl.full((ROWS, LANES), 0.0, tl.float32) + dead
        for tile in range(first, behind):
            store_tile(dbody_ptr, tile, body, fill, ROWS, LANES)
        tl.store(
            drow_ptr + rim, (tl.zeros((2 * VECTOR,), tl.float32) + dead).to(dlogits_ptr.dtype.element_ty), mask=inside
        )
