"""From the terms of the rows to the loss, and back: class weights, reductions, normalisers. N numbers each.

A row has one term, its value (softmax family), or two, the sums over its positives and over S (logistic family).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reduction(NamedTuple):
    """How the values of the rows become the loss: weighed by w[y], if there are weights; none, sum, or mean."""

    kind: str
    row_weight: Tensor | None  # (rows,), 0 where ignored
    divisor: Tensor | int | None  # scalar, for mean: the weights, or the rows, not ignored

    def loss(self, values: Tensor) -> Tensor:
        if self.row_weight is not None:
            values = values * self.row_weight
        if self.kind == "none":
            return values
        total = values.sum()
        return total if self.divisor is None else total / self.divisor

    def grad_of_values(self, grad: Tensor) -> Tensor:
        """d(objective)/d(values) from d(objective)/d(loss): (rows,), or a scalar that holds for every row."""
        if self.divisor is not None:
            grad = grad / self.divisor
        return grad if self.row_weight is None else grad * self.row_weight


def reduction_of(target: Tensor, weight: Tensor | None, ignore_index: int, kind: str, dtype: torch.dtype) -> Reduction:
    """The reduction of a batch, known from its targets alone; dtype is that of the values."""
    row_weight = divisor = None
    if weight is not None:
        inside = target.clamp(0, weight.shape[0] - 1)  # a bad target's row is NaN already: only never read outside
        row_weight = weight.to(dtype)[inside].masked_fill(target == ignore_index, 0)
    if kind == "mean":
        if row_weight is not None:
            divisor = row_weight.sum()
        else:
            # counted in the values' dtype: a division of unlike dtypes costs several times as much
            divisor = (target != ignore_index).sum(dtype=dtype) if target.dim() == 1 else target.shape[0]
    return Reduction(kind, row_weight, divisor)


class TermScales(NamedTuple):
    """What the sums pos and neg of the logistic rows are multiplied by to become their values."""

    pos: Tensor | None  # None for 1
    neg: Tensor | float

    def values(self, sums: Tensor) -> Tensor:
        pos, neg = sums[:, 0], sums[:, 1]
        if self.pos is not None:
            return pos * self.pos + neg * self.neg
        return torch.add(pos, neg, alpha=self.neg)

    def grad_of_sums(self, grad: Tensor) -> Tensor:
        """(rows, 2), or (2,) that holds for every row, from d(objective)/d(values)."""
        if self is PLAIN_SUMS:
            return grad.unsqueeze(-1).expand(*grad.shape, 2)
        pos = grad if self.pos is None else grad * self.pos
        return torch.stack((pos, grad * self.neg), dim=-1)


PLAIN_SUMS = TermScales(None, 1.0)


def term_scales(alpha: float | None, num_positives: Tensor | None, num_classes: int, k: int) -> TermScales:
    """alpha None: plain sums. A number: means over the terms of a row for index targets (num_positives None), over
    those of the batch for multi-hot targets (num_positives per row), as the FRLR authors normalise. A term without
    members is 0.

    k as at the doors: 0 for all negatives.
    """
    if alpha is None:
        return PLAIN_SUMS
    if num_positives is None:
        return TermScales(None, alpha / max(1, min(k or num_classes, num_classes - 1)))
    num_negatives = num_classes - num_positives  # (rows,)
    chosen = num_negatives.clamp(max=k) if k > 0 else num_negatives
    rows = num_positives.shape[0]
    return TermScales(rows / num_positives.sum().clamp(min=1), alpha * rows / chosen.sum().clamp(min=1))


class Finish(NamedTuple):
    """From the terms of the rows to the loss."""

    reduction: Reduction
    scales: TermScales | None  # None for the softmax family

    def loss(self, terms: Tensor) -> Tensor:
        return self.reduction.loss(terms if self.scales is None else self.scales.values(terms))

    def slopes(self, one: Tensor, num_rows: int) -> Tensor:
        """d(loss) / d(terms), (rows,) or (rows, 2), from one, a scalar 1; in memory of its own or of fewer elements."""
        slopes = self.reduction.grad_of_values(one)
        if self.scales is None:
            return slopes.expand(num_rows)
        return self.scales.grad_of_sums(slopes).expand(num_rows, 2)


def finish_of(
    target: Tensor,
    weight: Tensor | None,
    positives: Tensor | None,
    family: str,
    alpha: float | None,
    num_classes: int,
    k: int,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
) -> Finish:
    """How the terms of a batch, of this dtype, become the loss.

    positives (rows,): how many a row has; given for multi-hot targets only, and needed there where alpha is a number.
    alpha, k: as in :func:`term_scales`.
    """
    scales = term_scales(alpha, positives, num_classes, k) if family == "logistic" else None
    return Finish(reduction_of(target, weight, ignore_index, reduction, dtype), scales)


def reduce_terms(
    terms: Tensor,
    target: Tensor,
    weight: Tensor | None,
    positives: Tensor | None,
    alpha: float | None,
    num_classes: int,
    k: int,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and slopes: d(loss) / d(term), of the shape of terms, (rows,) or (rows, 2). Arguments as in
    :func:`finish_of`."""
    family = "softmax" if terms.dim() == 1 else "logistic"
    finish = finish_of(target, weight, positives, family, alpha, num_classes, k, ignore_index, reduction, terms.dtype)
    loss = finish.loss(terms)
    return terms.clone() if loss is terms else loss, finish.slopes(terms.new_ones(()), terms.shape[0]).clone()


def slopes_shape(terms: Tensor, weight: Tensor | None, reduction: str) -> torch.Size:
    """The terms' own, but no elements where the loss is the terms themselves."""
    plain = terms.dim() == 1 and weight is None and reduction == "none"
    return torch.Size((0,)) if plain else terms.shape


def grad_of_terms(grad: Tensor, slopes: Tensor) -> Tensor:
    """d(objective) / d(terms) from d(objective) / d(loss), a scalar or (rows,)."""
    if grad.dim() == 1 and slopes.shape == (0,):
        return grad
    return grad * slopes if grad.dim() in (0, slopes.dim()) else grad.unsqueeze(1) * slopes
