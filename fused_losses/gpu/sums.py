"""Sums over a row in fp32 that stay right over a million equal terms, which a plain sum rounds all in one direction.

What a thread holds of a tile is added in pairs, which is exact for equal numbers; what then rounds off beside the sum
of the tiles before it is kept in ``rest``: three instructions for each thread and tile.
"""

import triton
import triton.language as tl


@triton.jit
def _plus(x, y):
    return x + y


@triton.jit
def _product_less_1(p, q):
    return tl.fma(p, q, p + q)


@triton.jit
def _within_threads(x, COMBINE: tl.constexpr, VECTOR: tl.constexpr):
    """(LANES,), VECTOR neighbours in each thread -> (LANES // VECTOR,)"""
    LANES: tl.constexpr = x.shape[0]
    if VECTOR == 8:
        left, right = tl.split(tl.reshape(x, (LANES // 2, 2)))
        x = COMBINE(left, right)
    if VECTOR >= 4:
        left, right = tl.split(tl.reshape(x, (LANES // VECTOR * 2, 2)))
        x = COMBINE(left, right)
    if VECTOR >= 2:
        left, right = tl.split(tl.reshape(x, (LANES // VECTOR, 2)))
        x = COMBINE(left, right)
    return x


@triton.jit
def fold(x, VECTOR: tl.constexpr):
    """The sum of what each thread holds of a tile, (ROWS, LANES) -> (LANES // VECTOR,)"""
    return _within_threads(tl.sum(x, axis=0), _plus, VECTOR)


@triton.jit
def fold_product(p, VECTOR: tl.constexpr):
    """The product of the 1 + p that each thread holds of a tile, less 1: small p keep their digits."""
    return _within_threads(tl.reduce(p, 0, _product_less_1), _product_less_1, VECTOR)


@triton.jit
def add(total, rest, x):
    """-> (total + x, rest + what that rounds off)"""
    new = total + x
    return new, rest + (x - (new - total))


@triton.jit
def sum_of(total, rest):
    """One number from the sums of the threads. An infinite sum leaves NaN as its rest."""
    return tl.sum(tl.where(rest == rest, total + rest, total), axis=0)
