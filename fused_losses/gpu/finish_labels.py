"""The finish of rows with several labels, with one that is smoothed, or with a margin: what
``fused_losses/finish_labels.py`` and ``fused_losses/margin.py`` say.

A program has a block of rows, one for each thread, and goes over their places for labels one by one. A class index with
a margin is one label. What the batch must be known for, the divisor of a mean and the means over its terms, every
program counts for itself; the loss of a reduction is a second, small launch.

    FINISH(block, scratch_ptr, step, terms, p, q, VALUE, SLOPE) -> (value, c); the labels' coefficients are written

scratch_ptr: to the rows' numbers of the first place, step: from one place to the next; terms: how many logits smoothing
takes its mean of.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..losses import LossSpec
from ..margin import first_label
from . import device
from .finish import counts_of, finish_of, weights_of_means
from .formulas import exp, logaddexp, sigmoid, softplus
from .sums import add, sum_of

_INF = tl.constexpr(float("inf"))
_LEAST_SINE = tl.constexpr(2.0**-11)
_BLOCK, _WARPS = 128, 4  # a row for each thread
_WIDE, _REDUCTION_WARPS = 1024, 8  # rows at a time where the batch is counted or added up
_MOST_PROGRAMS = 64  # where every program counts the batch: its cost stays that of the rows
_MOST_LABELS = 64  # one thread goes over a row P^2 times; beyond, plain PyTorch spreads (rows, P, P) over the device
_NO_MARGIN = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


# --- the labels of a block of rows ------------------------------------------------------------------------------------


class Margin(NamedTuple):
    """The numbers of ``margin.MarginTerms``."""

    cos: tl.tensor
    sin: tl.tensor
    cosine: tl.tensor
    beyond: tl.tensor
    scale: tl.tensor
    offset: tl.tensor


class Block(NamedTuple):
    """A block of rows: numbers and pointers (BLOCK,) where not said otherwise."""

    inside: tl.tensor
    statistics_ptr: tl.tensor
    logit_ptr: tl.tensor  # those of the statistics that are the labels' logits
    label_ptr: tl.tensor  # None for class indices, whose one place holds a label
    weight_ptr: tl.tensor  # of the labels' weights, or None
    places: tl.tensor  # (), for labels
    eps: tl.tensor  # (), or None without smoothing
    margin: Margin
    coefficient_ptr: tl.tensor  # of the labels
    ignored: tl.tensor
    share: tl.tensor  # d(loss) / d(value)


@triton.jit
def psi(z, margin):
    """-> (psi, its slope). Whether there is an angle is known when it runs: without one any logit is taken."""
    plain = tl.div_rn(z - margin.offset, margin.scale)
    u = tl.where(plain < -1.0, -1.0, tl.where(plain > 1.0, 1.0, plain))  # NaN stays
    sine = tl.sqrt_rn((1.0 - u) * (1.0 + u))
    turned = u * margin.cos - sine * margin.sin
    slope = margin.cos + tl.div_rn(u, tl.maximum(sine, _LEAST_SINE)) * margin.sin
    beyond = (u < -margin.cos) & (margin.sin > 0.0)
    turned, slope = tl.where(beyond, u - margin.beyond, turned), tl.where(beyond, 1.0, slope)
    capped = (u > margin.cos) & (margin.sin < 0.0)
    turned, slope = tl.where(capped, 1.0, turned), tl.where(capped, 0.0, slope)
    still = ((margin.sin == 0.0) & (margin.cos == 1.0)) | (z == -_INF)
    turned, slope = tl.where(still, plain, turned), tl.where(still, 1.0, slope)
    return tl.where(z == -_INF, z, margin.scale * (turned - margin.cosine) + margin.offset), slope


@triton.jit
def _present(label_ptr, inside, place):
    """Whether there is a label."""
    if label_ptr is not None:
        inside = inside & (tl.load(label_ptr + place, mask=inside, other=-1) >= 0)
    return inside


@triton.jit
def _label(block, place):
    """-> (whether there is a label; its weight w_p; psi(z_p), -inf where there is none; the slope of psi)"""
    present = _present(block.label_ptr, block.inside, place)
    w = tl.where(present, 1.0, 0.0)
    if block.weight_ptr is not None:
        w = tl.load(block.weight_ptr + place, mask=present, other=0.0).to(tl.float32)
    z = tl.load(block.logit_ptr + place, mask=present, other=-_INF)
    z, slope = psi(z, block.margin)
    return present, w, z, slope


@triton.jit
def _weighted(w, value):
    """A label of weight 0 counts nothing, not even 0 * inf."""
    return tl.where((w == 0.0) & (tl.abs(value) == _INF), 0.0, w * value)


@triton.jit
def _counted(label_ptr, inside, places, num_classes, k):
    """-> (positives, chosen negatives) of rows, int64"""
    positives = tl.zeros(inside.shape, tl.int64)
    for place in range(places):
        positives += _present(label_ptr, inside, place).to(tl.int64)
    return positives, tl.where(inside, tl.minimum(num_classes - positives, k), 0)


@triton.jit
def _smoothing(block, m, terms):
    """eps (sum of w_p z_p - mean of z) by differences from m: of two means beside an offset little would be left. A
    masked label makes it +inf, as a masked negative does."""
    of_labels = tl.zeros(block.inside.shape, tl.float32)
    above, weights, masked = of_labels, of_labels, of_labels
    for place in range(block.places):
        present, w, z, _ = _label(block, place)
        difference = tl.where(present, z - m, 0.0)
        of_labels += tl.where(w == 0.0, 0.0, w * difference)
        above += difference
        weights += w
        masked = tl.where(difference == -_INF, 1.0, masked)
    s = tl.load(block.statistics_ptr + 2, mask=block.inside, other=0.0)
    smoothed = block.eps * (of_labels + (weights - 1.0) * m - tl.div_rn(s + above, terms))
    return tl.where(masked > 0.0, _INF, smoothed)


@triton.jit
def _write(block, place, t, terms):
    """The coefficient of a label. t: the gradient by psi(z_p) without what smoothing adds."""
    present, w, _, slope = _label(block, place)
    if block.eps is not None:
        t += block.eps * (w - tl.div_rn(1.0, terms))
    t = tl.where(present, t * slope, 0.0) * block.share
    tl.store(block.coefficient_ptr + place, tl.where(block.ignored, 0.0, t), mask=block.inside)


# --- the families -----------------------------------------------------------------------------------------------------


@triton.jit
def softmax_labels(block, scratch_ptr, step, terms, p, q, VALUE: tl.constexpr, SLOPE: tl.constexpr):
    """From m, l and the labels' logits. p and q are the loss's hyper-parameters.

    Relative to the largest of all logits: never via m + l, which loses digits at large offsets. The sum over the other
    labels is one over those before and one over those behind: no difference, since a label may be all of the sum.
    """
    z_ptr, total_ptr, slope_ptr = scratch_ptr, scratch_ptr + block.places * step, scratch_ptr + 2 * block.places * step
    m = tl.load(block.statistics_ptr, mask=block.inside, other=0.0)
    l = tl.load(block.statistics_ptr + 1, mask=block.inside, other=0.0)
    top = tl.where(l == -_INF, -_INF, m)
    sound = (m == m) & (l == l)
    for place in range(block.places):
        _, _, z, _ = _label(block, place)
        top = tl.maximum(top, z)
        sound = sound & (z == z)
    top = tl.where(top == -_INF, 0.0, top)
    rest = (m - top) + l

    before = tl.full(block.inside.shape, -_INF, tl.float32)
    behind = before
    for place in range(block.places):
        _, _, z, _ = _label(block, place)
        z -= top
        tl.store(z_ptr + place * step, z, mask=block.inside)
        tl.store(total_ptr + place * step, before, mask=block.inside)
        before = logaddexp(before, z, False)

    value = tl.zeros(block.inside.shape, tl.float32)
    c = value
    for i in range(block.places):
        place = block.places - 1 - i
        present, w, _, _ = _label(block, place)
        z = tl.load(z_ptr + place * step, mask=block.inside, other=-_INF)
        before = tl.load(total_ptr + place * step, mask=block.inside, other=-_INF)
        total = logaddexp(logaddexp(before, behind, False), rest, False)
        total = tl.where(sound, total, float("nan"))  # L_p; tl.minimum and tl.maximum may lose a NaN
        d = z - total
        value_of_d = tl.where(d == d, VALUE(d, p, q, False), float("nan"))
        slope_of_d = tl.where(d == d, SLOPE(d, p, q, False), float("nan"))
        value += tl.where(present, _weighted(w, value_of_d), 0.0)
        slope_of_d = tl.where(present, w * slope_of_d, 0.0)
        c -= slope_of_d * tl.where(total == -_INF, 1.0, exp(rest - total, False))
        tl.store(total_ptr + place * step, total, mask=block.inside)
        tl.store(slope_ptr + place * step, slope_of_d, mask=block.inside)
        behind = logaddexp(behind, z, False)

    for place in range(block.places):
        z = tl.load(z_ptr + place * step, mask=block.inside, other=-_INF)
        t = tl.load(slope_ptr + place * step, mask=block.inside, other=0.0)
        for other in range(block.places):
            total = tl.load(total_ptr + other * step, mask=block.inside, other=0.0)
            share = tl.where((other != place) & (z > -_INF), exp(z - total, False), 0.0)
            t -= tl.load(slope_ptr + other * step, mask=block.inside, other=0.0) * share
        _write(block, place, t, terms)
    if block.eps is not None:
        value += _smoothing(block, m, terms)
    return value, c


@triton.jit
def logistic_labels(block, scratch_ptr, step, terms, p, q, VALUE: tl.constexpr, SLOPE: tl.constexpr):
    """From neg and the labels' logits. p is what neg counts, q what the labels count."""
    neg = tl.load(block.statistics_ptr + 1, mask=block.inside, other=0.0)
    sound = neg == neg
    pos = tl.zeros(block.inside.shape, tl.float32)
    for place in range(block.places):
        present, w, z, _ = _label(block, place)
        sound = sound & (z == z)
        terms_of_label = _weighted(w, softplus(-z, False)) + _weighted(1.0 - w, softplus(z, False))
        pos += tl.where(present, terms_of_label, 0.0)
        t = (1.0 - w) * sigmoid(z, False) - w * sigmoid(-z, False)  # sigmoid(z) - w would lose the digits of a small t
        _write(block, place, q * t, terms)
    value = q * pos + p * neg
    if block.eps is not None:
        value += _smoothing(block, 0.0, terms)
    return value, tl.where(sound, p, float("nan"))


