"""Classes that come and go: rows, and what the optimizer knows of them, in one process and on several ranks."""

import pytest
import torch
import torch.distributed as dist

import fused_losses as fl
from fused_losses.shard import ClassShard, local_of

FEATURES, CLASSES = 4, 11
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
CHANGES = {
    "grown": lambda head, optimizer: head.grown(15, optimizer),
    "selected": lambda head, optimizer: head.selected(torch.tensor([9, 0, 3, 4, 10, 2]), optimizer),
}
KEPT = {"grown": list(range(CLASSES)), "selected": [9, 0, 3, 4, 10, 2]}
LAYERS = {"bias": {"bias": True}, "cosine": {"normalize": True, "scale": "learned", "logit_bias": True}}


def train(group, layer, kind, change, edges=None, steps=3) -> dict:
    """Weights and state before and after the change, and the losses of more steps behind it; of this rank's classes.

    edges: the borders of the shards; None: ClassShard.split.
    """
    shard = None
    if group is not None and edges is None:
        shard = ClassShard.split(CLASSES, group)
    elif group is not None:
        rank = dist.get_rank(group)
        shard = ClassShard(edges[rank], edges[rank + 1], CLASSES, group)
    torch.manual_seed(0)
    head = fl.LinearLoss(FEATURES, CLASSES, shard=shard, dtype=torch.float64, **LAYERS[layer])
    optimizer = OPTIMIZERS[kind](list(head.parameters()))
    generator = torch.Generator().manual_seed(1)

    def step(head, most):
        x = torch.randn(8, FEATURES, generator=generator, dtype=torch.float64)
        target = torch.randint(most, (8,), generator=generator)
        optimizer.zero_grad()
        loss = head(x, target)
        loss.backward()
        optimizer.step()
        return loss.item()

    def found(head):
        state = optimizer.state[head.weight]
        rows = {name: value for name, value in state.items() if value.shape == head.weight.shape}
        assert len(rows) == {"adamw": 2, "momentum": 1}[kind]
        assert {type(value) for value in rows.values()} == {type(head.weight.data)}  # DTensors, or none
        parts = {name: local_of(head.shard, value.detach()) for name, value in {"weight": head.weight, **rows}.items()}
        return {name: value.clone().numpy() for name, value in parts.items()}

    losses = [step(head, CLASSES) for _ in range(steps)]
    before = found(head)
    torch.manual_seed(2)
    changed = CHANGES[change](head, optimizer)
    after = found(changed)
    assert {id(p) for p in changed.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not set(optimizer.state) & set(head.parameters())
    assert {type(state.get("step", torch.ones(()))) for state in optimizer.state.values()} == {torch.Tensor}
    losses += [step(changed, 6) for _ in range(steps)]
    return {"before": before, "after": after, "losses": losses}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_and_their_state_are_kept(layer, kind, change):
    found = train(None, layer, kind, change)
    for name, before in found["before"].items():
        after = torch.from_numpy(found["after"][name])
        kept = torch.from_numpy(before)[KEPT[change]]
        assert torch.equal(after[: len(kept)], kept)
        if name != "weight":
            assert (after[len(kept) :] == 0).all() and kept.any()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("edges", [None, (0, 2, 2, CLASSES)], ids=["DTensors", "plain"])
@pytest.mark.parametrize("layer, kind", [("bias", "momentum"), ("cosine", "adamw")])
def test_ranks_change_as_one_process_does(world, layer, kind, change, edges):
    alone = train(None, layer, kind, change)
    answers = world.run(3, train, layer, kind, change, edges)
    for when in ("before", "after"):
        for name, expected in alone[when].items():
            found = torch.cat([torch.from_numpy(answer[when][name]) for answer in answers])
            torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)
    for answer in answers:
        assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-10)


def test_what_cannot_be():
    head = fl.LinearLoss(FEATURES, CLASSES)
    for classes, error, match in (
        (torch.tensor([0, 11]), IndexError, "from 0 to 10"),
        (torch.tensor([-1]), IndexError, "from 0 to 10"),
        (torch.tensor([1, 1]), ValueError, "distinct"),
        (torch.tensor([], dtype=torch.int64), ValueError, "at least one"),
        (torch.tensor([True]), ValueError, "int64"),
    ):
        with pytest.raises(error, match=match):
            head.selected(classes)
    with pytest.raises(ValueError, match="cannot grow from 11 to 10"):
        head.grown(10)
    weighted = fl.LinearLoss(FEATURES, 3, loss=fl.CrossEntropyLoss(weight=torch.ones(3)))
    with pytest.raises(ValueError, match="class weights"):
        weighted.selected(torch.tensor([0]))
