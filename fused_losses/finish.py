"""From the statistics of the rows to the loss, and to the coefficients of its gradient: N numbers each, plain PyTorch.

Statistics (rows, columns), what a forward door has seen of a row:

- softmax family: m, l, z_y. m the largest logit of S, l = log sum over S of exp(z_j - m); m is 0 where l is -inf.
- logistic family: m, neg, z_y; for multi-hot targets m, neg, pos, positives. neg = sum over S of phi(z_j), pos = sum
  over the positives of softplus(-z_p), positives how many there are.
- with labels: m, l or neg, s, z_1 ... z_P; ``finish_labels.py``.
- z_y is the target's logit: -inf in a row whose target is a class of another shard. A row with a NaN, or with a target
  that is no class, has a NaN among m, l, z_y, neg, pos; so has one of the softmax family with a +inf.

Coefficients (rows, 2), c and t; with labels (rows, 2 + P), c, b, t_1 ... t_P: the gradient is

    softmax    c exp((z_j - m) - l) at S, t at the target
    logistic   c phi'(z_j) at S, t at the target; for multi-hot targets t sigma(-z_p) at every positive p
    labels     b more at S where labels are smoothed, t_p at the labels

A row whose coefficients are NaN has a gradient of NaN. An ignored row has value, statistics and coefficients 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .finish_labels import chosen_negatives, finish_labels, number
from .formulas import FORMULAS, INF, softplus
from .losses import LossSpec
from .margin import MarginTerms, first_label


def finish(
    statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str, spec: LossSpec
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the coefficients for an upstream gradient of 1.

    target: class indices (rows,), multi-hot (rows, classes), whose entries are not read, or labels (rows, P). weight,
    of the statistics' dtype: of the classes of all shards with class indices, (rows, P) with labels.
    """
    values, coefficients = finish_rows(statistics, target, weight, spec)
    reduced = Reduction.of(target, weight, reduction, spec, values)
    coefficients = coefficients * reduced.share()[:, None]
    return reduced.loss(values), reduced.without_ignored(coefficients)


def ignored_rows(target: Tensor, spec: LossSpec) -> Tensor | None:
    """Which rows are ignored, bool (rows,); None where none can be."""
    if spec.ignore_index is None or spec.multi_hot(target):
        return None
    return (target[:, 0] if spec.labels else target) == spec.ignore_index


class Reduction(NamedTuple):
    """How the values of the rows become the loss; known from the targets alone."""

    counts: Tensor  # (rows,): the weight of the row's class, 1 without weights, 0 where ignored
    ignored: Tensor | None  # (rows,); None where none can be
    divisor: Tensor | None  # scalar, for a mean
    summed: bool

    @classmethod
    def of(cls, target: Tensor, weight: Tensor | None, reduction: str, spec: LossSpec, like: Tensor) -> "Reduction":
        """like: (rows,) of the values' dtype."""
        ignored = ignored_rows(target, spec)
        if weight is None or spec.labels:
            counts = torch.ones_like(like)
        else:  # a target that is no class has a NaN row already: only never read outside
            counts = weight[target.clamp(0, weight.shape[0] - 1)]
        if ignored is not None:
            counts = counts.masked_fill(ignored, 0)
        return cls(counts, ignored, counts.sum() if reduction == "mean" else None, reduction != "none")

    def share(self) -> Tensor:  # no property: torch 2.10 traces none of a tuple
        """d(loss) / d(value) of each row, (rows,)."""
        return self.counts if self.divisor is None else self.counts / self.divisor

    def without_ignored(self, rows: Tensor) -> Tensor:
        """Literal zeros in ignored rows, also where all are ignored and their share is 0 / 0."""
        if self.ignored is None:
            return rows
        return rows.masked_fill(self.ignored.view(-1, *(1,) * (rows.dim() - 1)), 0)

    def loss(self, values: Tensor) -> Tensor:
        values = self.without_ignored(values) * self.counts
        if not self.summed:
            return values
        return values.sum() if self.divisor is None else values.sum() / self.divisor


