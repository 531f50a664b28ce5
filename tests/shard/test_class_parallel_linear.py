"""Linear losses whose classes, and batch, are sharded over ranks: the loss, the gradients and the training of one
process."""

import copy
import datetime
import itertools
import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

import fused_losses as fl
from cases import LOGISTIC, LOSSES, LR, make_index, make_logits, make_target
from fused_losses.shard import ClassShard, local_of
from ranks import refusal

ROWS, FEATURES = 12, 8
NAMES = ("loss", "input", "weight", "bias")


def make_layer(classes, dtype=torch.float32) -> list:
    """input, weight, bias."""
    generator = torch.Generator().manual_seed(classes)
    shapes = (ROWS, FEATURES), (classes, FEATURES), (classes,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def loss_and_gradients(loss, layer, target, options) -> list:
    """The loss and the gradients by input, weight and, if there is one, bias, dense."""
    layer = [tensor.detach().clone().requires_grad_() for tensor in layer]
    value = loss.linear(*layer[:2], target, linear_bias=layer[2] if len(layer) > 2 else None, **options)
    value.backward(torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape))
    return [value.detach(), *(t.grad.to_dense() if t.grad.is_sparse else t.grad for t in layer)]


def truth(loss, layer, target, options) -> list:
    """The same in float64, from the whole logits."""
    layer = [tensor.detach().double().requires_grad_() for tensor in layer]
    options = {name: value for name, value in options.items() if name not in ("options", "normalize", "scale")}
    value = loss(F.linear(*layer), target, **options)
    value.backward(torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape))
    return [value.detach(), *(tensor.grad for tensor in layer)]


