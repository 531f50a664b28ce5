"""One row, whatever its class count: where its 16-byte vectors lie, how it is walked, and what its target is.

A row of logits rarely begins or ends at a 16-byte boundary (class counts are odd). It is cut into the *body*, the whole
16-byte vectors inside it, and the *rim*, the fewer than VECTOR classes at either end. The body is walked in tiles of
(ROWS, LANES), one vector per thread and tile row, by loads and stores of 16 bytes with int32 offsets from an int64
base; the rim is one access of 2 * VECTOR lanes. Nothing outside the row is ever touched.

Elements are addressed by their *position*, the offset from the body's first element, negative in front of it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Integers that no kernel is specialised on: one binary serves odd and even class counts, any stride and any batch.
SIZES = (
    "phase",
    "row_stride",
    "target_phase",
    "target_stride",
    "dlogits_phase",
    "dlogits_stride",
    "grad_stride",
    "num_classes",
    "ignore_index",
    "first_class",
    "all_classes",
    "parts",
    "num_labels",
)


class Array(NamedTuple):
    """The elements of a row, or of another array in memory."""

    ptr: tl.tensor  # to the body's first element, a multiple of 16 bytes
    head: tl.tensor  # elements in front of the body
    body: tl.tensor  # elements of the body
    length: tl.tensor  # elements at all


class Labels(NamedTuple):
    """Targets of all rows, as a kernel is given them: class indices (rows,), several of them (rows, num_labels), or
    multi-hot (rows, classes)."""

    ptr: tl.tensor
    phase: tl.tensor  # label c of a row stands phase + row * stride + c elements behind ptr
    stride: tl.tensor
    ignore_index: tl.tensor  # or None
    first_class: tl.tensor
    all_classes: tl.tensor
    number: tl.tensor  # of labels per row, or None: class indices, multi-hot


class Target(NamedTuple):
    """The target of one row."""

    column: tl.tensor  # its place among the classes at hand, -1 if it is not there
    ignored: tl.tensor
    bad: tl.tensor  # no class at all
    ptr: tl.tensor  # multi-hot: to the entry at position 0 of the logits


# --- where a row lies -------------------------------------------------------------------------------------------------


@triton.jit
def open_row(ptr, phase, row, row_stride, num_classes):
    """-> the row's Array. One that ends before the next boundary has an empty body, behind its end.

    ptr is 16-byte aligned; class c of a row stands phase + row * row_stride + c elements behind it.
    """
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    start = phase + row * row_stride
    aligned = (start + (VECTOR - 1)) // VECTOR * VECTOR
    head = (aligned - start).to(tl.int32)
    body = tl.maximum(num_classes - head, 0) // VECTOR * VECTOR
    return Array(ptr + aligned, head, body, num_classes)


@triton.jit
def only_if(live, array):
    """The array, without elements if not."""
    return Array(array.ptr, array.head, tl.where(live, array.body, 0), tl.where(live, array.length, 0))


@triton.jit
def same_classes(array, row):
    """The array with a body that is known to hold the same classes as row's: one mask serves both."""
    return Array(array.ptr, row.head, row.body, row.length)


@triton.jit
def rim_positions(array):
    """-> (positions, which lanes hold an element) of the rim, (2 * VECTOR,): what is in front in the lower half. The
    first program of a row has the rim."""
    VECTOR: tl.constexpr = 128 // array.ptr.dtype.element_ty.primitive_bitwidth
    lane = tl.arange(0, 2 * VECTOR)
    length = tl.where(tl.program_id(1) == 0, array.length, 0)
    positions = tl.where(lane < VECTOR, lane - array.head, array.body + lane - VECTOR)
    in_front = (lane < VECTOR) & (lane < tl.minimum(array.head, length))
    return positions, in_front | ((lane >= VECTOR) & (array.head + positions < length))


@triton.jit
def store_rim(array, rim, values, inside):
    """values at the rim's positions, fewer than there are threads: several of these read each element and one writes
    it, so a barrier orders the two where the array is the one that was read."""
    tl.debug_barrier()
    tl.store(array.ptr + rim, values.to(array.ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_lanes(ROWS: tl.constexpr, LANES: tl.constexpr):
    """Offsets within a tile, (ROWS, LANES)."""
    return tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def load_tile(array, tile, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Elements of a tile in fp32, -inf behind the body, (ROWS, LANES)."""
    offset = tile * (ROWS * LANES)
    lanes = tile_lanes(ROWS, LANES)
    return tl.load(array.ptr + offset + lanes, mask=lanes < array.body - offset, other=float("-inf")).to(tl.float32)


@triton.jit
def store_tile(array, tile, values, ROWS: tl.constexpr, LANES: tl.constexpr):
    offset = tile * (ROWS * LANES)
    lanes = tile_lanes(ROWS, LANES)
    values = values.to(array.ptr.dtype.element_ty)
    tl.store(array.ptr + offset + lanes, values, mask=lanes < array.body - offset)


@triton.jit
def part_of(array, TILE: tl.constexpr):
    """-> (first tile, behind the last tile) of this program, which shares the row with the others of its grid column"""
    tiles = tl.cdiv(array.body, TILE)
    each = tl.cdiv(tiles, tl.num_programs(1))
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, tiles)


@triton.jit
def last_tile(first, behind, position, TILE: tl.constexpr):
    """The tile to take last: the target's, or any other if that is not among them."""
    return tl.maximum(tl.minimum(position // TILE, behind - 1), first)


# --- targets ----------------------------------------------------------------------------------------------------------


@triton.jit
def index_target(labels, row, num_classes, VECTOR: tl.constexpr):
    index = tl.load(labels.ptr + row * labels.stride).to(tl.int64)
    ignored = tl.full((), False, tl.int1)
    if labels.ignore_index is not None:
        ignored = index == labels.ignore_index
    bad = ~ignored & ((index < 0) | (index >= labels.all_classes))
    column = index - labels.first_class
    here = ~(ignored | bad) & (column >= 0) & (column < num_classes)
    return Target(tl.where(here, column, -1).to(tl.int32), ignored, bad, labels.ptr)


@triton.jit
def multi_hot_target(labels, row, num_classes, VECTOR: tl.constexpr):
    """Its rows begin at the same remainders by VECTOR classes as the logits' rows: both bodies are the same classes."""
    start = labels.phase + row * labels.stride
    no = tl.full((), False, tl.int1)
    return Target(tl.full((), -1, tl.int32), no, no, labels.ptr + (start + (VECTOR - 1)) // VECTOR * VECTOR)


@triton.jit
def is_positive(target, positions, inside):
    """Which of these classes are positives of a multi-hot target."""
    entry = tl.load(target.ptr + positions, mask=inside, other=0)
    if entry.dtype.is_floating():
        entry = entry.to(tl.float32)
    return entry != 0


@triton.jit
def logit_of_target(array, target, asked):
    """-inf if the target is not there, or not asked for."""
    position = target.column - array.head
    return tl.load(array.ptr + position, mask=asked & (target.column >= 0), other=float("-inf")).to(tl.float32)
