"""What a rank of class_parallel does, in a process of its own, on an emulated device of its own."""

import os

import torch

os.environ.pop("TRITON_INTERPRET", None)

from emulated_wing import Wing
from triton_driver import Emulator

import fused_losses as fl
from fused_losses.class_parallel import ClassShard


def step_of_shard(group, target_device: str, name: str, inputs: list, target: list, selection: dict) -> tuple:
    """The loss, its gradient by this rank's columns of logits or rows of a weight, and how many doors were called."""
    *before, sharded = (torch.tensor(x) for x in inputs)
    shard = ClassShard.split(sharded.shape[0 if before else 1], group)
    own = slice(shard.start, shard.stop)
    leaf = (sharded[own] if before else sharded[:, own]).clone().requires_grad_()
    wing = Wing(Emulator(target_device, seed=1))
    with wing.launched(), wing.serving():
        value = getattr(fl, name)(*before, leaf, torch.tensor(target), shard=shard, **selection)
        value.backward(torch.full_like(value, 0.7))
    return value.item(), leaf.grad.tolist(), sum(wing.calls.values())
