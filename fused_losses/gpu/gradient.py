"""What every backward kernel does with a row: its coefficients times the upstream gradient, what stands at its
positives, and rows that are NaN or 0 as a whole."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..losses import LossSpec
from . import logistic, softmax
from .formulas import formulas, sigmoid, slope_of_phi
from .labels import CHUNK, column_of_label
from .rows import is_positive, part_of, rim_positions, store_tile


class Scale(NamedTuple):
    """A row's coefficients times its upstream gradient, and what the gradient of a negative takes besides its logit."""

    c: tl.tensor
    p: tl.tensor
    q: tl.tensor
    t: tl.tensor


class LabelScale(NamedTuple):
    """The same with several labels."""

    c: tl.tensor
    p: tl.tensor
    q: tl.tensor
    t_ptr: tl.tensor  # to the labels' coefficients,
    grad: tl.tensor  # and what these are multiplied by


class SmoothedScale(NamedTuple):
    """The same with label smoothing."""

    c: tl.tensor
    p: tl.tensor
    q: tl.tensor
    t_ptr: tl.tensor
    grad: tl.tensor
    b: tl.tensor


# Which of them a function is given: older compilers return no tuple with a None in it, which one type would need.
_ONE_TARGET = tl.constexpr(len(Scale._fields))
_SMOOTHED = tl.constexpr(len(SmoothedScale._fields))

# scale_of_row(grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, row, num_labels, a, b, PARAMETERS) -> one of
# them; grad_stride 0: one upstream gradient for all rows.


@triton.jit
def scale_of_row(
    grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, row, num_labels, a, b, PARAMETERS: tl.constexpr
):  # fmt: skip
    grad = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    c = tl.load(coefficients_ptr + row * 2) * grad
    t = tl.load(coefficients_ptr + row * 2 + 1) * grad
    p, q = PARAMETERS(statistics_ptr, row, 3, a, b)
    return Scale(c, p, q, t)


@triton.jit
def scale_of_labels(
    grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, row, num_labels, a, b, PARAMETERS: tl.constexpr
):  # fmt: skip
    grad = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    coefficients_ptr += row * (2 + num_labels)
    c = tl.load(coefficients_ptr) * grad
    p, q = PARAMETERS(statistics_ptr, row, 3 + num_labels, a, b)
    return LabelScale(c, p, q, coefficients_ptr + 2, grad)


@triton.jit
def scale_of_labels_smoothed(
    grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, row, num_labels, a, b, PARAMETERS: tl.constexpr
):  # fmt: skip
    plain = scale_of_labels(
        grad_ptr, grad_stride, coefficients_ptr, statistics_ptr, row, num_labels, a, b, PARAMETERS
    )  # fmt: skip
    shift = tl.load(plain.t_ptr - 1) * plain.grad
    return SmoothedScale(plain.c, plain.p, plain.q, plain.t_ptr, plain.grad, shift)


@triton.jit
def fill_of_row(target, scale):
    """-> (what a whole row becomes if it is not 0; whether it does)"""
    spoilt = scale.c != scale.c
    if len(scale) == _ONE_TARGET:
        spoilt = (scale.c != scale.c) | (scale.t != scale.t)
    return tl.where(target.ignored, 0.0, float("nan")), spoilt | target.ignored


@triton.jit
def of_negative(z, scale, NEGATIVE: tl.constexpr, FAST: tl.constexpr):
    gradient = scale.c * NEGATIVE(z, scale.p, scale.q, FAST)
    if len(scale) == _SMOOTHED:
        gradient += scale.b
    return gradient


@triton.jit
def filled_here(position, drow, TILE: tl.constexpr):
    """Whether this program fills a position. The first program of a row has the rim."""
    first, behind = part_of(drow, TILE)
    first = tl.where(tl.program_id(1) == 0, -2147483648, first * TILE)
    tail = tl.where(tl.program_id(1) == 0, drow.body, 2147483647)
    return ((position >= first) & (position < tl.minimum(behind * TILE, drow.body))) | (position >= tail)


@triton.jit
def index_positive(z, row, target, positions, inside, scale, FAST: tl.constexpr):
    """-> (which elements are positives, their gradient)"""
    return positions == target.column - row.head, scale.t


@triton.jit
def multi_hot_positive(z, row, target, positions, inside, scale, FAST: tl.constexpr):
    return is_positive(target, positions, inside), scale.t * sigmoid(-z, FAST)


@triton.jit
def write_labels(drow, target, scale, TILE: tl.constexpr):
    """The gradient at the labels, over what this program has written there itself: a barrier orders the two."""
    tl.debug_barrier()
    for start in range(0, target.number, CHUNK):
        place = start + tl.arange(0, CHUNK)
        column = column_of_label(target, place)
        t = tl.load(scale.t_ptr + place, mask=place < target.number, other=0.0) * scale.grad
        here = (column >= 0) & filled_here(column - drow.head, drow, TILE)
        tl.store(drow.ptr + (column - drow.head), t.to(drow.ptr.dtype.element_ty), mask=here)


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


def of_negatives(spec: LossSpec, itemsize: int) -> tuple[dict[str, object], float, float]:
    """SCALE, PARAMETERS and NEGATIVE, a and b. For the softmax family these are the same, whatever the loss."""
    scale = scale_of_row
    if spec.labels:
        scale = scale_of_labels_smoothed if spec.label_smoothing else scale_of_labels
    if spec.family == "softmax":
        return {"SCALE": scale, "PARAMETERS": softmax.of_row, "NEGATIVE": softmax.share}, 0.0, 0.0
    _, _, a, b = formulas(spec.loss, spec.params)
    slope = slope_of_phi(spec.loss, spec.params, itemsize)
    return {"SCALE": scale, "PARAMETERS": logistic.hyper_parameters_of_row, "NEGATIVE": slope}, a, b
