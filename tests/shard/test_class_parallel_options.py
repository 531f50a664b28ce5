"""Margins, label smoothing and several labels over sharded classes: one process's losses and gradients, for each
option, in float64."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_losses as fl
from fused_losses.shard import ClassShard, local_of

ROWS, FEATURES, CLASSES = 9, 5, 53
WORLDS = ((1, None), (2, None), (3, None), (3, (0, 2, 2, 53)))  # the borders of the shards; None: ClassShard.split
each_world = pytest.mark.parametrize("ranks, edges", WORLDS, ids=str)


def tensors():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return 4 * draw(ROWS, CLASSES), draw(ROWS, FEATURES), draw(CLASSES, FEATURES), draw(CLASSES)


INDEX = torch.tensor([0, 1, 52, 30, -100, 2, 17, 1, 40])
OTHER = torch.tensor([5, 1, 0, 31, 8, 51, 2, 33, 40])
PER_ROW = fl.Margin(angle=torch.linspace(-0.4, 0.6, ROWS), cosine=torch.linspace(0, 0.3, ROWS), scale=20.0)
MARGINS = {
    "plain": None,
    "angle": fl.Margin(angle=0.5, scale=20.0),
    "cosine": fl.Margin(cosine=0.35),
    "rows": PER_ROW,
}
TARGETS = {
    "index": INDEX,
    "pair": fl.Labels.mixup(INDEX.clamp(min=0), OTHER, torch.linspace(0, 1, ROWS)),
    "lists": fl.Labels.from_lists([[0, 1], [], [52, 0, 52], [3], [7, 9, 11, 13], [2], [1, 51], [33], []]),
}
TARGETS["weighted"] = fl.Labels(TARGETS["lists"].index, torch.linspace(0.1, 1, ROWS)[:, None].expand(ROWS, 4))


def losses(margin, smoothing, target):
    """name -> module, of the losses that take these."""
    options = {"margin": margin, "reduction": "none"}
    found = {}
    if target != "lists":
        smooth = options | {"label_smoothing": smoothing}
        found = {
            "ce": fl.CrossEntropyLoss(**smooth),
            "crl": fl.CRLLoss(**smooth),
            "nllr k": fl.NLLRLoss(k=7, **smooth),
            "own": fl.SoftmaxLoss(lambda d: -(torch.sigmoid(-d) ** 2) * F.logsigmoid(d), k=60, **smooth),
            "lr": fl.LRLoss(**smooth),
            "lr k": fl.LRLoss(k=3, **smooth),
        }
    if smoothing == 0:
        found |= {"hs_lr": fl.HSLRLoss(k=7, **options), "ss_lr": fl.SSLRLoss(**options)}
    return found


CASES = [
    (target, margin, smoothing, loss)
    for target, margin, smoothing in itertools.product(TARGETS, MARGINS, (0.0, 0.1))
    for loss in losses(MARGINS[margin], smoothing, target)
]


def value_and_gradients(value, leaves) -> list:
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    gradients = torch.autograd.grad(value, leaves, upstream)
    return [value.detach().numpy(), *((g.to_dense() if g.is_sparse else g).numpy() for g in gradients)]


def shard_of(group, edges) -> ClassShard:
    if edges is None:
        return ClassShard.split(CLASSES, group)
    rank = dist.get_rank(group)
    return ClassShard(edges[rank], edges[rank + 1], CLASSES, group)


def from_logits(group, edges) -> list:
    """Value and gradient of every case; by this rank's columns, with a group."""
    shard = None if group is None else shard_of(group, edges)
    own = slice(None) if shard is None else slice(shard.start, shard.stop)
    results = []
    for target, margin, smoothing, name in CASES:
        z = tensors()[0][:, own].clone().requires_grad_()
        loss = losses(MARGINS[margin], smoothing, target)[name]
        loss.shard = shard
        results.append(value_and_gradients(loss(z, TARGETS[target]), [z]))
    return results


