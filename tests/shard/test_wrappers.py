"""What would keep a classifier alike on all ranks, or cut it up anew, refuses one that is sharded by classes: on every
rank, and before the classes are mixed."""

import functools

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_losses as fl
from fused_losses.shard import ClassShard
from ranks import refusal

ROWS, FEATURES = 12, 8
SEED = torch.Generator().manual_seed(0)
X, Y = torch.randn(ROWS, FEATURES, generator=SEED), torch.randint(50, (ROWS,), generator=SEED)


class Net(torch.nn.Module):
    """Of 51 classes the first of two ranks has one more; with sparse_grad the parameters are no DTensors."""

    def __init__(self, group, classes=50, sparse_grad=False):
        super().__init__()
        self.body = torch.nn.Linear(FEATURES, FEATURES)
        options = fl.LinearLossOptions(sparse_grad=sparse_grad)
        shard = ClassShard.split(classes, group)
        self.head = fl.LinearLoss(FEATURES, classes, loss=fl.HSLRLoss(k=2), shard=shard, options=options)

    def forward(self, x, target):
        return self.head(self.body(x), target)


class OwnWeight(torch.nn.Module):
    """No LinearLoss: DDP's constructor cannot know."""

    def __init__(self, group):
        super().__init__()
        self.shard = ClassShard.split(50, group)
        self.weight = torch.nn.Parameter(torch.zeros(len(self.shard), FEATURES))

    def forward(self, x, target):
        return fl.linear_cross_entropy(x, self.weight, target, shard=self.shard)


def local(p: torch.nn.Parameter) -> torch.Tensor:
    """What this rank has of it: of a DTensor torch.equal would ask all ranks."""
    return p.to_local().detach() if hasattr(p, "to_local") else p.detach()


def each_kind(group) -> list[Net]:
    return [Net(group, classes, sparse_grad) for classes in (50, 51) for sparse_grad in (False, True)]


def under_ddp(group) -> list:
    """What DDP says of networks and of classifiers; of a weight of one's own; the losses where it is to leave one."""
    wrap = functools.partial(DistributedDataParallel, process_group=group)
    torch.manual_seed(group.rank())
    networks = each_kind(group)
    before = [[local(p).clone() for p in net.parameters()] for net in networks]
    said = [refusal(wrap, module) for net in networks for module in (net, net.head)]
    for net, of_net in zip(networks, before, strict=True):
        assert all(map(torch.equal, map(local, net.parameters()), of_net))
    own = refusal(wrap(OwnWeight(group)), X, Y)
    torch.manual_seed(0)
    network = Net(group, 51)
    plain = network(X, Y).item()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, ["head.weight"])
    return [said, own, plain, wrap(network)(X, Y).item()]


def test_ddp(world):
    for said, own, plain, left_out in world.run(2, under_ddp):
        assert len(said) == 8
        for text in said:
            assert text.startswith(
                "RuntimeError: DistributedDataParallel would mix the ranks' classes: wrap the network"
            )
        assert own.startswith("RuntimeError: DistributedDataParallel holds this sharded classifier, and has copied")
        assert all("gather_input=True" in text for text in (*said, own))
        assert left_out == pytest.approx(plain)


def under_fully_shard(group) -> list:
    """What it says, and the losses where the classifier is left out."""
    mesh = DeviceMesh.from_group(group, "cpu")
    said = [refusal(fully_shard, module, mesh=mesh) for net in each_kind(group) for module in (net, net.head)]
    torch.manual_seed(0)
    network = Net(group, 51)
    plain = network(X, Y).item()
    left_out = fully_shard(network, mesh=mesh, ignored_params=set(network.head.parameters()))
    return [said, plain, left_out(X, Y).item()]


def test_fully_shard(world):
    for said, plain, left_out in world.run(2, under_fully_shard):
        assert len(said) == 8 and "no error" not in said
        for text in said[2:4] + said[6:]:  # of a DTensor torch itself may say that it is one
            assert text.startswith("RuntimeError: this classifier is sharded by classes already: fully_shard would")
        assert left_out == pytest.approx(plain)


def under_flat_parameters(group) -> list:
    """What FSDP's older form says, and the losses where the classifier is left out."""
    flatten = functools.partial(FullyShardedDataParallel, process_group=group, device_id=torch.device("cpu"))
    said = [
        refusal(flatten, module, use_orig_params=original)
        for original in (False, True)
        for net in each_kind(group)
        for module in (net, net.head)
    ]
    torch.manual_seed(0)
    network = Net(group, 51)
    plain = network(X, Y).item()
    return [said, plain, flatten(network, ignored_modules=[network.head])(X, Y).item()]


def test_flat_parameters(world):
    for said, plain, left_out in world.run(2, under_flat_parameters):
        assert len(said) == 16 and "no error" not in said
        for text in (said[i] for first in (2, 6, 10, 14) for i in (first, first + 1)):  # of a DTensor torch may say it
            assert text.startswith("RuntimeError: FullyShardedDataParallel would mix the ranks' classes: wrap the")
        assert left_out == pytest.approx(plain)
