"""Sums over a row in fp32 that stay right over a million equal terms, which a plain sum rounds all in one direction.

What a thread holds of a tile is added in pairs, which is exact for equal numbers; what then rounds off beside the sum
of the tiles before it is kept in ``rest``: three instructions for each thread and tile.
"""

import triton
import triton.language as tl


@triton.jit
def fold(x, VECTOR: tl.constexpr):
    """The sum of what each thread holds of a tile, (ROWS, LANES) -> (LANES // VECTOR,)"""
    LANES: tl.constexpr = x.shape[1]
    x = tl.sum(x, axis=0)
    if VECTOR == 8:
        left, right = tl.split(tl.reshape(x, (LANES // 2, 2)))
        x = left + right
    left, right = tl.split(tl.reshape(x, (LANES // VECTOR * 2, 2)))
    left, right = tl.split(tl.reshape(left + right, (LANES // VECTOR, 2)))
    return left + right


@triton.jit
def add(total, rest, x):
    """-> (total + x, rest + what that rounds off)"""
    new = total + x
    return new, rest + (x - (new - total))


@triton.jit
def sum_of(total, rest):
    """One number from the sums of the threads. An infinite sum leaves NaN as its rest."""
    return tl.sum(tl.where(rest == rest, total + rest, total), axis=0)
