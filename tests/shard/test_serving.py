"""Serving from sharded heads, at size."""

import pytest
import torch

import fused_losses as fl
from fused_losses.shard import ClassShard

ROWS, FEATURES, CLASSES, K = 32, 64, 1_000_003, 100


def whole_numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and weight whose logits float32 holds exactly, many of them equal."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(-8, 9, (n, FEATURES), generator=generator, dtype=torch.int8) for n in (ROWS, CLASSES)]
    return drawn[0].float(), drawn[1].float()


def nearest_of_a_million(group, certified) -> list:
    shard = ClassShard.split(CLASSES, group)
    x, weight = whole_numbers()
    head = fl.LinearLoss(FEATURES, CLASSES, shard=shard, options=fl.LinearLossOptions(certified=certified))
    for p in head.parameters():
        mine = p.detach()
        mine = mine.to_local() if hasattr(mine, "to_local") else mine
        mine.copy_(weight[shard.start : shard.stop])
    return [part.numpy() for part in head.topk(x, K)]


@pytest.mark.slow
@pytest.mark.parametrize("certified", [True, False])
def test_the_nearest_of_a_million_on_three_ranks(world, certified):
    x, weight = whole_numbers()
    logits = (x @ weight.t()).long()
    assert logits.abs().max() < 2**24
    # the larger logit first, the lower class among equals: both in one number
    found = (logits * CLASSES + torch.arange(CLASSES - 1, -1, -1)).topk(K).values
    indices, values = CLASSES - 1 - found % CLASSES, found.div(CLASSES, rounding_mode="floor")
    assert (values.diff() == 0).any()
    for of_rank in world.run(3, nearest_of_a_million, certified):
        assert torch.equal(torch.from_numpy(of_rank[1]), indices)
        assert torch.equal(torch.from_numpy(of_rank[0]).long(), values)