def sendable(tensor):
    """As an array, which knows no bfloat16: tensors would travel as files."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def many_of_shard(group, edges, cases) -> list:
    results = []
    for loss, layer, target, options in cases:
        classes, rank = layer[1].shape[0], dist.get_rank(group)
        if edges is None:
            shard = ClassShard.split(classes, group)
        else:
            shard = ClassShard(edges[rank], edges[rank + 1], classes, group)
        own = slice(shard.start, shard.stop)
        if isinstance(target, torch.Tensor):
            target = target if target.dim() == 1 else target[:, own]
        mine = [layer[0], *(tensor[own] for tensor in layer[1:])]
        results.append(list(map(sendable, loss_and_gradients(loss, mine, target, options | {"shard": shard}))))
    return results


def whole(answers: list) -> list:
    """Loss and gradients of every case; loss and the gradient by input have the same bits on every rank."""
    merged = []
    for of_ranks in zip(*answers, strict=True):
        value, dinput, *others = zip(*of_ranks, strict=True)
        assert len({part.tobytes() for part in value}) == len({part.tobytes() for part in dinput}) == 1
        parts = [torch.from_numpy(value[0]), torch.from_numpy(dinput[0])]
        merged.append(parts + [torch.cat([torch.from_numpy(part) for part in other]) for other in others])
    return merged


@pytest.mark.parametrize("ranks, classes", [(1, 751), (2, 751), (3, 1000), (4, 5)])
def test_as_exact_as_one_process(world, ranks, classes):
    """The error against float64 is at most twice that of one process, plus 1e-7 of the largest entry."""
    layer, cases = make_layer(classes), []
    for loss, form in itertools.product(LOSSES, ("index", "multihot")):
        if form == "index" or loss in LOGISTIC:
            for k in loss.ks(None, 2, 100):
                target = make_target(form, ROWS, classes)
                small = fl.LinearLossOptions(chunk_bytes=4 * 300 * 5)
                cases.append((loss, layer, target, {"k": k, "reduction": "none", "options": small}))
    for case, ours in zip(cases, whole(world.run(ranks, many_of_shard, None, cases)), strict=True):
        for name, mine, of_one, true in zip(NAMES, ours, loss_and_gradients(*case), truth(*case), strict=True):
            error, allowed = (mine.double() - true).abs().max(), (of_one.double() - true).abs().max()
            bound = 2 * allowed + 1e-7 * max(1, true.abs().max())
            assert error <= bound, f"{case[0]} {case[3]} {name}: {error:.2e}, one process {allowed:.2e}"


def compare(world, ranks, cases, edges=None) -> None:
    for case, ours in zip(cases, whole(world.run(ranks, many_of_shard, edges, cases)), strict=True):
        expected = loss_and_gradients(*case)
        for name, mine, theirs in zip(NAMES[: len(ours)], ours, expected, strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m: f"{case[0]} {case[3]} {name}: {m}"
            )


@pytest.mark.parametrize("edges", [(0, 1, 1, 40), (0, 0, 40, 40), (0, 0, 0, 40)], ids=str)
def test_uneven_and_empty_shards(world, edges):
    cases = [
        (loss, make_layer(40), make_target(form, ROWS, 40), {"k": k})
        for loss, form in itertools.product(LOSSES, ("index", "multihot"))
        for k in loss.ks(None, 1, 20)
        if form == "index" or loss in LOGISTIC
    ]
    compare(world, 3, cases, edges)


def test_options(world):
    classes = 300
    layer, target = make_layer(classes), make_index(ROWS, classes)
    target[::3] = 5
    sparse = fl.LinearLossOptions(sparse_grad=True)
    everything = (
        {}, {"ignore_index": 5}, {"weight": torch.linspace(0, 1, classes)}, {"k": 7, "options": sparse},
        {"ratio": 0.02, "reduction": "sum"}, {"k": 7, "ignore_index": 5, "options": sparse},
    )  # fmt: skip
    cases = [
        (loss, layer, target, {"k": 4} | options if loss.needs_k and "ratio" not in options else options)
        for loss, options in itertools.product(LOSSES, everything)
    ]
    for label, loss in itertools.product((-(2**63), 2**63 - 1, 150), LOSSES):
        ignoring = {"ignore_index": label, "reduction": "none"}
        cases += [(loss, layer, target.where(target != 5, label), ignoring | {"k": k}) for k in loss.ks(None, 4, 100)]
    cosine = {"normalize": True, "scale": 16.0}
    cases += [(loss, layer[:2], target, cosine | {"k": k}) for loss in LOSSES for k in loss.ks(None, 3)]
    cases += [(loss, layer[:2], target, cosine | {"k": 3, "options": sparse}) for loss in LOSSES]
    compare(world, 3, cases)


@pytest.mark.parametrize("edges", [None, (0, 1, 1, 700)], ids=str)
def test_every_rank_certifies_its_own_offers(world, edges):
    """Ties among whole numbers; a cosine layer, several labels, an empty shard; the layer of one process is plain."""
    generator = torch.Generator().manual_seed(0)
    layer = [torch.randint(-2, 3, shape, generator=generator).float() for shape in ((ROWS, 8), (700, 8), (700,))]
    target = make_index(ROWS, 700)
    target[::5] = -100
    labels = fl.Labels(torch.stack((target.clamp(min=-1), target.clamp(min=0) // 2), 1).sort(1, descending=True).values)
    cases = [
        (loss, layer, target, {"k": k, "options": fl.LinearLossOptions(sparse_grad=sparse, certified=True)})
        for loss, k, sparse in itertools.product(LOSSES, (1, 25), (False, True))
    ]
    certified = fl.LinearLossOptions(certified=True)
    cases += [(loss, layer, labels, {"k": 9, "options": certified}) for loss in LOGISTIC]
    cosine = {"normalize": True, "scale": 16.0, "k": 9, "options": certified}
    cases += [(loss, make_layer(700)[:2], target, cosine) for loss in LOSSES]
    plain = fl.LinearLossOptions(certified=False)
    answers = whole(world.run(3, many_of_shard, edges, cases))
    for (loss, tensors, judged, options), ours in zip(cases, answers, strict=True):
        expected = loss_and_gradients(loss, tensors, judged, options | {"options": plain})
        for name, mine, theirs in zip(NAMES[: len(ours)], ours, expected, strict=True):
            message = lambda m: f"{loss} {options} {name}: {m}"  # noqa: E731
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=message)


def sparse_step(group) -> list:
    shard = ClassShard.split(5, group)
    options = fl.LinearLossOptions(sparse_grad=True)
    head = fl.LinearLoss(FEATURES, 5, loss=fl.HSLRLoss(k=2), bias=True, shard=shard, options=options)
    before = [p.detach().clone() for p in head.parameters()]
    head(make_layer(5)[0], make_index(ROWS, 5)).backward()
    assert all(p.grad.layout == torch.sparse_coo for p in head.parameters())
    torch.optim.SparseAdam(list(head.parameters())).step()
    return [not torch.equal(p, old) for p, old in zip(head.parameters(), before, strict=True)]


def test_sparse_gradients_on_a_rank_without_classes_too(world):
    assert world.run(4, sparse_step) == [[True, True]] * 3 + [[False, False]]


def gathered_by_who_needs_it(group, needed_by) -> list | None:
    """The gradient by its own rows on each rank that asks for one; the last rank has no rows."""
    rank = dist.get_rank(group)
    shard = ClassShard.split(20, group)
    x, weight, _ = make_layer(20)
    x, target = (part.tensor_split((5, ROWS))[rank] for part in (x, make_index(ROWS, 20)))
    x = x.clone().requires_grad_(rank in needed_by)
    weight = weight[shard.start : shard.stop].clone().requires_grad_()
    fl.linear_cross_entropy(x, weight, target, shard=shard, gather_input=True).backward()
    return x.grad.div(3).tolist() if rank in needed_by else x.grad


@pytest.mark.parametrize("needed_by", [(0, 1), (1,), ()], ids=str)
def test_ranks_may_gather_rows_that_require_no_gradient(world, needed_by):
    """A placeholder of a rank without rows does not: still all ranks meet in backward's all-reduce."""
    x, weight, _ = make_layer(20)
    fl.linear_cross_entropy(x.requires_grad_(), weight, make_index(ROWS, 20)).backward()
    for rank, grad in enumerate(world.run(3, gathered_by_who_needs_it, needed_by)):
        if rank in needed_by:
            torch.testing.assert_close(torch.tensor(grad), x.grad.tensor_split((5, ROWS))[rank])
        else:
            assert grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(world, dtype):
    """A 16-bit gradient by input is rounded by each rank and by the sum; everything else as in one process."""
    layer, target = make_layer(300, dtype), make_index(ROWS, 300)
    cases = [
        (loss, layer, target, {"k": k, "options": fl.LinearLossOptions(chunk_bytes=4000)})
        for loss in LOSSES
        for k in loss.ks(None, 3)
    ]
    units = 8 * torch.finfo(dtype).eps
    for case, (value, dinput, *others) in zip(cases, whole(world.run(3, many_of_shard, None, cases)), strict=True):
        expected = loss_and_gradients(*case)
        torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=0)
        for ours, theirs in zip((dinput, *others), expected[1:], strict=True):
            torch.testing.assert_close(ours.to(dtype), theirs, rtol=units, atol=units * theirs.abs().max().item())