def through_layer(group, edges, gathered: bool) -> list:
    """Value and gradients by input, weight, scale and the one bias of every case, through cosine logits."""
    shard = None if group is None else shard_of(group, edges)
    own = slice(None) if shard is None else slice(shard.start, shard.stop)
    rows = slice(None)
    if gathered and group is not None:  # the first ranks have one row more
        rows = torch.arange(ROWS).chunk(dist.get_world_size(group))[dist.get_rank(group)]
    results = []
    for target, margin, smoothing, name in CASES:
        _, x, w, _ = tensors()
        scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
        leaves = [x[rows].clone(), w[own].clone(), scale, bias]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        chosen, of_rows = MARGINS[margin], TARGETS[target]
        if isinstance(of_rows, fl.Labels):
            most = max(1, (of_rows.index[rows] >= 0).sum(1).max())  # ranks have different numbers of labels
            of_rows = fl.Labels(*(None if part is None else part[rows, :most] for part in of_rows))
        else:
            of_rows = of_rows[rows]
        if chosen is not None:
            angle, cosine = (v[rows] if isinstance(v, torch.Tensor) else v for v in (chosen.angle, chosen.cosine))
            chosen = fl.Margin(angle=angle, cosine=cosine)
        loss = losses(chosen, smoothing, target)[name]
        sparse = name in ("nllr k", "hs_lr", "lr k")
        value = fl.linear_loss(
            leaves[0], leaves[1], of_rows, loss=loss, linear_bias=bias, normalize=True, scale=scale, shard=shard,
            gather_input=gathered and shard is not None, options=fl.LinearLossOptions(sparse_grad=sparse),
        )  # fmt: skip
        results.append(value_and_gradients(value, leaves))
    return results


def compare(answers: list, expected: list, along: list) -> None:
    """along: the dimension in which the ranks' parts of value and gradients stand side by side; None: all have it."""
    for case, of_whole, *of_ranks in zip(CASES, expected, *answers, strict=True):
        for true, dim, *parts in zip(of_whole, along, *of_ranks, strict=True):
            found = map(torch.from_numpy, parts)
            found = torch.cat(list(found), dim=dim) if dim is not None else next(found)
            torch.testing.assert_close(
                found, torch.from_numpy(true), rtol=1e-10, atol=1e-11, msg=lambda m: f"{case}: {m}"
            )


@each_world
def test_from_logits(world, ranks, edges):
    compare(world.run(ranks, from_logits, edges), from_logits(None, None), [None, 1])


@each_world
@pytest.mark.parametrize("gathered", [False, True], ids=["same input", "gathered"])
def test_through_a_linear_layer(world, ranks, edges, gathered):
    """The gradient by gathered input is times the number of ranks; scale and bias have one process's on every rank."""
    answers = world.run(ranks, through_layer, edges, gathered)
    if gathered:
        answers = [[[value, x / ranks, *others] for value, x, *others in of_rank] for of_rank in answers]
    along = [None, 0 if gathered else None, 0, None, None]
    compare(answers, through_layer(None, None, gathered), along)


# --- serving ----------------------------------------------------------------------------------------------------------


def nearest(group, edges) -> list:
    """topk of a layer with equal classes, for several k."""
    shard = None if group is None else shard_of(group, edges)
    own = slice(None) if shard is None else slice(shard.start, shard.stop)
    _, x, w, b = tensors()
    x, w = (4 * x).round(), (4 * w).round()  # no sum rounds these: equal classes have equal logits in every shard
    w[20:40] = w[3]
    head = fl.LinearLoss(FEATURES, CLASSES, bias=True, shard=shard, dtype=torch.float64)
    rows = {"weight": w, "bias": b * 0}
    head.load_state_dict(rows)
    assert torch.equal(local_of(shard, head.weight), w[own])
    found = [part.numpy() for k in (1, 5, CLASSES) for part in head.topk(x, k)]
    rows["bias"][25] = torch.nan  # of one rank
    head.load_state_dict(rows)
    unknown = head.topk(x, 5)
    assert unknown.values.isnan().all() and (unknown.indices == CLASSES).all()
    return found


@each_world
def test_every_rank_gets_the_nearest_of_all(world, ranks, edges):
    expected = nearest(None, None)
    for of_rank in world.run(ranks, nearest, edges):
        for found, true in zip(of_rank, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(true), rtol=1e-13, atol=1e-13)
