"""From the statistics of rows to their loss, and to the coefficients of its gradient. What these numbers are stands in
``fused_losses/finish.py``.

A finish is one function of a row's numbers, or of vectors of them. Where a program has the whole row and nothing else
is needed, it ends the kernel that walks the row (``end_row``). ``finish_kernel`` is for all else: a mean or a sum over
the rows, class weights, means over the terms of a batch, statistics that were merged; ``finish_labels.py`` is for
labels, smoothing and margins. Sums are made by one program in a
fixed order: the loss has the same bits every time.

    FINISH(statistics, p, q, VALUE, SLOPE) -> (value, c, t)
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..losses import LossSpec
from . import device, logistic, softmax
from .formulas import formulas, sigmoid, softplus
from .sums import add, sum_of

_BLOCK, _WARPS = 1024, 8  # of finish_kernel, for any number of rows: a last, smaller batch compiles nothing anew


# --- one row, or many at once -----------------------------------------------------------------------------------------


@triton.jit
def softmax_finish(statistics, p, q, VALUE: tl.constexpr, SLOPE: tl.constexpr):
    """From m, l, z_y. p and q are the loss's hyper-parameters."""
    d = (statistics[2] - statistics[0]) - statistics[1]  # never via m + l, which loses digits at large offsets
    value = tl.where(d == d, VALUE(d, p, q, False), float("nan"))
    slope = tl.where(d == d, SLOPE(d, p, q, False), float("nan"))
    return value, -slope, slope


@triton.jit
def logistic_finish(statistics, p, q, VALUE: tl.constexpr, SLOPE: tl.constexpr):
    """From m, neg, z_y. p is what neg counts."""
    neg, z_y = statistics[1], statistics[2]
    sound = (neg == neg) & (z_y == z_y)
    return (
        softplus(-z_y, False) + p * neg,
        tl.where(sound, p, float("nan")),
        tl.where(sound, -sigmoid(-z_y, False), float("nan")),
    )


@triton.jit
def multi_hot_finish(statistics, p, q, VALUE: tl.constexpr, SLOPE: tl.constexpr):
    """From m, neg, pos. p is what neg counts, q what pos counts."""
    neg, pos = statistics[1], statistics[2]
    sound = (neg == neg) & (pos == pos)
    return q * pos + p * neg, tl.where(sound, p, float("nan")), tl.where(sound, -q, float("nan"))


class Outputs(NamedTuple):
    """Where the numbers of the rows go."""

    loss_ptr: tl.tensor  # (rows,), or None: statistics alone
    coefficients_ptr: tl.tensor  # (rows, 2), or None
    statistics_ptr: tl.tensor  # (rows, 3 | 4 | 3 + labels)
    num_labels: tl.tensor  # whose logits stand behind the statistics that are written here, or None


@triton.jit
def end_row(outputs, row, target, statistics, p, q, FINISH: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr):
    """Writes a row's statistics and, if they are asked for, its loss and coefficients. An ignored row is 0, one with a
    bad target NaN."""
    COLUMNS: tl.constexpr = len(statistics)
    columns = COLUMNS if outputs.num_labels is None else COLUMNS + outputs.num_labels
    live = ~(target.ignored | target.bad)
    dead = tl.where(target.ignored, 0.0, float("nan"))
    for i in tl.static_range(COLUMNS):
        tl.store(outputs.statistics_ptr + row * columns + i, tl.where(live, statistics[i], dead))
    if outputs.loss_ptr is not None:
        value, c, t = FINISH(statistics, p, q, VALUE, SLOPE)
        tl.store(outputs.loss_ptr + row, tl.where(live, value, dead))
        tl.store(outputs.coefficients_ptr + row * 2, tl.where(live, c, dead))
        tl.store(outputs.coefficients_ptr + row * 2 + 1, tl.where(live, t, dead))


class Ending(NamedTuple):
    """How a kernel that has a row ends it."""

    p: float
    q: float
    functions: dict[str, object]