class RowStatistics(NamedTuple):
    """What is known of each row of the batch, (N,) each, () for one row; 0 and False in ignored rows.

    What :func:`fused_losses.row_statistics` gives, and a linear loss with ``return_statistics=True``.

    Args:
        log_odds: float32 or float64, of the target among the target and S; None where the loss is of the logistic
            family.
        target_logit: the target's logit, without a margin.
        hardest_logit: the largest of S; -inf if S is empty or masked.
        correct: bool, target_logit > hardest_logit: top-1 accuracy is its mean.

    Example:
        >>> head = fl.LinearLoss(8, 1000)
        >>> loss, statistics = head(torch.randn(2, 8), torch.tensor([1, 999]), return_statistics=True)
        >>> accuracy = statistics.correct.float().mean()
    """

    log_odds: Tensor | None
    target_logit: Tensor
    hardest_logit: Tensor
    correct: Tensor

    @classmethod
    def of(cls, statistics: Tensor, family: str) -> "RowStatistics":
        """statistics: those of class-index targets, (rows, 3) or, with smoothing, (rows, 4); or of one row."""
        m, l_or_neg, z_y = statistics[..., 0], statistics[..., 1], statistics[..., -1]
        d = None
        m = m.detach()
        if family == "softmax":
            d = log_odds(statistics)
            m = m.masked_fill(l_or_neg == -INF, -INF)
        return cls(d, z_y, m, z_y > m)


# --- one row, or many at once -----------------------------------------------------------------------------------------


def finish_rows(statistics: Tensor, target: Tensor, weight: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Values (rows,) and coefficients (rows, 2 | 2 + P), before weights and reduction."""
    if spec.margin:
        first = first_label(spec)
        psi, slope, _ = MarginTerms(*spec.margin).psi(statistics[:, first:])
        statistics = torch.cat((statistics[:, :first], psi), dim=1)
        values, coefficients = finish_rows(statistics, target, weight, spec._replace(margin=()))
        of_labels = coefficients.shape[1] - psi.shape[1]
        return values, torch.cat((coefficients[:, :of_labels], coefficients[:, of_labels:] * slope), dim=1)
    if spec.labels:
        return finish_labels(statistics, target, weight, spec)
    if spec.family == "softmax":
        value, to_negatives, to_target = _softmax(statistics, spec)
    else:
        value, to_negatives, to_target = (_multi_hot if target.dim() == 2 else _logistic)(statistics, spec)
    return value, torch.stack((to_negatives, to_target), dim=1)


def log_odds(statistics: Tensor) -> Tensor:
    """d (rows,) of the target among the target and S. Never via m + l, which loses digits at large offsets."""
    m, l, z_y = statistics[..., 0], statistics[..., 1], statistics[..., -1]
    return (z_y - m) - l


def _softmax(statistics: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    d = log_odds(statistics)
    value, slope = FORMULAS[spec.loss]
    at_d = slope(d, *spec.params)
    return value(d, *spec.params), -at_d, at_d


def _logistic(statistics: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    _, neg, z_y = statistics.unbind(1)
    of_neg = number(spec.weight_of_negatives, neg)
    poison = neg.isnan() | z_y.isnan()
    return (
        softplus(-z_y) + of_neg * neg,
        of_neg.expand(neg.shape).masked_fill(poison, torch.nan),
        -torch.sigmoid(-z_y).masked_fill(poison, torch.nan),
    )


def _multi_hot(statistics: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the terms of the batch, as the FRLR authors normalise; plain sums without alpha."""
    _, neg, pos, positives = statistics.unbind(1)
    of_pos, of_neg = statistics.new_ones(()), statistics.new_ones(())
    if spec.alpha is not None:
        chosen = chosen_negatives(positives, spec)
        rows = positives.shape[0]
        of_pos = rows / positives.sum().clamp(min=1)
        of_neg = number(spec.alpha, neg) * rows / chosen.sum().clamp(min=1)
    poison = neg.isnan() | pos.isnan()
    return (
        of_pos * pos + of_neg * neg,
        of_neg.expand(neg.shape).masked_fill(poison, torch.nan),
        -of_pos.expand(pos.shape).masked_fill(poison, torch.nan),
    )