# --- the rows of a batch ----------------------------------------------------------------------------------------------


@triton.jit
def _means_of_batch(target_ptr, target_stride, places, num_rows, num_classes, k, alpha, WIDE: tl.constexpr):
    """-> (what neg counts, what the labels count), for means over the terms of the batch"""
    positives = tl.zeros((WIDE,), tl.int64)
    chosen = positives
    for begin in range(0, num_rows, WIDE):
        row = (begin + tl.arange(0, WIDE)).to(tl.int64)
        of_rows = _counted(target_ptr + row * target_stride, row < num_rows, places, num_classes, k)
        positives += of_rows[0]
        chosen += of_rows[1]
    return weights_of_means(positives, chosen, num_rows, alpha)


@triton.jit
def _divisor(
    target_ptr, target_stride, weight_ptr, num_rows, ignore_index, num_classes, REDUCTION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    divisor = tl.full((), 1.0, tl.float32)
    if REDUCTION == "mean":
        counted = tl.zeros((WIDE,), tl.float32)
        rest = counted
        for begin in range(0, num_rows, WIDE):
            row = (begin + tl.arange(0, WIDE)).to(tl.int64)
            inside = row < num_rows
            counts, _ = counts_of(target_ptr, target_stride, weight_ptr, row, inside, ignore_index, num_classes)
            counted, rest = add(counted, rest, counts)
        divisor = sum_of(counted, rest)
    return divisor


@triton.jit(do_not_specialize=("target_stride", "num_rows", "places", "ignore_index", "num_classes", "k"))
def finish_labels_kernel(
    value_ptr,  # (rows,): of each row in the loss, but for the divisor
    coefficients_ptr,  # (rows, 1 + places), or (rows, 2 + places) with labels
    scratch_ptr,  # (3, places, rows), or None: see softmax_labels
    statistics_ptr,  # (rows, 2 + places), or (rows, 3 + places) with labels
    target_ptr, target_stride,  # (rows,), or labels (rows, places)
    class_weight_ptr,  # (all classes,), or None
    label_weight_ptr,  # (rows, places), or None
    num_rows, places, ignore_index, num_classes, k, alpha, eps, cos, sin, cosine, beyond, scale, offset, p, q,
    LABELS: tl.constexpr, FINISH: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = 3 if LABELS else 2  # the column of the first label's logit
    if alpha is not None:
        p, q = _means_of_batch(target_ptr, target_stride, places, num_rows, num_classes, k, alpha, WIDE)
    divisor = _divisor(
        target_ptr, target_stride, class_weight_ptr, num_rows, ignore_index, num_classes, REDUCTION, WIDE
    )  # fmt: skip
    margin = Margin(cos, sin, cosine, beyond, scale, offset)
    for begin in range(tl.program_id(0) * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
        row = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        inside = row < num_rows
        counts, ignored = counts_of(
            target_ptr, target_stride, class_weight_ptr, row, inside, ignore_index, num_classes
        )  # fmt: skip
        share = counts / divisor
        statistics = statistics_ptr + row * (FIRST + places)
        coefficients = coefficients_ptr + row * (FIRST - 1 + places)
        label_ptr = target_ptr + row * target_stride if LABELS else None
        weight_ptr = None if label_weight_ptr is None else label_weight_ptr + row * places
        scratch = None if scratch_ptr is None else scratch_ptr + row
        block = Block(
            inside, statistics, statistics + FIRST, label_ptr, weight_ptr, places, eps, margin,
            coefficients + (FIRST - 1), ignored, share,
        )  # fmt: skip
        positives, chosen = _counted(label_ptr, inside, places, num_classes, k)
        terms = (positives + chosen).to(tl.float32)
        value, c = FINISH(block, scratch, num_rows.to(tl.int64), terms, p, q, VALUE, SLOPE)
        tl.store(value_ptr + row, tl.where(ignored, 0.0, value) * counts, mask=inside)
        tl.store(coefficients, tl.where(ignored, 0.0, c * share), mask=inside)
        if LABELS:
            b = tl.zeros((BLOCK,), tl.float32)
            if eps is not None:
                b = tl.where(ignored, 0.0, tl.div_rn(-eps, terms) * share)
            tl.store(coefficients + 1, b, mask=inside)


@triton.jit(do_not_specialize=("target_stride", "num_rows", "ignore_index", "num_classes"))
def reduction_kernel(
    loss_ptr,  # ()
    value_ptr,  # (rows,)
    target_ptr, target_stride, class_weight_ptr, num_rows, ignore_index, num_classes,  # as above
    REDUCTION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program."""
    total = tl.zeros((WIDE,), tl.float32)
    rest = total
    for begin in range(0, num_rows, WIDE):
        row = (begin + tl.arange(0, WIDE)).to(tl.int64)
        total, rest = add(total, rest, tl.load(value_ptr + row, mask=row < num_rows, other=0.0))
    divisor = _divisor(
        target_ptr, target_stride, class_weight_ptr, num_rows, ignore_index, num_classes, REDUCTION, WIDE
    )  # fmt: skip
    tl.store(loss_ptr, sum_of(total, rest) / divisor)


@functools.lru_cache
def _kernels(spec: LossSpec, reduction: str, wide: int) -> tuple[device.Kernel, device.Kernel, float, float]:
    """Of the rows, and of their reduction; p and q."""
    p, q, functions = finish_of(spec, False)
    functions["FINISH"] = softmax_labels if spec.family == "softmax" else logistic_labels
    of_all = {"REDUCTION": reduction, "WIDE": wide}
    rows = device.Kernel(finish_labels_kernel, _WARPS, LABELS=spec.labels, **functions, **of_all, BLOCK=_BLOCK)
    return rows, device.Kernel(reduction_kernel, _REDUCTION_WARPS, **of_all), p, q


def serves(statistics: Tensor, spec: LossSpec) -> bool:
    return statistics.shape[1] - first_label(spec) <= _MOST_LABELS


def launch(
    statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str, spec: LossSpec
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the coefficients (rows, 2 | 2 + P)."""
    first = first_label(spec)
    num_rows, places = statistics.shape[0], statistics.shape[1] - first
    of_batch = spec.labels and spec.alpha is not None
    programs = max(1, triton.cdiv(num_rows, _BLOCK))
    if reduction == "mean" or of_batch:
        programs = min(programs, _MOST_PROGRAMS)
    target = target.contiguous() if spec.labels else target
    weight = None if weight is None else weight.contiguous()
    kernel, of_rows, p, q = _kernels(spec, reduction, _WIDE)

    new = lambda *shape: statistics.new_empty(shape, dtype=torch.float32)  # noqa: E731
    value, coefficients = new(num_rows), new(num_rows, first - 1 + places)
    scratch = new(3, places, num_rows) if spec.family == "softmax" else None
    weights = (None, weight) if spec.labels else (weight, None)
    device.launch(
        kernel, (programs,), value, coefficients, scratch, statistics.contiguous(), target, target.stride(0), *weights,
        num_rows, places, spec.ignore_index, spec.all_classes, spec.k or spec.all_classes,
        spec.alpha if of_batch else None, spec.label_smoothing or None, *(spec.margin or _NO_MARGIN), p, q,
    )  # fmt: skip
    if reduction == "none":
        return value, coefficients
    loss = new()
    device.launch(
        of_rows, (1,), loss, value, target, target.stride(0), weights[0], num_rows, spec.ignore_index, spec.all_classes
    )
    return loss, coefficients
