"""The classes with the largest logits of each row: the k hardest of rows without a label, in blocks of classes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .linear_autograd import LayerSpec, Picks
from .losses import LossSpec
from .merge import hardest_of_offers, nothing, offered
from .shard import ClassShard, gather


class TopK(NamedTuple):
    """What :meth:`fused_losses.LinearLoss.topk` gives, as ``torch.topk`` does: the largest logits and their classes.

    Args:
        values: the logits, (N, k), the largest first, of the dtype in which the layer computes.
        indices: int64 (N, k), the classes, counted over all shards; the lowest first among equals. A class of logit
            -inf is not found: where fewer than k others are left, the last values are -inf and their indices C, which
            is no class. In a row with a logit of NaN or +inf nothing is the largest: NaN, and C.

    Example:
        >>> head = fl.LinearLoss(8, 1000)
        >>> found = head.topk(torch.randn(2, 8), 5)
        >>> found.indices.dtype, found.values.shape
        (torch.int64, torch.Size([2, 5]))
    """

    values: Tensor
    indices: Tensor


@torch.no_grad()
def topk_of_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, k: int, layer_spec: LayerSpec, shard: ClassShard | None,
    num_classes: int,
) -> TopK:  # fmt: skip
    """input: (N, D), scaled, the same on every rank. Exact, and the lowest class first among equals."""
    unlabelled = torch.full((input.shape[0], 1), -1, dtype=torch.int64, device=input.device)
    layer = layer_spec.layer(input, weight, bias, unlabelled)
    spec = LossSpec("log_odds", [], None, k, None, 0, num_classes, True, True, 0.0, ())
    mine = spec if shard is None else offered(shard, spec)
    if weight.shape[0] == 0:
        seen, index, logit = nothing(input.shape[0], layer[0], unlabelled, mine)
    else:
        seen, index, logit = Picks.forward(layer, layer_spec.certified, mine)
    logit = logit.masked_fill(seen.isnan().any(1, keepdim=True), math.nan)
    index = torch.where(index < 0, num_classes, index + mine.first_class)
    if shard is None:
        index, logit = index[None], logit[None]
    else:
        index, logit = gather(shard, index, logit)
    index, logit = hardest_of_offers(index, logit, k)
    unknown = logit.isnan().any(1, keepdim=True)
    nowhere = unknown | (logit == -math.inf)
    return TopK(logit.masked_fill(unknown, math.nan), index.long().masked_fill(nowhere, num_classes))
