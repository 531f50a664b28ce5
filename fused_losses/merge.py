"""The statistics of whole rows from those of the ranks that share the classes: statistics are merged, not logits.

Every rank of the group sees all rows of the batch and its own range of classes. The forward door runs on that range,
and knows a class of another rank from one that there is not. Then a few numbers per row are exchanged and merged in the
order of the ranks, so that all hold the same bits:

- over all negatives: the statistics of each rank, in one all-gather; m and l by log-sum-exp, sums by addition, the
  logits of target or labels from the ranks that have them;
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

Seen = tuple[Tensor, Tensor, Tensor]  # statistics (rows, 3 | 4 | 3 + P), pick_index and pick_logit (rows, offers)


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
    if spec.k == 0:
        told = (statistics, _negatives_here(shard, target)) if spec.label_smoothing else (statistics,)
        of_ranks, *negatives = gather(shard, *told)
        merged = _merged_over_all(of_ranks, *negatives, multi_hot=spec.multi_hot(target), spec=spec)
        statistics = merged.to(statistics.dtype)
    else:
        count = statistics.shape[0]
        index = torch.where(pick_index < 0, shard.num_classes, pick_index + shard.start)
        of_ranks, indices, logits = exchange(shard, statistics, index, pick_logit)
        indices, logits = hardest_of_offers(indices, logits, spec.k)
        merged = _merged_over_picks(of_ranks, indices < shard.num_classes, logits, spec.multi_hot(target), spec)
        merged = merged.to(statistics.dtype)
        most = rows_of_ranks(shard, count)[0]
        mine = (with_rows(part, most) for part in (merged, indices[:, -1], logits[:, -1]))
        statistics, edge, edge_logit = (part.flatten(0, 1)[:count] for part in gather(shard, *mine))
        edge, edge_logit = edge[:, None], edge_logit[:, None]
        taken = (pick_logit > edge_logit) | ((pick_logit == edge_logit) & (index <= edge))
        pick_index = pick_index.masked_fill(~taken, -1)
        pick_logit = pick_logit.masked_fill(~taken, -torch.inf)
    ignored = ignored_rows(target, spec)
    if ignored is not None:
        statistics = statistics.masked_fill(ignored[:, None], 0)
    return statistics, pick_index, pick_logit


# In float64, so that what the shards rounded is not rounded again.


def _merged_over_all(of_ranks: Tensor, *negatives: Tensor, multi_hot: bool, spec: LossSpec) -> Tensor:
    """Statistics of whole rows from those of the ranks, (ranks, rows, columns); where labels are smoothed also from the
    numbers of their negatives, (ranks, rows, 1)."""
    of_ranks = of_ranks.double()
    m, second = of_ranks[..., 0], of_ranks[..., 1]
    if spec.family == "softmax":
        top, l = _merge_log_sums(m, second)
        s = sum((of_ranks[..., 2] + n.squeeze(2) * (m - top)).sum(0) for n in negatives)
        return _whole_rows(of_ranks, top, l, s, multi_hot, spec)
    return _whole_rows(of_ranks, m.amax(0), second.sum(0), of_ranks[..., 2].sum(0), multi_hot, spec)


def _merged_over_picks(of_ranks: Tensor, taken: Tensor, logits: Tensor, multi_hot: bool, spec: LossSpec) -> Tensor:
    """The same for the share of the rows that this rank merges, from the logits of their k hardest and which of these
    there are, (rows, k) each."""
    of_ranks, logits = of_ranks.double(), logits.double()
    if spec.family == "softmax":
        m, second = _merge_log_sums(logits.t(), logits.new_zeros(()))
    else:
        m, second = logits.amax(1), FORMULAS[spec.loss].value(logits, *spec.params).sum(1)
    s = sum_of_picks(taken, logits, m, spec)
    return _whole_rows(of_ranks, m, second, s, multi_hot, spec)


def sum_of_picks(taken: Tensor, logits: Tensor, m: Tensor, spec: LossSpec) -> Tensor:
    """s of rows from the logits of their picks, (rows, k), and which of these are no empty slots."""
    above = logits - m[:, None] if spec.family == "softmax" else logits
    return torch.where(taken, above, 0).sum(1)


def _whole_rows(of_ranks: Tensor, m: Tensor, second: Tensor, s, multi_hot: bool, spec: LossSpec) -> Tensor:
    """The columns of whole rows: those of the negatives as given, those of the positives from the ranks that have them.
    What is NaN on one rank is NaN for all."""
    second = second.masked_fill(of_ranks.isnan().any(dim=(0, 2)), torch.nan)
    if multi_hot:
        return torch.cat((torch.stack((m, second), dim=1), of_ranks[..., 2:].sum(0)), dim=1)
    columns = [m, second]
    if spec.labels:
        columns.append(s if spec.label_smoothing else torch.zeros_like(m))
    of_labels = of_ranks[..., len(columns) :].amax(0)
    return torch.cat((torch.stack(columns, dim=1), of_labels), dim=1)


def _negatives_here(shard: ClassShard, labels: Tensor) -> Tensor:
    """How many negatives this rank has of each row, (rows, 1)."""
    return len(shard) - ((labels >= shard.start) & (labels < shard.stop)).sum(1, keepdim=True)


def _merge_log_sums(m: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """m and l (rows,) of the union, from those of the parts, (parts, rows); without anything finite, l is -inf."""
    m = m.masked_fill(l == -torch.inf, -torch.inf)
    most = m.amax(0)
    most = most.masked_fill(most == -torch.inf, 0)
    return most, ((m - most) + l).exp().sum(0).log()


def hardest_of_offers(index: Tensor, logit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k hardest of all offers, hardest first, lowest class first among equals: index and logit (rows, k).

    index, logit: (ranks, rows, offers), num_classes and -inf in empty slots.
    """
    index, logit = (part.transpose(0, 1).flatten(1) for part in (index, logit))  # (rows, ranks * offers)
    index, by_class = index.sort(dim=1)
    logit, by_logit = logit.gather(1, by_class).sort(dim=1, descending=True, stable=True)
    return index.gather(1, by_logit[:, :k]), logit[:, :k]


def nothing(rows: int, like: Tensor, target: Tensor, spec: LossSpec) -> Seen:
    """What a forward door would have seen of rows without classes: nothing to add, nothing to pick."""
    statistics = reference.empty_statistics(like, target, spec).zero_()
    if not spec.multi_hot(target):
        statistics[:, 3 if spec.labels else 2 :] = -torch.inf
    if spec.family == "softmax":
        statistics[:, 1] = -torch.inf
    else:
        statistics[:, 0] = -torch.inf
    pick_index, pick_logit = reference.empty_picks(like.new_empty((rows, 0)), spec)
    return statistics, pick_index.fill_(-1), pick_logit.fill_(-torch.inf)
