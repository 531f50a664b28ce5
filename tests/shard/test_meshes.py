"""Sharded heads beside each other, in sub-groups, in a mesh of data x classes, behind networks under DDP and
fully_shard: after five steps the losses and parameters of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_losses as fl
from fused_losses.shard import ClassShard

ROWS, FEATURES, STEPS = 20, 8, 5
CLASSES = {"cosine": 23, "ce": 5}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def make_network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, FEATURES), torch.nn.Tanh(), torch.nn.Linear(FEATURES, FEATURES)
    return torch.nn.Sequential(*layers).double()


def make_head(name: str, shard: ClassShard | None = None, gathered: bool = True) -> fl.LinearLoss:
    options = {
        "cosine": {"loss": fl.HSLRLoss(k=5), "normalize": True, "scale": "learned", "logit_bias": True},
        "ce": {"bias": True},
    }[name]
    torch.manual_seed(len(name))
    layer = {"shard": shard, "gather_input": gathered and shard is not None, "dtype": torch.float64}
    return fl.LinearLoss(FEATURES, CLASSES[name], **layer, **options)


def shard_of(name: str, group, edges: tuple[int, ...] | None = None) -> ClassShard:
    """edges: None for those of ClassShard.split."""
    if edges is None:
        return ClassShard.split(CLASSES[name], group)
    rank = dist.get_rank(group)
    return ClassShard(edges[rank], edges[rank + 1], CLASSES[name], group)


def make_rows() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return inputs, {name: torch.randint(classes, (ROWS,), generator=generator) for name, classes in CLASSES.items()}


def wrapped(network, how: str, group, mesh=None):
    if how == "ddp":
        return DistributedDataParallel(network, process_group=group)
    return fully_shard(network, mesh=DeviceMesh.from_group(group, "cpu") if mesh is None else mesh)


def train(network, heads, loss_of, kind: str, after_backward=lambda: None) -> dict:
    """What five steps leave: the losses, the network's parameters as a whole, and what this rank holds of the heads."""
    optimizer = OPTIMIZERS[kind]([*network.parameters(), *(p for head in heads.values() for p in head.parameters())])
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(network, heads)
        loss.backward()
        after_backward()
        optimizer.step()
        losses.append(loss.item())
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in network.parameters()]
    return {
        "losses": losses,
        "network": [p.detach().numpy() for p in whole],
        "heads": {
            name: {of: local(p.detach()).numpy() for of, p in head.named_parameters()} for name, head in heads.items()
        },
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def close(found, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-9, atol=1e-11)


def compare(answers: list[dict], expected: dict, heads=tuple(CLASSES)) -> None:
    """The ranks of one group against one process; numbers that all classes have are the same on every rank."""
    for answer in answers:
        for found, one in zip(answer["network"], expected["network"], strict=True):
            close(found, one)
        close(answer["losses"], expected["losses"])
    for name in heads:
        for of, one in expected["heads"][name].items():
            parts = [torch.from_numpy(answer["heads"][name][of]) for answer in answers]
            if one.ndim == 0:
                for part in parts:
                    close(part, one)
            else:
                close(torch.cat(parts), one)


# --- two heads in one model -------------------------------------------------------------------------------------------


class TwoHeads(torch.nn.Module):
    def __init__(self, shards):
        super().__init__()
        self.network = make_network()
        self.heads = torch.nn.ModuleDict({name: make_head(name, shards.get(name)) for name in CLASSES})

    def forward(self, images, target):
        embeddings = self.network(images)
        return self.heads["cosine"](embeddings, target["cosine"]) + 0.5 * self.heads["ce"](embeddings, target["ce"])


def two_heads(group, how, kind, edges, batches) -> dict:
    """group None: one process with all rows."""
    inputs, target = make_rows()
    shards, rows = {}, slice(None)
    if group is not None:
        shards = {name: shard_of(name, group, edges.get(name)) for name in CLASSES}
        rows = slice(*batches[dist.get_rank(group)])
    model = TwoHeads(shards)
    if group is not None:
        model.network = wrapped(model.network, how, group)
    mine = inputs[rows], {name: labels[rows] for name, labels in target.items()}
    return train(model.network, model.heads, lambda *_: model(*mine), kind)


LAYOUTS = {
    "4 ranks, one without classes": ({}, ((0, 5), (5, 5), (5, 17), (17, 20))),
    "3 ranks, any borders": ({"cosine": (0, 0, 20, 23), "ce": (0, 2, 2, 5)}, ((0, 13), (13, 20), (20, 20))),
    "2 ranks": ({}, ((0, 10), (10, 20))),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_heads_behind_one_network(world, layout, how, kind):
    edges, batches = LAYOUTS[layout]
    answers = world.run(len(batches), two_heads, how, kind, edges, batches)
    compare(answers, two_heads(None, how, kind, edges, batches))


# --- groups of some ranks ---------------------------------------------------------------------------------------------

BATCHES_OF_GROUPS = ((0, 3), (3, 10), (10, 20), (20, 20))
HEAD_OF_GROUP = ("cosine", "ce")


def head_of_each_half(group, how, kind) -> dict:
    """Ranks 0 and 1 share the classes of one head, ranks 2 and 3 those of another; all have the network."""
    inputs, target = make_rows()
    rank = dist.get_rank(group)
    halves = [dist.new_group(ranks) for ranks in ((0, 1), (2, 3))]
    name = HEAD_OF_GROUP[rank // 2]
    head = make_head(name, shard_of(name, halves[rank // 2], {"ce": (0, 0, 5)}.get(name)))
    rows = slice(*BATCHES_OF_GROUPS[rank])
    network = wrapped(make_network(), how, group)
    return train(network, {name: head}, lambda network, _: head(network(inputs[rows]), target[name][rows]), kind)


def head_of_each_half_alone(kind) -> dict:
    """Each head learns by the loss of its half, the network, whose gradient is averaged over all ranks, by the mean of
    the two."""
    inputs, target = make_rows()
    heads, of_halves = {name: make_head(name) for name in CLASSES}, []

    def loss_of(network, heads):
        losses = [
            heads[name](network(inputs[rows]), target[name][rows])
            for name, rows in zip(HEAD_OF_GROUP, (slice(0, 10), slice(10, 20)), strict=True)
        ]
        of_halves.append([loss.item() for loss in losses])
        return (losses[0] + losses[1]) / 2

    def twice():
        for head in heads.values():
            for p in head.parameters():
                p.grad *= 2

    found = train(make_network(), heads, loss_of, kind, twice)
    return found | {"of halves": list(zip(*of_halves, strict=True))}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_halves_of_the_ranks_share_a_head_each(world, how, kind):
    answers = world.run(4, head_of_each_half, how, kind)
    expected = head_of_each_half_alone(kind)
    for half, name in enumerate(HEAD_OF_GROUP):
        compare(answers[2 * half : 2 * half + 2], expected | {"losses": expected["of halves"][half]}, (name,))


# --- data x classes ---------------------------------------------------------------------------------------------------

BATCHES_OF_MESH = {  # as many rows on both lines of the mesh, on any of their ranks
    "gathered": ((0, 3), (3, 10), (10, 20), (20, 20)),
    "the same": ((0, 10), (0, 10), (10, 20), (10, 20)),
}


def average(head, group) -> None:
    """What the README writes of a mesh."""
    for p in head.parameters():
        dist.all_reduce(local(p.grad), group=group)
        p.grad /= dist.get_world_size(group)


def in_a_mesh(group, name, how, edges, batch, kind) -> dict:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    inputs, target = make_rows()
    rank = dist.get_rank(group)
    rows = slice(*BATCHES_OF_MESH[batch][rank])
    head = make_head(name, shard_of(name, mesh["classes"].get_group(), edges), batch == "gathered")
    of_data = mesh["data"].get_group()
    network = wrapped(make_network(), "ddp" if how == "ddp of both" else how, group, mesh)
    called = DistributedDataParallel(head, process_group=of_data) if how == "ddp of both" else head
    averaged = (lambda: None) if how == "ddp of both" else lambda: average(head, of_data)
    found = train(
        network, {name: head}, lambda network, _: called(network(inputs[rows]), target[name][rows]), kind, averaged
    )
    losses = torch.tensor(found["losses"], dtype=torch.float64)
    dist.all_reduce(losses, group=of_data)
    return found | {"losses": (losses / 2).tolist()}


def alone(name, kind) -> dict:
    inputs, target = make_rows()
    heads = {name: make_head(name)}
    return train(make_network(), heads, lambda network, heads: heads[name](network(inputs), target[name]), kind)


@pytest.mark.parametrize("name, edges", [("cosine", None), ("cosine", (0, 20, 23)), ("ce", None), ("ce", (0, 0, 5))])
@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
@pytest.mark.parametrize("batch", BATCHES_OF_MESH)
def test_data_times_classes(world, batch, how, name, edges):
    """The network over all ranks, the head over those of a line, its gradient averaged over those of a column."""
    compare_lines(world, name, how, edges, batch)


@pytest.mark.parametrize("name, edges", [("cosine", (0, 20, 23)), ("ce", (0, 0, 5))])
def test_ddp_averages_a_head_over_a_column(world, name, edges):
    compare_lines(world, name, "ddp of both", edges, "gathered")


def compare_lines(world, name, how, edges, batch) -> None:
    for kind in OPTIMIZERS:
        expected = alone(name, kind)
        answers = world.run(4, in_a_mesh, name, how, edges, batch, kind)
        for line in (answers[:2], answers[2:]):
            compare(line, expected, (name,))