def test_rows_that_are_nan_or_ignored(world):
    layer, target = make_layer(40), make_index(ROWS, 40)
    layer[0][1, 0] = torch.nan
    target[2], layer[0][2] = -100, torch.nan
    answers = whole(world.run(3, many_of_shard, None, [
        (loss, layer, target, {"k": k, "reduction": "none"}) for loss in LOSSES for k in loss.ks(None, 3)
    ]))  # fmt: skip
    for value, dinput, *_ in answers:
        assert value[1].isnan() and dinput[1].isnan().all()
        assert value[2] == 0 and (dinput[2] == 0).all()
        others = torch.arange(ROWS) > 2
        assert value[others].isfinite().all() and dinput[others].isfinite().all()


# --- the batch sharded too --------------------------------------------------------------------------------------------


def train(group, batches, heads, steps=4) -> list:
    """Losses, and network and classifier, after some steps of a network under DDP and a classifier in shards; group
    None: of one process with all rows."""
    torch.manual_seed(0)
    network = torch.nn.Linear(6, FEATURES)
    head_of = {
        "ce": lambda **k: fl.LinearLoss(FEATURES, 50, bias=True, **k),
        "hs_lr": lambda **k: fl.LinearLoss(FEATURES, 50, loss=fl.HSLRLoss(k=5), normalize=True, scale=8.0, **k),
    }[heads]
    if group is None:
        head, ddp, rows = head_of(), network, slice(None)
    else:
        shard, rank = ClassShard.split(50, group), dist.get_rank(group)
        head = head_of(shard=shard, gather_input=True)
        ddp = torch.nn.parallel.DistributedDataParallel(network, process_group=group)
        rows = slice(*batches[rank])
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
    inputs = make_logits(20, 6, torch.float32)
    target = make_index(20, 50)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = head(ddp(inputs[rows]), target[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [losses, *(local_of(head.shard, p.detach()).numpy() for p in (*network.parameters(), *head.parameters()))]


@pytest.mark.parametrize("heads", ["ce", "hs_lr"])
@pytest.mark.parametrize("batches", [((0, 10), (10, 20)), ((0, 3), (3, 20)), ((0, 0), (0, 13), (13, 20))], ids=str)
def test_trains_as_one_process_does(world, batches, heads):
    """Under DDP, with batches of any size, an empty one included: same losses, same network, same classifier."""
    losses, *expected = train(None, None, heads)
    answers = world.run(len(batches), train, batches, heads)
    assert losses[-1] < 0.9 * losses[0]
    for of_rank, *network in ([a[0], *a[1:3]] for a in answers):
        torch.testing.assert_close(of_rank, losses, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(network, expected[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for parts, theirs in zip(zip(*(a[3:] for a in answers), strict=True), expected[2:], strict=True):
        ours = torch.cat([torch.from_numpy(part) for part in parts])
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-5)


# --- LinearLoss -------------------------------------------------------------------------------------------------------


def initial(group, classes) -> list:
    torch.manual_seed(5)
    head = fl.LinearLoss(4, classes, bias=True, shard=ClassShard.split(classes, group))
    return [*(p.detach().to_local().numpy() for p in head.parameters()), repr(head)]


@pytest.mark.parametrize("classes", [5, 9000])
def test_starts_as_one_process_does(world, classes):
    torch.manual_seed(5)
    expected = torch.nn.Linear(4, classes)
    weights, biases, texts = zip(*world.run(3, initial, classes), strict=True)
    assert torch.equal(torch.cat([torch.from_numpy(w) for w in weights]), expected.weight)
    assert torch.equal(torch.cat([torch.from_numpy(b) for b in biases]), expected.bias)
    assert all("gather_input=False" in text for text in texts)


def errors(group) -> list[str]:
    shard = ClassShard.split(10, group)
    x, weight, target = torch.zeros(3, 4), torch.zeros(len(shard), 4), torch.tensor([0, 9, 10])
    return [
        refusal(fl.linear_cross_entropy, x, torch.zeros(9, 4), target, shard=shard),
        refusal(fl.linear_cross_entropy, x, weight, target, shard=shard),
        refusal(LR.linear, x, weight, torch.zeros(3, len(shard)), shard=shard, gather_input=True),
        refusal(LR.linear, x, torch.zeros(10, 4), target, gather_input=True),
        refusal(fl.LinearLoss, 4, 10, loss=fl.LRLoss(shard=shard)),
        refusal(fl.LinearLoss, 4, 11, shard=shard),
    ]


def test_errors(world):
    for width, target, multi_hot, alone, of_loss, classes in world.run(2, errors):
        assert width.startswith("ValueError: expected linear_weight of this rank's 5 classes")
        assert target.startswith("IndexError: Target 10 is out of bounds. (row 2, 10 classes)")
        assert multi_hot.startswith("ValueError: gather_input needs shard=") and alone == multi_hot
        assert of_loss == "ValueError: give the shard to the linear layer, not to its loss"
        assert classes == "ValueError: the shard is one of 10 classes, expected 11"


def resume(group, steps: range, loaded: str | None, saved: str | None) -> list:
    """Some steps of a training with sparse gradients, from a checkpoint and to one: the classifier's parameters and
    what Adam knows of them."""
    shard = ClassShard.split(10, group)
    options = fl.LinearLossOptions(sparse_grad=True)
    head = fl.LinearLoss(4, 10, loss=fl.HSLRLoss(k=3), bias=True, shard=shard, options=options)
    optimizer = torch.optim.SparseAdam(list(head.parameters()), lr=0.5)
    names = "exp_avg", "exp_avg_sq"
    for p in head.parameters():
        optimizer.state[p] = {"step": steps.start, **{name: torch.zeros_like(p) for name in names}}
    kept = {name: shard.dtensor(p) for name, p in head.named_parameters()}
    for name in names:
        kept |= {f"{name} of {of}": shard.dtensor(optimizer.state[p][name]) for of, p in head.named_parameters()}
    if loaded:
        dcp.load(kept, checkpoint_id=loaded, process_group=group)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randn(ROWS, 4, generator=generator), torch.randint(10, (ROWS,), generator=generator)
        optimizer.zero_grad()
        head(*rows).backward()
        optimizer.step()
    if saved:
        dcp.save(kept, checkpoint_id=saved, process_group=group)
    return [tensor.to_local().numpy() for tensor in kept.values()]


def joined(answers: list) -> list:
    return [torch.cat([torch.from_numpy(part) for part in parts]) for parts in zip(*answers, strict=True)]


@pytest.mark.parametrize("saved_on, loaded_on", [(2, 3), (3, 4), (4, 1)])
def test_a_run_resumes_on_another_number_of_ranks(world, tmp_path, saved_on, loaded_on):
    start, middle = str(tmp_path / "start"), str(tmp_path / "middle")
    world.run(1, resume, range(0), None, start)
    through = joined(world.run(1, resume, range(8), start, None))
    halfway = joined(world.run(saved_on, resume, range(4), start, middle))
    loaded = joined(world.run(loaded_on, resume, range(0), middle, None))
    resumed = joined(world.run(loaded_on, resume, range(4, 8), middle, None))
    assert [tensor.shape for tensor in loaded] == [(10, 4), (10,)] * 3
    assert all(map(torch.equal, loaded, halfway))
    torch.testing.assert_close(resumed, through)
    assert not torch.allclose(halfway[0], through[0], atol=0.1)


def grow(group) -> list[list]:
    rank = dist.get_rank(group)
    edges = (0, 1, 1, 10)
    torch.manual_seed(rank)
    head = fl.LinearLoss(4, 10, bias=True, shard=ClassShard(edges[rank], edges[rank + 1], 10, group))
    torch.manual_seed(0)
    grown = head.grown(17)
    return [[local_of(h.shard, p.detach()).numpy() for p in h.parameters()] for h in (head, grown)]


def test_growing_keeps_the_old_classes(world):
    old, new = (joined(answers) for answers in zip(*world.run(3, grow), strict=True))
    head = fl.LinearLoss(4, 10, bias=True)
    alone = head.grown(17)
    old_alone, new_alone = list(head.parameters()), list(alone.parameters())
    for before, after in ((old, new), (old_alone, new_alone)):
        assert [tensor.shape for tensor in after] == [(17, 4), (17,)]
        assert all(
            torch.equal(b, a[:10]) and a[10:].count_nonzero() == a[10:].numel()
            for b, a in zip(before, after, strict=True)
        )
    with pytest.raises(ValueError, match="cannot grow from 10 to 9"):
        head.grown(9)


def dtensors(group) -> list:
    shard = ClassShard.split(10, group)
    rank = dist.get_rank(group)
    uneven = ClassShard(3 * rank, 3 + 7 * rank, 10, group)
    logits, x, target = shard.dtensor(torch.zeros(len(shard), 10)), make_layer(10)[0], make_index(ROWS, 10)
    whole = make_layer(10)[1]
    mine = whole[shard.start : shard.stop].clone()
    plain, weight = mine.clone().requires_grad_(), shard.dtensor(mine).requires_grad_()
    given = [fl.linear_cross_entropy(x, w, target, shard=shard) for w in (plain, weight)]
    for loss in given:
        loss.backward()
    mesh = DeviceMesh.from_group(group, "cpu")
    others = DTensor.from_local(whole, mesh, [Replicate()]), DTensor.from_local(torch.zeros(20, 2), mesh, [Shard(1)])
    scale, sparse = shard.dtensor(torch.tensor(2.0)), fl.LinearLossOptions(sparse_grad=True)
    return [
        refusal(uneven.dtensor, torch.zeros(len(uneven))),
        refusal(fl.cross_entropy, logits, torch.zeros(10, dtype=torch.long)),
        refusal(fl.linear_cross_entropy, x, weight, target),
        *(refusal(fl.linear_cross_entropy, x, other, target, shard=shard) for other in others),
        refusal(fl.linear_cross_entropy, x, mine, target, normalize=True, scale=scale, shard=shard),
        refusal(fl.linear_cross_entropy, x, weight, target, k=2, shard=shard, options=sparse),
        given[0].item() == given[1].item() and torch.equal(plain.grad, weight.grad.to_local()),
    ]


def test_dtensors_of_the_shard_are_taken_others_refused_with_a_way_out(world):
    for uneven, logits, *weights, scale, sparse, same in world.run(2, dtensors):
        assert uneven == "ValueError: DTensor knows the shards of ClassShard.split only, got borders (0, 3, 10)"
        assert logits.startswith("TypeError: logits must be a plain Tensor, got a DTensor") and "to_local()" in logits
        assert len(weights) == 3
        for weight in weights:
            assert weight.startswith("TypeError: linear_weight must be a plain Tensor") and "ClassShard.split" in weight
        assert scale.startswith("TypeError: scale must be a plain Tensor, got a DTensor")
        assert sparse.startswith("ValueError: sparse_grad=True: a DTensor has no sparse gradients; make the LinearLoss")
        assert same


class Net(torch.nn.Module):
    def __init__(self, sparse_grad=False):
        super().__init__()
        self.body = torch.nn.Linear(FEATURES, FEATURES)
        options = fl.LinearLossOptions(sparse_grad=sparse_grad)
        self.head = fl.LinearLoss(FEATURES, 50, loss=fl.HSLRLoss(k=2), options=options)

    def forward(self, x, target):
        return self.head(self.body(x), target)


def wrapped_with_sparse_gradients(group) -> list:
    x, target = make_layer(50)[0], make_index(ROWS, 50)
    wrap = torch.nn.parallel.DistributedDataParallel
    said = [refusal(wrap(Net(True), process_group=group), x, target)]
    waiting = wrap(Net(True), process_group=group)
    with waiting.no_sync():  # nothing is reduced
        waiting(x, target).backward()
    ignoring = Net(True)
    wrap._set_params_and_buffers_to_ignore_for_model(ignoring, ["head.weight"])
    wrap(ignoring, process_group=group)(x, target).backward()
    layouts = [net.head.weight.grad.layout == torch.sparse_coo for net in (waiting.module, ignoring)]
    dense = wrap(Net(), process_group=group)
    dense(x, target).backward()
    mesh = DeviceMesh.from_group(group, "cpu")
    return [*said, refusal(fully_shard(Net(True).head, mesh=mesh), x, target), *layouts, dense.module.head.weight.shape]


def test_sparse_gradients_under_wrappers_that_take_none(world):
    for ddp, fsdp, *others in world.run(2, wrapped_with_sparse_gradients):
        assert ddp.startswith("RuntimeError: sparse_grad=True: DistributedDataParallel takes sparse gradients of nn")
        assert fsdp.startswith("RuntimeError: sparse_grad=True: fully_shard takes no sparse gradients")
        assert all("ClassShard.split" in said and "give up sparse_grad" in said for said in (ddp, fsdp))
        assert others == [True, True, (50, FEATURES)]


def fully_sharded(group, normalize) -> list:
    torch.manual_seed(0)
    plain = fl.LinearLoss(FEATURES, 50, normalize=normalize)
    head = copy.deepcopy(plain)
    fully_shard(head, mesh=DeviceMesh.from_group(group, "cpu"))
    x, target = make_layer(50)[0], make_index(ROWS, 50)
    plain(x, target).backward()
    head(x, target).backward()
    grad = head.weight.grad.full_tensor()
    said, grown = refusal(head.logits, x), head.grown(55)
    kept = torch.equal(grown.weight[:50], plain.weight) and type(grown.weight) is torch.nn.Parameter
    register_fsdp_forward_method(head, "logits")
    return [
        said, torch.allclose(grad, plain.weight.grad, atol=1e-6), kept, grown.weight.shape,
        torch.equal(head.logits(x), plain.logits(x)),
    ]  # fmt: skip


@pytest.mark.parametrize("normalize", [False, True])
def test_logits_and_growing_after_fully_shard(world, normalize):
    for said, *others in world.run(2, fully_sharded, normalize):
        assert said.startswith(
            "TypeError: logits() after fully_shard: call torch.distributed.fsdp.register_fsdp_forward_method("
        )
        assert others == [True, True, (55, FEATURES), True]


def short_and_long_classes(group) -> list:
    x, w, _ = (tensor.half() for tensor in make_layer(40))
    w[::2] *= 1000
    w[1::2] *= 1e-3
    shard = ClassShard.split(40, group)
    mine = w[shard.start : shard.stop]
    return [
        fl.linear_cross_entropy(
            x, mine, make_index(ROWS, 40), k=k, normalize=True, scale=64.0, shard=shard
        ).item() for k in (None, 1, 10)
    ]  # fmt: skip


def test_cosines_of_short_and_long_classes_in_float16(world):
    x, w, _ = make_layer(40, torch.float64)
    logits = 64 * F.normalize(x) @ F.normalize(w).t()
    true = torch.tensor([fl.cross_entropy(logits, make_index(ROWS, 40), k=k) for k in (None, 1, 10)])
    for answer in world.run(2, short_and_long_classes):
        torch.testing.assert_close(torch.tensor(answer), true, rtol=5e-3, atol=0, check_dtype=False)


def ignored(group) -> list:
    shard, results = ClassShard.split(40, group), []
    for k in (None, 1, 20):
        for upstream in (1.0, torch.inf, torch.nan):
            x, w, _ = make_layer(40)
            target = make_index(ROWS, 40)
            x[3], target[3] = torch.nan, -100
            leaves = x.requires_grad_(), w[shard.start : shard.stop].clone().requires_grad_()
            value = fl.linear_cross_entropy(*leaves, target, k=k, shard=shard)
            dx, dw = torch.autograd.grad(upstream * value, leaves)
            results.append(bool((dx[3] == 0).all()) and (upstream != 1 or bool(dw.isfinite().all())))
    return results


def test_ignored_rows_are_literal_zeros(world):
    assert all(map(all, world.run(2, ignored)))


def lost(rank: int, store: str, how: str, answer) -> None:
    patient, timeout = datetime.timedelta(minutes=2), datetime.timedelta(seconds=5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patient)
    ClassShard.split(10)  # the ranks have met: from here on they may be impatient
    shard = ClassShard.split(10, dist.new_group(timeout=timeout))
    if rank == 0:
        answer.send(refusal(whole_step, shard))
    elif how == "hangs":
        time.sleep(240)
    elif how == "is killed in the middle of a step":
        whole_step(shard, lambda: os._exit(1))


def whole_step(shard, before_backward=lambda: None) -> None:
    x, weight, _ = make_layer(10)
    mine = weight[shard.start : shard.stop].requires_grad_()
    loss = fl.linear_cross_entropy(x.requires_grad_(), mine, make_index(ROWS, 10), shard=shard)
    before_backward()
    loss.backward()


@pytest.mark.parametrize("how", ["dies", "hangs", "is killed in the middle of a step"])
def test_a_rank_that_is_lost_makes_the_others_fail(tmp_path, how):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    ranks = [context.Process(target=lost, args=(rank, str(tmp_path / "store"), how, theirs)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        assert ours.poll(240), "the other rank hangs"
        assert ours.recv().startswith(("RuntimeError", "DistBackendError", "DistNetworkError"))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
