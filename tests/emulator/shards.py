"""What a rank does whose classes are a shard, in a process of its own, on an emulated device of its own."""

import functools
import os

import torch

os.environ.pop("TRITON_INTERPRET", None)

from emulated_backend import Backend
from triton_driver import Emulator

import fused_losses as fl


def loss_of(name: str, **options):
    """A function of the package, or ``linear_loss`` with one of its modules."""
    if not name.startswith("linear "):
        return functools.partial(getattr(fl, name), **options)
    selection = {key: options.pop(key) for key in ("k", "ratio", "reduction") if key in options}
    return functools.partial(fl.linear_loss, loss=getattr(fl, name.removeprefix("linear "))(**selection), **options)


def step_of_shard(group, target_device: str, name: str, inputs: list, target: list, selection: dict) -> tuple:
    """The loss, its gradient by this rank's columns of logits or rows of a weight, and how many doors were called."""
    *before, sharded = (torch.tensor(x) for x in inputs)
    shard = fl.ClassShard.split(sharded.shape[0 if before else 1], group)
    own = slice(shard.start, shard.stop)
    leaf = (sharded[own] if before else sharded[:, own]).clone().requires_grad_()
    backend = Backend(Emulator(target_device, seed=1))
    with backend.launched(), backend.serving():
        value = loss_of(name, shard=shard, **selection)(*before, leaf, torch.tensor(target))
        value.backward(torch.full_like(value, 0.7))
    return value.item(), leaf.grad.tolist(), sum(backend.calls.values())
