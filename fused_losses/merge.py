"""The statistics of whole rows from those of the ranks that share the classes: statistics are merged, not logits.

Every rank of the group sees all rows of the batch and its own range of classes. The forward door runs on that range,
and knows a class of another rank from one that there is not. Then a few numbers per row are exchanged and merged in the
order of the ranks, so that all hold the same bits:

- over all negatives: the statistics of each rank, in one all-gather; m and l by log-sum-exp, sums by addition, z_y from
  the one rank that has the target;
- k hardest: each rank offers its k best (logit, class). Every rank merges its share of the rows, for which one
  all-to-all brings it all offers: the k best, lowest class first among equals, are the k hardest of all. What it then
  tells the others, in one all-gather, is each row's statistics and edge, the last of its k. Of its offers a rank keeps
  those up to the edge, so every gradient is written by the owner of its class. No rank receives all offers: what a step
  sends does not grow with the number of ranks.

Backward needs no communication: with the merged statistics, ``finish`` gives the coefficients of the row, and the
backward door the shard's columns of the gradient. Every rank has the same loss, and calls backward on it; the gradients
are those of one loss, not of their sum.
"""

import torch
from torch import Tensor

from . import reference
from .finish import ignored_rows
from .formulas import FORMULAS
from .losses import LossSpec
from .shard import ClassShard, exchange, gather, rows_of_ranks, with_rows

Seen = tuple[Tensor, Tensor, Tensor]  # statistics (rows, 3 | 4), pick_index and pick_logit (rows, offers)


def offered(shard: ClassShard, spec: LossSpec) -> LossSpec:
    """What the door of this rank is asked for. Always the compact form: picks can be merged, edges cannot."""
    return spec._replace(
        k=shard.offers(spec.k), first_class=shard.start, all_classes=shard.num_classes, compact=spec.k > 0
    )


def merge(shard: ClassShard, seen: Seen, target: Tensor, spec: LossSpec) -> Seen:
    """What the door would have seen of whole rows, from what it saw of the shard's classes with :func:`offered`.

    spec: that of whole rows. Of the picks the result has those of this rank that are among the k hardest of all, the
    others are empty slots.
    """
    statistics, pick_index, pick_logit = seen
    multi_hot = target.dim() == 2
    if spec.k == 0:
        (of_ranks,) = gather(shard, statistics)
        statistics = _merged(of_ranks, None, spec, multi_hot).to(statistics.dtype)
    else:
        count = statistics.shape[0]
        index = torch.where(pick_index < 0, shard.num_classes, pick_index + shard.start)
        of_ranks, indices, logits = exchange(shard, statistics, index, pick_logit)
        indices, logits = _hardest(indices, logits, spec.k)
        merged = _merged(of_ranks, logits, spec, multi_hot).to(statistics.dtype)
        most = rows_of_ranks(shard, count)[0]
        mine = (with_rows(part, most) for part in (merged, indices[:, -1], logits[:, -1]))
        statistics, edge, edge_logit = (part.flatten(0, 1)[:count] for part in gather(shard, *mine))
        edge, edge_logit = edge[:, None], edge_logit[:, None]
        taken = (pick_logit > edge_logit) | ((pick_logit == edge_logit) & (index <= edge))
        pick_index = pick_index.masked_fill(~taken, -1)
        pick_logit = pick_logit.masked_fill(~taken, -torch.inf)
    ignored = ignored_rows(target, spec.ignore_index)
    if ignored is not None:
        statistics = statistics.masked_fill(ignored[:, None], 0)
    return statistics, pick_index, pick_logit


def _merged(of_ranks: Tensor, hardest: Tensor | None, spec: LossSpec, multi_hot: bool) -> Tensor:
    """Statistics of whole rows from those of the ranks, (ranks, rows, values), and from the logits of the k hardest,
    (rows, k). In float64, so that what the shards rounded is not rounded again."""
    of_ranks = of_ranks.double()
    hardest = None if hardest is None else hardest.double()
    if spec.family == "softmax":
        m, l, z_y = of_ranks.unbind(2)
        m, l = _merge_log_sums(m, l) if hardest is None else _merge_log_sums(hardest.t(), hardest.new_zeros(()))
        z_y = z_y.amax(0).masked_fill(of_ranks.isnan().any(dim=(0, 2)), torch.nan)
        return torch.stack((m, l, z_y), dim=1)
    m, neg, *last = of_ranks.unbind(2)
    m, neg = m.amax(0), neg.sum(0)
    if hardest is not None:
        poison = neg.isnan()
        neg = FORMULAS[spec.loss].value(hardest, *spec.params).sum(1).masked_fill(poison, torch.nan)
        m = hardest.amax(1)
    if multi_hot:
        return torch.stack((m, neg, *(part.sum(0) for part in last)), dim=1)
    return torch.stack((m, neg, last[0].amax(0)), dim=1)  # NaN wins


def _merge_log_sums(m: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """m and l (rows,) of the union, from those of the parts, (parts, rows); without anything finite, l is -inf."""
    m = m.masked_fill(l == -torch.inf, -torch.inf)
    most = m.amax(0)
    most = most.masked_fill(most == -torch.inf, 0)
    return most, ((m - most) + l).exp().sum(0).log()


def _hardest(index: Tensor, logit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k hardest of all offers, hardest first, lowest class first among equals: index and logit (rows, k).

    index, logit: (ranks, rows, offers), num_classes and -inf in empty slots.
    """
    index, logit = (part.transpose(0, 1).flatten(1) for part in (index, logit))  # (rows, ranks * offers)
    index, by_class = index.sort(dim=1)
    logit, by_logit = logit.gather(1, by_class).sort(dim=1, descending=True, stable=True)
    return index.gather(1, by_logit[:, :k]), logit[:, :k]


def nothing(rows: int, like: Tensor, target: Tensor, spec: LossSpec) -> Seen:
    """What a forward door would have seen of rows without classes: nothing to add, nothing to pick."""
    statistics = reference.empty_statistics(like.new_empty((rows, 0)), multi_hot=target.dim() == 2).zero_()
    if target.dim() == 1:
        statistics[:, 1 if spec.family == "softmax" else 2 :] = -torch.inf
    if spec.family == "logistic":
        statistics[:, 0] = -torch.inf
    pick_index, pick_logit = reference.empty_picks(like.new_empty((rows, 0)), spec)
    return statistics, pick_index.fill_(-1), pick_logit.fill_(-torch.inf)
