"""The same for rows with several labels, or with one that is smoothed: N x P numbers, plain PyTorch.

Statistics (rows, 3 + P): m, l or neg as without labels; s, where labels are smoothed, the sum over S of z_j - m
(softmax family) or of z_j (logistic); z_p, the labels' logits, -inf in empty places. S has no label in it. w_p are the
labels' weights.

- softmax family: L_p = log(sum over S of e^z + sum over the other labels q of e^z_q), d_p = z_p - L_p, and the row is
  the sum of w_p value(d_p): cross-entropy with soft targets, mixup's rule for every other loss.
- logistic family: pos is the binary cross-entropy of the labels, w_p softplus(-z_p) + (1 - w_p) softplus(z_p).
- smoothing adds eps (sum of w_p z_p - mean over the labels and S of z).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .formulas import FORMULAS, INF, softplus
from .losses import FAMILIES, LossSpec


def finish_labels(
    statistics: Tensor, labels: Tensor, label_weight: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """Values (rows,) and coefficients c, b, t_1 ... t_P (rows, 2 + P), before the reduction.

    labels: (rows, P), -1 in empty places; label_weight: (rows, P), None for 1 everywhere.
    """
    present, w = present_labels(statistics, labels, label_weight)
    if spec.family == "softmax":
        value, c, t = _softmax(statistics, present, w, spec)
    else:
        value, c, t = _logistic(statistics, present, w, spec)
    b = torch.zeros_like(value)
    if spec.label_smoothing:
        n = number_of_terms(present, spec).to(value.dtype)
        value = value + smoothing(statistics, present, w, n, spec)
        eps = spec.label_smoothing
        b = -eps / n
        t = t + (eps * (w - 1 / n[:, None])).masked_fill(~present, 0)
    return value, torch.cat((torch.stack((c, b), dim=1), t), dim=1)


def present_labels(statistics: Tensor, labels: Tensor, label_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which places hold a label, and the labels' weights, 0 in empty places: (rows, P) each."""
    present = labels >= 0
    if label_weight is None:
        return present, present.to(statistics.dtype)
    return present, label_weight.to(statistics.dtype).masked_fill(~present, 0)


def number(x: float, like: Tensor) -> Tensor:
    """x as a scalar of like's dtype, infinite where that does not hold it."""
    return like.new_full((), x, dtype=torch.float64).to(like.dtype)


def chosen_negatives(positives: Tensor, spec: LossSpec) -> Tensor:
    """|S| from the number of positives, of its dtype."""
    negatives = spec.all_classes - positives
    return negatives.clamp(max=spec.k) if spec.k > 0 else negatives


# --- smoothing --------------------------------------------------------------------------------------------------------


def number_of_terms(present: Tensor, spec: LossSpec) -> Tensor:
    """How many logits the mean of smoothing is taken of, (rows,)."""
    positives = present.sum(1)
    return positives + chosen_negatives(positives, spec)


def smoothing(statistics: Tensor, present: Tensor, w: Tensor, n: Tensor, spec: LossSpec) -> Tensor:
    """eps (sum of w_p z_p - mean of z), (rows,); differentiable by all statistics but m.

    Differences from m: of two means beside an offset little would be left. A masked class among the labels and S makes
    it +inf, as torch's.
    """
    m, _, s = statistics[:, :3].unbind(1)
    if FAMILIES[spec.loss] == "logistic":
        m = torch.zeros_like(m)
    m = m.detach()
    above = torch.where(present, statistics[:, 3:] - m[:, None], 0)  # (rows, P)
    of_labels = torch.where(w == 0, 0, w * above).sum(1)
    masked = (above == -INF).any(1)
    smoothed = spec.label_smoothing * (of_labels + (w.sum(1) - 1) * m - (s + above.sum(1)) / n)
    return smoothed.masked_fill(masked, INF)


# --- softmax family ---------------------------------------------------------------------------------------------------


