"""The classes with the largest logits of each row: the k hardest of rows without a label, in blocks of classes."""

from typing import NamedTuple

import torch
from torch import Tensor

from .linear_autograd import LayerSpec, Picks
from .losses import LossSpec
from .merge import hardest_of_offers, nothing, offered
from .shard import ClassShard, gather


class TopK(NamedTuple):
    """What ``torch.topk`` gives of the logits: (N, k) each, the largest first."""

    values: Tensor
    indices: Tensor  # int64, the classes of all shards


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
        _, index, logit = nothing(input.shape[0], layer[0], unlabelled, mine)
    else:
        _, index, logit = Picks.forward(layer, layer_spec.certified, mine)
    index = torch.where(index < 0, num_classes, index + mine.first_class)
    if shard is None:
        index, logit = index[None], logit[None]
    else:
        index, logit = gather(shard, index, logit)
    index, logit = hardest_of_offers(index, logit, k)
    return TopK(logit, index.long())
