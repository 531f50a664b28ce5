"""What the losses are made of, as functions: statistics of the rows, differentiable. N numbers each, for losses of your
own and for training accuracy from the pass that the loss has made anyway.
"""

from torch import Tensor

from .arguments import IGNORE_INDEX, Options, check_options
from .autograd import StatisticsFromLogits
from .finish import RowStatistics
from .finish import log_odds as log_odds_of
from .formulas import softplus
from .functional import rows_from_logits
from .losses import LR, SSLR, LogOdds, Loss
from .shard import ClassShard


def log_odds(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """d = z_y - log sum over S of exp(z_j): the log-odds of the target among the target and S, (N,).

    sigmoid(d) is the target's probability. Every loss of the softmax family is a function of d. Float32 (float64 for
    float64 logits), 0 in ignored rows, differentiable by the logits.

    Arguments, defaults and errors as in :func:`fused_losses.cross_entropy`.
    """
    options = Options(k=k, ratio=ratio, ignore_index=ignore_index, check_targets=check_targets, shard=shard)
    return log_odds_of(_statistics(LogOdds(), logits, target, options))


def row_statistics(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> RowStatistics:
    """What the softmax losses know of each row, from one pass over the logits.

    Returns:
        RowStatistics: ``log_odds`` as :func:`log_odds`; ``target_logit``; ``hardest_logit``, the largest among the
        negatives; ``correct``, whether the first exceeds the second. (N,) each; the first two differentiable by the
        logits.

    Arguments, defaults and errors as in :func:`fused_losses.cross_entropy`.
    """
    options = Options(k=k, ratio=ratio, ignore_index=ignore_index, check_targets=check_targets, shard=shard)
    return RowStatistics.of(_statistics(LogOdds(), logits, target, options), "softmax")


def logistic_sums(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float | None = None,
    k: int | None = None,
    ratio: float | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> tuple[Tensor, Tensor]:
    """What the losses of the logistic family know of each row: pos and neg, (N,) each.

    pos = sum over the positives of softplus(-z_p); neg = sum over S of softplus(z_j), with ``gamma`` of
    sigma(z_j)^gamma softplus(z_j). Float32 (float64 for float64 logits), 0 in ignored rows, differentiable by the
    logits.

    Args:
        target: class indices (N,), or multi-hot (N, C), as in :func:`fused_losses.lr_loss`.
        gamma: how sharply easy negatives fade, finite, >= 0. Default: they all count alike.

    Other arguments, defaults and errors as in :func:`fused_losses.cross_entropy`.
    """
    options = Options(k=k, ratio=ratio, ignore_index=ignore_index, check_targets=check_targets, shard=shard)
    loss = LR() if gamma is None else SSLR(gamma=gamma)
    statistics = _statistics(loss, logits, target, options)
    pos, neg = statistics[..., 2], statistics[..., 1]
    if target.dim() != logits.dim():
        pos = softplus(-pos)
        if ignore_index is not None:
            pos = pos.masked_fill(target == ignore_index, 0)
    return pos, neg


def _statistics(loss: Loss, logits: Tensor, target: Tensor, options: Options) -> Tensor:
    """(rows, 3 | 4); of one row alone, (3 | 4,)."""
    check_options(loss, options)
    rows, taken = rows_from_logits(loss, logits, target, options)
    statistics = StatisticsFromLogits.apply(rows, taken.target, taken.spec, options.shard)
    return statistics if logits.dim() == 2 else statistics.squeeze(0)
