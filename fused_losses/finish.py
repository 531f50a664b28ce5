"""From the statistics of the rows to the loss, and to the coefficients of its gradient: N numbers each, plain PyTorch.

Statistics (rows, columns), what a forward door has seen of a row:

- softmax family: m, l, z_y. m the largest logit of S, l = log sum over S of exp(z_j - m); m is 0 where l is -inf.
- logistic family: m, neg, z_y; for multi-hot targets m, neg, pos, positives. neg = sum over S of phi(z_j), pos = sum
  over the positives of softplus(-z_p), positives how many there are.
- z_y is the target's logit: -inf in a row whose target is a class of another shard. A row with a NaN, or with a target
  that is no class, has a NaN among m, l, z_y, neg, pos; so has one of the softmax family with a +inf.

Coefficients (rows, 2), c and t: the gradient is

    softmax    c exp((z_j - m) - l) at S, t at the target
    logistic   c phi'(z_j) at S, t at the target; for multi-hot targets t sigma(-z_p) at every positive p

A row whose coefficients are NaN has a gradient of NaN. An ignored row has value, statistics and coefficients 0.
"""

import torch
from torch import Tensor

from .formulas import FORMULAS, softplus
from .losses import LossSpec


def finish(statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *spec) -> tuple[Tensor, Tensor]:
    """The loss, and the coefficients for an upstream gradient of 1.

    target: class indices (rows,), or multi-hot (rows, classes), whose entries are not read. weight: (classes of all
    shards,), of the statistics' dtype, with class indices only.
    """
    spec = LossSpec(*spec)
    values, coefficients = finish_rows(statistics, spec, multi_hot=target.dim() == 2)
    ignored = spec.ignored(target)
    share = torch.ones_like(values) if weight is None else weight_of_rows(weight, target)
    if ignored is not None:
        values, share = values.masked_fill(ignored, 0), share.masked_fill(ignored, 0)
    loss = values if weight is None else values * share
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        divisor = share.sum()
        loss, share = loss / divisor, share / divisor
    coefficients = coefficients * share[:, None]
    if ignored is not None:  # also where all are ignored, and share is 0 / 0
        coefficients = coefficients.masked_fill(ignored[:, None], 0)
    return loss, coefficients


def weight_of_rows(weight: Tensor, target: Tensor) -> Tensor:
    """weight[target], (rows,); a target that is no class has a NaN row already, and only never reads outside."""
    return weight[target.clamp(0, weight.shape[0] - 1)]


# --- one row, or many at once -----------------------------------------------------------------------------------------


def finish_rows(statistics: Tensor, spec: LossSpec, multi_hot: bool) -> tuple[Tensor, Tensor]:
    """Values (rows,) and coefficients (rows, 2), before weights and reduction."""
    if spec.family == "softmax":
        value, to_negatives, to_target = _softmax(statistics, spec)
    else:
        value, to_negatives, to_target = (_multi_hot if multi_hot else _logistic)(statistics, spec)
    return value, torch.stack((to_negatives, to_target), dim=1)


def log_odds(statistics: Tensor) -> Tensor:
    """d (rows,) of the target among the target and S. Never via m + l, which loses digits at large offsets."""
    m, l, z_y = statistics.unbind(1)
    return (z_y - m) - l


def _softmax(statistics: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    d = log_odds(statistics)
    _, value, slope = FORMULAS[spec.loss]
    at_d = slope(d, *spec.params)
    return value(d, *spec.params), -at_d, at_d


def _logistic(statistics: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    _, neg, z_y = statistics.unbind(1)
    poison = neg.isnan() | z_y.isnan()
    return (
        softplus(-z_y) + spec.weight_of_negatives * neg,
        torch.full_like(neg, spec.weight_of_negatives).masked_fill(poison, torch.nan),
        -torch.sigmoid(-z_y).masked_fill(poison, torch.nan),
    )


def _multi_hot(statistics: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the terms of the batch, as the FRLR authors normalise; plain sums without alpha."""
    _, neg, pos, positives = statistics.unbind(1)
    of_pos, of_neg = statistics.new_ones(()), statistics.new_ones(())
    if spec.alpha is not None:
        negatives = spec.all_classes - positives
        chosen = negatives.clamp(max=spec.k) if spec.k > 0 else negatives
        rows = positives.shape[0]
        of_pos = rows / positives.sum().clamp(min=1)
        of_neg = spec.alpha * rows / chosen.sum().clamp(min=1)
    poison = neg.isnan() | pos.isnan()
    return (
        of_pos * pos + of_neg * neg,
        of_neg.expand(neg.shape).masked_fill(poison, torch.nan),
        -of_pos.expand(pos.shape).masked_fill(poison, torch.nan),
    )
