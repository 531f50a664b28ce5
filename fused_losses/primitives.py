"""What the losses are made of, as functions: statistics of the rows, differentiable. N numbers each, for losses of your
own and for training accuracy from the pass that the loss has made anyway.
"""

from torch import Tensor

from .arguments import IGNORE_INDEX, Options, Rows, check_options, margin_from_logits
from .autograd import StatisticsFromLogits, with_margin
from .finish import RowStatistics, ignored_rows
from .finish import log_odds as log_odds_of
from .finish_labels import label_terms, present_labels
from .formulas import softplus
from .functional import rows_from_logits
from .labels import Labels
from .losses import LR, SSLR, LogOdds, Loss
from .margin import Margin
from .shard import ClassShard


def log_odds(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    margin: Margin | None = None,
    check_targets: bool = False,
    shard: ClassShard | None = None,
) -> Tensor:
    """d = z_y - log sum over S of exp(z_j): the log-odds of the target among the target and S, (N,).

    sigmoid(d) is the target's probability. Every loss of the softmax family is a function of d. Float32 (float64 for
    float64 logits), 0 in ignored rows, differentiable by the logits.

    Arguments, defaults and errors as in :func:`fused_losses.cross_entropy`; class indices only.
    """
    options = Options(
        k=k, ratio=ratio, ignore_index=ignore_index, margin=margin, check_targets=check_targets, shard=shard
    )
    statistics, rows = _statistics(LogOdds(), logits, target, options)
    d = log_odds_of(with_margin(statistics, margin_from_logits(margin, logits.dtype), rows.spec))
    ignored = ignored_rows(rows.target, rows.spec) if margin is not None else None
    return _of_rows(d if ignored is None else d.masked_fill(ignored, 0), logits)


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

    Arguments, defaults and errors as in :func:`fused_losses.cross_entropy`; class indices only.
    """
    options = Options(k=k, ratio=ratio, ignore_index=ignore_index, check_targets=check_targets, shard=shard)
    statistics, _ = _statistics(LogOdds(), logits, target, options)
    return RowStatistics.of(_of_rows(statistics, logits), "softmax")


def logistic_sums(
    logits: Tensor,
    target: Tensor | Labels,
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
        target: class indices (N,), multi-hot (N, C), or :class:`fused_losses.Labels`, as in
            :func:`fused_losses.lr_loss`.
        gamma: how sharply easy negatives fade, finite, >= 0. Default: they all count alike.

    Other arguments, defaults and errors as in :func:`fused_losses.cross_entropy`.
    """
    options = Options(k=k, ratio=ratio, ignore_index=ignore_index, check_targets=check_targets, shard=shard)
    loss = LR() if gamma is None else SSLR(gamma=gamma)
    statistics, rows = _statistics(loss, logits, target, options)
    neg = statistics[:, 1]
    if rows.spec.labels:
        pos = label_terms(statistics, *present_labels(statistics, rows.target, rows.label_weight))
    elif rows.spec.multi_hot(rows.target):
        pos = statistics[:, 2]
    else:
        pos = softplus(-statistics[:, 2])
        ignored = ignored_rows(rows.target, rows.spec)
        pos = pos if ignored is None else pos.masked_fill(ignored, 0)
    return _of_rows(pos, logits), _of_rows(neg, logits)


def _statistics(loss: Loss, logits: Tensor, target: Tensor | Labels, options: Options) -> tuple[Tensor, Rows]:
    """(rows, 3 | 4 | 3 + P), and what the doors took besides the logits."""
    if isinstance(target, Labels) and loss.family == "softmax":
        raise ValueError("log-odds and row statistics are those of one target: give class indices, got Labels")
    check_options(loss, options)
    rows, taken = rows_from_logits(loss, logits, target, options)
    return StatisticsFromLogits.apply(rows, taken.target, taken.spec, options.shard), taken


def _of_rows(numbers: Tensor, logits: Tensor) -> Tensor:
    return numbers if logits.dim() == 2 else numbers.squeeze(0)