def ending(spec: LossSpec, multi_hot: bool, finished: bool) -> Ending:
    """finished: the kernel fills loss and coefficients too."""
    functions = {"STATISTICS": _STATISTICS[spec.family, spec.labels, multi_hot]}
    if not finished:
        return Ending(0.0, 0.0, {**functions, "FINISH": None, "VALUE": None, "SLOPE": None})
    p, q, of_loss = finish_of(spec, multi_hot)
    return Ending(p, q, functions | of_loss)


_STATISTICS = {  # by family, whether there are several labels, whether they are multi-hot
    ("softmax", False, False): softmax.statistics,
    ("softmax", True, False): softmax.label_statistics,
    ("logistic", False, False): logistic.index_statistics,
    ("logistic", False, True): logistic.multi_hot_statistics,
    ("logistic", True, False): logistic.label_statistics,
}


def finish_of(spec: LossSpec, multi_hot: bool) -> tuple[float, float, dict[str, object]]:
    """p, q, and the functions. Of multi-hot targets with alpha, p and q come from the batch instead."""
    if spec.family == "softmax":
        value, slope, p, q = formulas(spec.loss, spec.params)
        return p, q, {"FINISH": softmax_finish, "VALUE": value, "SLOPE": slope}
    finish = multi_hot_finish if multi_hot else logistic_finish
    p = 1.0 if multi_hot else spec.weight_of_negatives
    return p, 1.0, {"FINISH": finish, "VALUE": None, "SLOPE": None}


# --- the rows of a batch ----------------------------------------------------------------------------------------------


