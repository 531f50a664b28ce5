"""What every backward kernel does with a row: its coefficients times the upstream gradient, what stands at its
positives, and rows that are NaN or 0 as a whole."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..losses import LossSpec
from . import logistic, softmax
from .formulas import formulas, sigmoid
from .rows import is_positive, part_of, rim_positions, store_tile


class Scale(NamedTuple):
    """A row's coefficients times its upstream gradient, and what the gradient of a negative takes besides its logit."""

    c: tl.tensor
    t: tl.tensor
    p: tl.tensor
    q: tl.tensor


@triton.jit
def scale_of_row(
    grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, row, a, b, PARAMETERS: tl.constexpr
):  # fmt: skip
    """grad_stride 0: one upstream gradient for all rows."""
    grad = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    c = tl.load(coefficients_ptr + row * 2) * grad
    t = tl.load(coefficients_ptr + row * 2 + 1) * grad
    p, q = PARAMETERS(statistics_ptr, row, a, b)
    return Scale(c, t, p, q)


@triton.jit
def fill_of_row(target, scale):
    """-> (what a whole row becomes if it is not 0; whether it does)"""
    spoilt = (scale.c != scale.c) | (scale.t != scale.t)
    return tl.where(target.ignored, 0.0, float("nan")), spoilt | target.ignored


@triton.jit
def index_positive(z, row, target, positions, inside, scale, FAST: tl.constexpr):
    """-> (which elements are positives, their gradient)"""
    return positions == target.column - row.head, scale.t


@triton.jit
def multi_hot_positive(z, row, target, positions, inside, scale, FAST: tl.constexpr):
    return is_positive(target, positions, inside), scale.t * sigmoid(-z, FAST)


@triton.jit
def fill(drow, value, ROWS: tl.constexpr, LANES: tl.constexpr):
    """This program's part of a row."""
    first, behind = part_of(drow, ROWS * LANES)
    for tile in range(first, behind):
        store_tile(drow, tile, tl.full((ROWS, LANES), 0.0, tl.float32) + value, ROWS, LANES)
    rim, inside = rim_positions(drow)
    tl.store(drow.ptr + rim, (tl.zeros(rim.shape, tl.float32) + value).to(drow.ptr.dtype.element_ty), mask=inside)


# --- arguments of the kernels -----------------------------------------------------------------------------------------


def upstream(grad: Tensor, coefficients: Tensor, statistics: Tensor) -> tuple:
    """grad_ptr, grad_stride, coefficients_ptr, statistics_ptr"""
    return grad, grad.stride(0) if grad.dim() == 1 else 0, coefficients.contiguous(), statistics.contiguous()


def of_negatives(spec: LossSpec) -> tuple[dict[str, object], float, float]:
    """PARAMETERS and NEGATIVE, a and b. For the softmax family these are the same, whatever the loss."""
    if spec.family == "softmax":
        return {"PARAMETERS": softmax.of_row, "NEGATIVE": softmax.share}, 0.0, 0.0
    _, phi_slope, a, b = formulas(spec.loss, spec.params)
    return {"PARAMETERS": logistic.hyper_parameters_of_row, "NEGATIVE": phi_slope}, a, b