class LabelOdds(NamedTuple):
    """d_p = z_p - L_p, and what its gradient is made of."""

    d: Tensor  # (rows, P); of no meaning in empty places
    to_negatives: Tensor  # (rows, P): the share of S in e^L_p
    to_labels: Tensor  # (rows, P, P): that of label q in e^L_p, 0 for p itself

    def gradient(self, of_d: Tensor) -> tuple[Tensor, Tensor]:
        """c (rows,) and t (rows, P) from the gradient by d."""
        return -(of_d * self.to_negatives).sum(1), of_d - (of_d[:, :, None] * self.to_labels).sum(1)


def label_odds(statistics: Tensor, present: Tensor) -> LabelOdds:
    """Relative to the largest of all logits: no m + l in one number, which would lose digits at large offsets."""
    m, l = statistics[:, 0], statistics[:, 1]
    z = statistics[:, 3:].masked_fill(~present, -INF)
    top = torch.maximum(m.masked_fill(l == -INF, -INF), z.amax(1))
    top = top.masked_fill(top == -INF, 0)
    z = z - top[:, None]
    rest = ((m - top) + l)[:, None]
    total = torch.logaddexp(_log_sum_of_others(z), rest)  # L_p
    to_negatives = torch.where(total == -INF, 1, (rest - total).exp())
    to_labels = (z[:, None, :] - total[:, :, None]).exp()
    apart = ~torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    to_labels = torch.where(apart & (z > -INF)[:, None, :], to_labels, 0)
    return LabelOdds(z - total, to_negatives, to_labels)


def _log_sum_of_others(z: Tensor) -> Tensor:
    """log of the sum over q != p of e^z_q, (rows, P). No difference of sums: p may be all of it."""
    nothing = z.new_full((z.shape[0], 1), -INF)
    if z.shape[1] == 1:
        return nothing
    before = torch.cat((nothing, z[:, :-1].logcumsumexp(1)), dim=1)
    behind = torch.cat((z[:, 1:].flip(1).logcumsumexp(1).flip(1), nothing), dim=1)
    return torch.logaddexp(before, behind)


def _softmax(statistics: Tensor, present: Tensor, w: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    odds = label_odds(statistics, present)
    value, slope = FORMULAS[spec.loss]
    values = weighted(w, value(odds.d, *spec.params), present)
    return values, *odds.gradient((w * slope(odds.d, *spec.params)).masked_fill(~present, 0))


def weighted(w: Tensor, values: Tensor, present: Tensor) -> Tensor:
    """The sum of w_p times what the labels are worth, (rows,). A label of weight 0 counts nothing, not even 0 * inf."""
    nothing = ~present | ((w == 0) & values.isinf())
    return (w * values).masked_fill(nothing, 0).sum(1)


# --- logistic family --------------------------------------------------------------------------------------------------


def label_terms(statistics: Tensor, present: Tensor, w: Tensor) -> Tensor:
    """pos (rows,), differentiable by the statistics."""
    z = statistics[:, 3:].masked_fill(~present, 0)
    return weighted(w, softplus(-z), present) + weighted(1 - w, softplus(z), present)


def _logistic(statistics: Tensor, present: Tensor, w: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the terms of the batch, as the FRLR authors normalise; plain sums without alpha."""
    neg, z = statistics[:, 1], statistics[:, 3:]
    of_pos, of_neg = statistics.new_ones(()), statistics.new_ones(())
    if spec.alpha is not None:
        positives = present.sum(1)
        rows = positives.shape[0]
        of_pos = rows / positives.sum().clamp(min=1).to(neg.dtype)
        of_neg = number(spec.alpha, neg) * rows / chosen_negatives(positives, spec).sum().clamp(min=1)
    pos = label_terms(statistics, present, w)
    # not sigma(z) - w, which loses the digits of a confident label
    t = of_pos * ((1 - w) * torch.sigmoid(z) - w * torch.sigmoid(-z)).masked_fill(~present, 0)
    return of_pos * pos + of_neg * neg, of_neg.expand(neg.shape).masked_fill(neg.isnan(), math.nan), t