@triton.jit
def weights_given(statistics_ptr, num_rows, all_classes, k, alpha, p, q, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """-> (p, q) of the finish"""
    return p, q


@triton.jit
def means_of_batch(statistics_ptr, num_rows, all_classes, k, alpha, p, q, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The same for means over the terms of the batch. Counts are added up as integers: exactly."""
    positives = tl.zeros((BLOCK,), tl.int64)
    chosen = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, num_rows, BLOCK):
        row = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        inside = row < num_rows
        number = tl.load(statistics_ptr + row * COLUMNS + 3, mask=inside, other=0.0).to(tl.int64)
        positives += number
        chosen += tl.where(inside, tl.minimum(all_classes - number, k), 0)
    return weights_of_means(positives, chosen, num_rows, alpha)


@triton.jit
def weights_of_means(positives, chosen, num_rows, alpha):
    """-> (what neg counts, what pos counts), from how many terms of each there are in the batch, (BLOCK,)"""
    rows = num_rows.to(tl.float32)
    of_pos = rows / tl.maximum(tl.sum(positives, axis=0), 1).to(tl.float32)
    return alpha * rows / tl.maximum(tl.sum(chosen, axis=0), 1).to(tl.float32), of_pos


@triton.jit
def counts_of(target_ptr, target_stride, weight_ptr, row, inside, ignore_index, all_classes):
    """-> (what each row counts, which are ignored)"""
    counts = tl.where(inside, 1.0, 0.0)
    ignored = ~inside
    if target_ptr is not None:
        target = tl.load(target_ptr + row * target_stride, mask=inside, other=0).to(tl.int64)
        if ignore_index is not None:
            ignored = ignored | (target == ignore_index)
        if weight_ptr is not None:  # a target that is no class has a NaN row already: only never read outside
            known = tl.minimum(tl.maximum(target, 0), all_classes - 1)
            counts = tl.load(weight_ptr + known, mask=inside, other=0.0)
    return tl.where(ignored, 0.0, counts), ignored


@triton.jit
def _finished(
    statistics_ptr, row, inside, p, q, COLUMNS: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    """-> (value, c, t) of rows"""
    first = tl.load(statistics_ptr + row * COLUMNS, mask=inside, other=0.0)
    second = tl.load(statistics_ptr + row * COLUMNS + 1, mask=inside, other=0.0)
    third = tl.load(statistics_ptr + row * COLUMNS + 2, mask=inside, other=0.0)
    return FINISH((first, second, third), p, q, VALUE, SLOPE)


@triton.jit(
    do_not_specialize=("target_stride", "num_rows", "ignore_index", "all_classes", "k"),
)
def finish_kernel(
    loss_ptr,  # (rows,) or ()
    coefficients_ptr,  # (rows, 2)
    statistics_ptr,  # (rows, COLUMNS)
    target_ptr, target_stride,  # (rows,), or None
    weight_ptr,  # (all classes,), or None
    num_rows, ignore_index, all_classes, k, alpha, p, q,
    WEIGHTS: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr, REDUCTION: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program; without a reduction, one for each block of rows."""
    p, q = WEIGHTS(statistics_ptr, num_rows, all_classes, k, alpha, p, q, COLUMNS, BLOCK)
    divisor = 1.0
    if REDUCTION != "none":
        total = tl.zeros((BLOCK,), tl.float32)
        rest, counted, rest_counted = total, total, total
        for begin in range(0, num_rows, BLOCK):
            row = (begin + tl.arange(0, BLOCK)).to(tl.int64)
            inside = row < num_rows
            value, _, _ = _finished(statistics_ptr, row, inside, p, q, COLUMNS, FINISH, VALUE, SLOPE)
            counts, ignored = counts_of(target_ptr, target_stride, weight_ptr, row, inside, ignore_index, all_classes)
            total, rest = add(total, rest, tl.where(ignored, 0.0, value) * counts)
            counted, rest_counted = add(counted, rest_counted, counts)
        if REDUCTION == "mean":
            divisor = sum_of(counted, rest_counted)
        tl.store(loss_ptr, sum_of(total, rest) / divisor)
    for begin in range(tl.program_id(0) * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
        row = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        inside = row < num_rows
        value, c, t = _finished(statistics_ptr, row, inside, p, q, COLUMNS, FINISH, VALUE, SLOPE)
        counts, ignored = counts_of(target_ptr, target_stride, weight_ptr, row, inside, ignore_index, all_classes)
        if REDUCTION == "none":
            tl.store(loss_ptr + row, tl.where(ignored, 0.0, value) * counts, mask=inside)
        share = counts / divisor
        tl.store(coefficients_ptr + row * 2, tl.where(ignored, 0.0, c * share), mask=inside)
        tl.store(coefficients_ptr + row * 2 + 1, tl.where(ignored, 0.0, t * share), mask=inside)


def ends_rows(target: Tensor, weight: Tensor | None, reduction: str, spec: LossSpec) -> bool:
    """Whether the kernel that has a row can finish it."""
    of_batch = target.dim() == 2 and spec.alpha is not None
    return reduction == "none" and weight is None and not of_batch


def empty(rows: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """loss and coefficients, for as many rows and on the device of ``rows``."""
    count = rows.shape[0]
    new = lambda shape: rows.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return new((count,) if reduction == "none" else ()), new((count, 2))


@functools.lru_cache
def _kernel(spec: LossSpec, multi_hot: bool, reduction: str) -> tuple[device.Kernel, float, float]:
    p, q, functions = finish_of(spec, multi_hot)
    weights = means_of_batch if multi_hot and spec.alpha is not None else weights_given
    columns = 4 if multi_hot else 3
    kernel = device.Kernel(
        finish_kernel, _WARPS, WEIGHTS=weights, **functions, REDUCTION=reduction, COLUMNS=columns, BLOCK=_BLOCK
    )  # fmt: skip
    return kernel, p, q


def launch(
    outputs: tuple[Tensor, Tensor], statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str,
    spec: LossSpec,
) -> None:  # fmt: skip
    """Fills outputs, the loss and the coefficients."""
    num_rows, multi_hot = statistics.shape[0], target.dim() == 2
    of_batch = multi_hot and spec.alpha is not None
    programs = 1 if reduction != "none" or of_batch else max(1, triton.cdiv(num_rows, _BLOCK))
    labels = (None, 0) if multi_hot else (target, target.stride(0))
    kernel, p, q = _kernel(spec, multi_hot, reduction)
    device.launch(
        kernel, (programs,), *outputs, statistics.contiguous(), *labels,
        None if weight is None else weight.contiguous(), num_rows, None if multi_hot else spec.ignore_index,
        spec.all_classes, spec.k or spec.all_classes, spec.alpha or 0.0, p, q,
    )  # fmt: skip
