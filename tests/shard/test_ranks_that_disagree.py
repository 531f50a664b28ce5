"""Ranks that give a sharded loss different things: found at the first call, before they exchange a number of a loss."""

import pickle
import time

import pytest
import torch
import torch.distributed as dist

import fused_losses as fl
from fused_losses.shard import ClassShard
from ranks import refusal

ROWS, FEATURES, CLASSES = 6, 4, 20
SEED = torch.Generator().manual_seed(0)
LOGITS = torch.randn(ROWS, CLASSES, generator=SEED)
X, W = torch.randn(ROWS, FEATURES, generator=SEED), torch.randn(CLASSES, FEATURES, generator=SEED)
Y = torch.arange(ROWS)


def from_logits(
    shard, loss=fl.CRLLoss, target=Y, rows=ROWS, dtype=torch.float32, grad=True, mixed_with=None, **options
):
    target = target[:rows] if mixed_with is None else fl.Labels.mixup(target, *mixed_with)
    own = LOGITS[:rows, shard.start : shard.stop].to(dtype).clone().requires_grad_(grad)
    return loss(**{"k": 3} | options, shard=shard)(own, target)


def through_layer(shard, input=X, target=Y, **layer):
    layer = {"loss": fl.CRLLoss(k=3), "normalize": True, "scale": 4.0} | layer
    return fl.linear_loss(input, W[shard.start : shard.stop], target, shard=shard, **layer)


OTHER = Y.flip(0)


def mixed(shard, lam=0.3, other=OTHER):
    return from_logits(shard, target=Y, mixed_with=(other, lam))


# what rank 1 does otherwise, and what the message names
OTHERWISE = [
    (from_logits, {"target": Y + 1}, "target"),
    (from_logits, {"target": Y.flip(0)}, "target"),
    (from_logits, {"alpha": 3.0}, "hyper-parameters"),
    (from_logits, {"reduction": "sum"}, "reduction"),
    (from_logits, {"ignore_index": 0}, "ignore_index"),
    (from_logits, {"loss": fl.NLLRLoss}, "loss"),
    (from_logits, {"loss": fl.HSLRLoss}, "loss"),
    (from_logits, {"k": 4}, "k"),
    (from_logits, {"k": None}, "k"),
    (from_logits, {"rows": 5}, "number of rows"),
    (from_logits, {"dtype": torch.bfloat16}, "dtype of the logits"),
    (from_logits, {"label_smoothing": 0.1}, "label_smoothing"),
    (from_logits, {"margin": fl.Margin(cosine=0.2)}, "margin"),
    (from_logits, {"weight": torch.ones(CLASSES)}, "class weights"),
    (from_logits, {"grad": False}, "gradient wanted"),
    (through_layer, {"scale": 5.0}, "scale"),
    (through_layer, {"normalize": False, "scale": 1.0}, "normalize"),
    (through_layer, {"input": X + 1}, "input"),
    (through_layer, {"input": X[:5], "target": Y[:5]}, "number of rows"),
    (through_layer, {"options": fl.LinearLossOptions(sparse_grad=True)}, "sparse_grad"),
    (through_layer, {"gather_input": True}, "gather_input"),
    (through_layer, {"target": fl.Labels.mixup(Y, Y.flip(0), 0.5)}, "kind of target"),
    (mixed, {"lam": 0.4}, "weights of the labels"),
    (mixed, {"other": Y}, "target"),
]


def disagree(group, case) -> tuple[str, float]:
    call, otherwise, _ = OTHERWISE[case]
    shard = ClassShard.split(CLASSES, group)
    started = time.perf_counter()
    said = refusal(call, shard, **(otherwise if dist.get_rank(group) == 1 else {}))
    return said, time.perf_counter() - started


@pytest.mark.parametrize("case", range(len(OTHERWISE)), ids=lambda case: f"{OTHERWISE[case][2]}-{case}")
def test_what_differs_is_named_on_every_rank(world, case):
    name = OTHERWISE[case][2]
    for said, seconds in world.run(3, disagree, case):
        assert said.startswith(f"ValueError: the ranks that share the classes must agree in {name}, got "), said
        assert "on rank 0" in said and "on rank 1" in said and "on rank 2" in said
        assert seconds < 60


def agree(group) -> list:
    shard = ClassShard.split(CLASSES, group)
    asked = []
    original = dist.all_gather_object

    def counted(*args, **kwargs):
        asked.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", counted)
        values = [from_logits(shard).item() for _ in range(3)]
        silent = ClassShard.split(CLASSES, group, check_ranks=False)
        made = len(asked)
        values.append(from_logits(silent).item())
        return [len(set(values)), made, len(asked)]


def test_ranks_are_compared_once_and_where_that_is_wanted(world):
    for distinct, made, asked in world.run(2, agree):
        assert distinct == 1
        assert asked == made == 2  # the first loss, and the ranges of the second shard


def pickled(group) -> bytes:
    return pickle.dumps(ClassShard.split(CLASSES))


def loaded(group, blobs) -> str:
    return refusal(pickle.loads, blobs[dist.get_rank(group)])


def test_a_pickled_shard_is_of_the_same_number_of_ranks(world):
    """Of the default group, which has four ranks here: the third one's shard is given to the second."""
    blobs = world.run(4, pickled)
    assert world.run(4, loaded, blobs) == ["no error"] * 4
    for said in world.run(4, loaded, [blobs[0], blobs[2], blobs[3], blobs[3]]):
        assert said.startswith("ValueError: the ranks' class shards must tile [0, num_classes)")
