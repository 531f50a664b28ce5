"""Sharded classifiers under PyTorch's own calls: checkpoints, optimizers, clipping, averages, copies.

Their parameters are DTensors; with sparse gradients, or borders that are no ``ClassShard.split``'s, plain tensors.
"""

import copy
import io
import operator
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import fused_losses as fl
from fused_losses.shard import ClassShard, is_dtensor, local_of
from ranks import refusal

ROWS, FEATURES, CLASSES = 12, 6, 101  # of 4 ranks 26, 26, 26, 23
HEADS = {
    "softmax": {"loss": fl.CrossEntropyLoss(), "bias": True},
    "cosine": {
        "loss": fl.HSLRLoss(k=7, margin=fl.Margin(angle=0.1)),
        "normalize": True,
        "scale": "learned",
        "logit_bias": True,
    },
}
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
}
FULL = StateDictOptions(full_state_dict=True)


class Net(nn.Module):
    """Network and classifier; in one process, or with classes and batch sharded over a group."""

    def __init__(self, group=None, head="cosine", classes=CLASSES, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        how = {} if group is None else {"shard": ClassShard.split(classes, group), "gather_input": True}
        body = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        self.body = body if group is None else DistributedDataParallel(body, process_group=group)
        self.head = fl.LinearLoss(FEATURES, classes, dtype=torch.float64, **HEADS[head], **how)

    def forward(self, x, target):
        return self.head(self.body(x), target)

    def groups(self) -> list[dict]:
        return [{"params": part.parameters()} for part in (self.body, self.head)]


def batch(group, step=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of this rank."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    if group is None:
        return x, target
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return x.tensor_split(size)[rank], target.tensor_split(size)[rank]


def train(group, net, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = net(*batch(group, step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- resumed ----------------------------------------------------------------------------------------------------------


def resume(group, directory, steps: range, action: str) -> dict:
    """The losses of these steps of each run, begun anew or from what directory holds, and saved there."""
    losses = {}
    for head in HEADS:
        for kind, make in OPTIMIZERS.items():
            net = Net(group, head, seed=0 if action == "save" else 1)
            optimizer = make(net.groups())
            path = str(directory / f"{head}-{kind}")
            if action == "load":
                model_state, optimizer_state = get_state_dict(net, optimizer)
                kept = {"model": model_state, "optimizer": optimizer_state}
                dcp.load(kept, checkpoint_id=path, process_group=group)
                set_state_dict(net, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
            losses[head, kind] = train(group, net, optimizer, steps)
            if action == "save":
                model_state, optimizer_state = get_state_dict(net, optimizer)
                dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path, process_group=group)
    return losses


def uninterrupted() -> dict:
    return {
        (head, kind): train(None, net := Net(head=head), make(net.groups()), range(6))
        for head in HEADS
        for kind, make in OPTIMIZERS.items()
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # that is one of the ways to load
def test_a_run_resumes_on_other_numbers_of_ranks(world, tmp_path):
    """Saved on 4 ranks in the middle, loaded on 3, on 1 and in a process that shards nothing."""
    expected = uninterrupted()
    for losses in world.run(4, resume, tmp_path, range(3), "save"):
        for run, before in losses.items():
            assert before == pytest.approx(expected[run][:3], abs=1e-12)
    rest = range(3, 6)
    answers = [answer for ranks in (3, 1) for answer in world.run(ranks, resume, tmp_path, rest, "load")]
    for losses in (*answers, resume(None, tmp_path, rest, "load")):
        for run, after in losses.items():
            assert after == pytest.approx(expected[run][3:], abs=1e-6)
    for head, _ in expected:  # the runs that load begin elsewhere
        assert Net(head=head, seed=1)(*batch(None, 3)).item() != pytest.approx(expected[head, "adamw"][3], abs=1e-2)


def interrupted(group, directory) -> list:
    """A second save of which a rank dies: what the first has kept is loaded after it."""
    net = Net(group)
    optimizer = torch.optim.AdamW(net.groups())
    train(group, net, optimizer, range(2))
    first, second = str(directory / "first"), str(directory / "second")
    dcp.save({"model": get_model_state_dict(net)}, checkpoint_id=first, process_group=group)
    kept = net.head.weight.full_tensor()
    train(group, net, optimizer, range(2))

    class Dies(dcp.FileSystemWriter):
        def write_data(self, *args):
            if dist.get_rank(group) == 1:
                raise OSError("no space left on device")
            return super().write_data(*args)

    writer = Dies(second)
    with pytest.raises(CheckpointException, match="no space left"):
        dcp.save({"model": get_model_state_dict(net)}, storage_writer=writer, process_group=group)
    with pytest.raises(CheckpointException):
        dcp.load({"model": get_model_state_dict(net)}, checkpoint_id=second, process_group=group)
    other = Net(group, seed=1)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=first, process_group=group)
    set_model_state_dict(other, state["model"])
    return [torch.equal(head.weight.full_tensor(), kept) for head in (net.head, other.head)]


def test_interrupted_while_saving_the_older_checkpoint_loads(world, tmp_path):
    assert world.run(2, interrupted, tmp_path) == [[False, True]] * 2


# --- whole, and in parts ----------------------------------------------------------------------------------------------


def edges_of(group, kind, classes) -> ClassShard:
    if kind == "borders":
        edges = (0, 1, 1, *[classes] * (dist.get_world_size(group) - 2))
        rank = dist.get_rank(group)
        return ClassShard(edges[rank], edges[rank + 1], classes, group)
    return ClassShard.split(classes, group)


def whole_and_parts(group, classes) -> dict:
    whole = Net(classes=classes, seed=3)
    full = {name: value + 1 for name, value in whole.state_dict().items()}
    found = {}
    for kind in ("DTensors", "sparse", "borders"):
        net = Net(seed=1)
        options = fl.LinearLossOptions(sparse_grad=kind == "sparse")
        shard = edges_of(group, kind, classes)
        net.head = fl.LinearLoss(
            FEATURES, classes, dtype=torch.float64, options=options, shard=shard, **HEADS["cosine"]
        )

        def has(expected, net=net, shard=shard) -> bool:
            rows = expected["head.weight"][shard.start : shard.stop]
            expected = expected | {"head.weight": rows}
            return all(torch.equal(local_of(shard, p), expected[f"head.{n}"]) for n, p in net.head.named_parameters())

        result = found[kind] = {}
        before = has(full)
        net.load_state_dict(full)
        result["plain one in"] = not before and has(full)
        twice = {name: 2 * value for name, value in full.items()}
        net.load_state_dict(twice, assign=True)
        held = local_of(shard, net.head.weight.detach()).untyped_storage().nbytes()
        result["assigned"] = has(twice) and held == len(shard) * FEATURES * 8
        set_model_state_dict(net, dict(full), options=FULL)
        result["set"] = has(full)
        asked = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        if dist.get_world_size(group) == dist.get_world_size():  # it asks the default group
            set_model_state_dict(net, dict(twice) if dist.get_rank() == 0 else {}, options=asked)
            result["broadcast"] = has(twice)
            net.load_state_dict(full)
        saved = io.BytesIO()
        torch.save(net.state_dict(), saved)
        of_ranks = [b""] * dist.get_world_size(group)
        dist.all_gather_object(of_ranks, saved.getvalue(), group=group)
        of_ranks = [torch.load(io.BytesIO(of_rank)) for of_rank in of_ranks]
        result["names"] = [name for name in net.state_dict() if "weight" in name and "head" in name]
        result["own"] = refusal(net.load_state_dict, of_ranks[dist.get_rank(group)])
        others = [state for rank, state in enumerate(of_ranks) if rank != dist.get_rank(group)]
        result["another's"] = [refusal(net.load_state_dict, state) for state in others]
        result["in one process"] = [refusal(whole.load_state_dict, state) for state in of_ranks]
        rows = {**full, "head.weight": full["head.weight"][shard.start : shard.stop]}
        result["rows without classes"] = refusal(net.load_state_dict, rows)
        result["still"] = has(full)
        if kind == "DTensors":
            out = get_model_state_dict(net, options=FULL)
            result["full out"] = list(out) == list(full) and all(
                type(out[name]) is torch.Tensor and torch.equal(out[name], full[name]) for name in full
            )
            dtensors = net.state_dict()
        else:
            result["get"] = refusal(get_state_dict, net, torch.optim.SGD(net.parameters()))
            nn.init.zeros_(net.head.weight)
            result["from DTensors"] = refusal(net.load_state_dict, dtensors), has(full)
    return found


@pytest.mark.parametrize("ranks, classes", [(3, CLASSES), (4, 6)])  # of 6 on 4 ranks: 2, 2, 2 and none
def test_whole_checkpoints_and_parts_of_them(world, ranks, classes):
    for rank, found in enumerate(world.run(ranks, whole_and_parts, classes)):
        for kind, result in found.items():
            right = ["plain one in", "assigned", "set", "still"] + (["broadcast"] if ranks == 4 else [])
            right += ["full out"] if kind == "DTensors" else []
            assert all(result[name] is True for name in right), (kind, result)
            assert result["own"] == "no error"
            for said in (*result["another's"], *result["in one process"]):
                assert said.startswith("RuntimeError: Error(s) in loading state_dict for"), (kind, rank, said)
            assert f"expected head.weight of all classes, ({classes}, 6), got (" in result["rows without classes"]
            if kind == "sparse":
                assert result["from DTensors"] == ("no error", True)
            if kind == "borders":
                assert "head.weight is a DTensor of other shards" in result["from DTensors"][0]
            if kind == "DTensors":
                assert result["names"] == ["head.weight"]
                assert all("DTensor of other shards, or what torch.save kept" in said for said in result["another's"])
            else:
                (name,) = result["names"]
                assert name.startswith("head.weight [") and name.endswith(f") of {classes}")
                assert f"has no attribute '{name.removeprefix('head.')}'" in result["get"]
                assert all(
                    "of another rank or other shards; this rank has head.weight [" in s for s in result["another's"]
                )


# --- optimizers, clipping, averages, copies ---------------------------------------------------------------------------


def gradients(net) -> list[torch.Tensor]:
    """Of all ranks."""
    of = [p.grad for p in net.parameters()]
    return [g.full_tensor() if is_dtensor(g) else g for g in of]


def standard_calls(group) -> dict:
    net, found = Net(group), {}
    net(*batch(group)).backward()
    found["replicated"] = [p.grad.to_local().item() for p in (net.head.bias, net.head.log_scale)]
    found["norm of the head"] = nn.utils.clip_grad_norm_(net.head.parameters(), 1e9).full_tensor().item()
    of_parts = [nn.utils.get_total_norm([p.grad for p in part.parameters()]) for part in (net.body, net.head)]
    norm = nn.utils.get_total_norm([of_parts[0], of_parts[1].full_tensor()])
    for part in (net.body, net.head):
        nn.utils.clip_grads_with_norm_(part.parameters(), 0.1, norm)
    found["norm"], found["clipped"] = norm.item(), [gradient.clone().numpy() for gradient in gradients(net)]
    found["mixed"] = [
        refusal(nn.utils.clip_grad_norm_, net.parameters(), 1.0),
        refusal(torch.optim.SGD(net.parameters(), foreach=True).step),
    ]
    for foreach in (False, True):  # as on the CPU, as on a GPU
        for make in (torch.optim.AdamW, torch.optim.SGD):
            make(net.groups(), lr=0.01, foreach=foreach).step()

    found["averages"] = []
    for average in ({"avg_fn": get_ema_avg_fn(0.5)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, {}):
        head = copy.deepcopy(net.head)
        mean = AveragedModel(head, **average)
        mean.update_parameters(head)
        nn.init.zeros_(head.weight)
        mean.update_parameters(head)
        found["averages"].append(torch.allclose(2 * mean.module.weight.full_tensor(), net.head.weight.full_tensor()))
        mean(*batch(group)).backward()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    optimizers = [torch.optim.SGD(part["params"], lr=0.1) for part in net.groups()]
    scaler.scale(net(*batch(group))).backward()
    if dist.get_rank(group) == 0:  # of one rank alone: all leave this step out
        net.head.weight.grad.to_local()[0] = torch.inf
    before = net.head.weight.to_local().clone()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    found["left out"] = torch.equal(before, net.head.weight.to_local()), scaler.get_scale()
    return found


def test_optimizers_norms_and_averages_know_all_ranks(world):
    net = Net()
    net(*batch(None)).backward()
    of_head = nn.utils.get_total_norm([p.grad for p in net.head.parameters()]).item()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1).item()
    answers = world.run(3, standard_calls)
    for found in answers:
        assert found["replicated"] == answers[0]["replicated"]  # to the bit
        assert found["norm of the head"] == pytest.approx(of_head, rel=1e-12)
        assert found["norm"] == pytest.approx(norm, rel=1e-12)
        for ours, theirs in zip(found["clipped"], gradients(net), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-9, atol=1e-12)
        assert all("mixed torch.Tensor and DTensor" in said for said in found["mixed"])
        assert found["averages"] == [True] * 3
        assert found["left out"] == (True, 2.0**14)


def copies(group) -> list:
    """Whether copies give the same loss, and are of the same kind; what was moved after backward is trained on."""
    shard = ClassShard.split(CLASSES)  # of the default group: others cannot be pickled
    torch.manual_seed(0)
    head = fl.LinearLoss(FEATURES, CLASSES, shard=shard, dtype=torch.float64, **HEADS["cosine"])
    x, target = batch(None)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    head(x, target).backward()
    head.float().double().to("cpu")
    kept = all(map(operator.is_, optimizer.param_groups[0]["params"], head.parameters()))
    before = head.weight.to_local().clone()
    optimizer.step()
    moved = not torch.equal(before, head.weight.to_local())
    emptied = copy.deepcopy(head).to("meta")
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cuda")  # as if it came from there
    elsewhere = {"device_mesh": mesh, "placements": [Shard(0)], "shape": head.weight.shape, "stride": (FEATURES, 1)}
    emptied.weight = parameter = nn.Parameter(DTensor.from_local(emptied.weight.detach().to_local(), **elsewhere))
    emptied.to_empty(device="cpu")
    assert emptied.weight is parameter and parameter.device_mesh.device_type == "cpu"
    emptied.load_state_dict(head.state_dict())
    made = [pickle.loads(pickle.dumps(head)), copy.deepcopy(head), emptied]
    equal = [torch.equal(other(x, target), head(x, target)) for other in made]
    parameters = [parameter for other in made for parameter in other.parameters()]
    kinds = [is_dtensor(p) and isinstance(p, nn.Parameter) and p.requires_grad for p in parameters]
    return [kept, moved, *equal, len(kinds) == 9 and all(kinds)]


def test_copies(world):
    assert world.run(4, copies) == [[True] * 6] * 4


def in_a_mesh(group) -> list:
    """2 x 2 ranks: a network under DDP over all of them, a classifier sharded over two, and its gradients averaged over
    the other axis; and the classifier under DDP."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    data, classes = mesh["data"].get_group(), mesh["classes"].get_group()
    net = Net(classes)
    net.body = DistributedDataParallel(net.body.module)
    optimizer = torch.optim.SGD(net.groups(), lr=0.5)
    x, target = (part.tensor_split(4)[dist.get_rank()] for part in batch(None))
    for _ in range(5):
        optimizer.zero_grad()
        net(x, target).backward()
        for parameter in net.head.parameters():
            dist.all_reduce(parameter.grad.to_local().div_(2), group=data)
        optimizer.step()
    plain = Net(classes)
    plain.body = plain.body.module
    wrapped = DistributedDataParallel(plain, device_mesh=mesh["data"])
    return [
        net.body.module.weight.detach().numpy(),
        net.head.weight.full_tensor().detach().numpy(),
        refusal(wrapped, x, target),
    ]


def test_two_kinds_of_parallelism(world):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        net(*batch(None)).backward()
        optimizer.step()
    for body, head, said in world.run(4, in_a_mesh):
        torch.testing.assert_close(torch.from_numpy(body), net.body.weight.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.from_numpy(head), net.head.weight.detach(), rtol=1e-9, atol=1e-12)
        assert said.startswith("RuntimeError: this classifier is sharded by classes already")
