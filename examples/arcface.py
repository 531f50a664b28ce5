"""ArcFace against the hardest identities, the classifier sharded over the ranks; resumed on another number of them.

torchrun --nproc-per-node 2 arcface.py 100      trains 100 steps, serves, saves
torchrun --nproc-per-node 3 arcface.py 200      goes on to step 200 on three ranks

What InsightFace calls Partial FC compares every image with a random share of the identities. Here it is compared with
its 100 hardest, found exactly among all of them, whichever rank has them.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import fused_losses as fl
from photographs import Photographs

IDENTITIES, FEATURES, BATCH, CHECKPOINTS = 1000, 64, 256, Path("checkpoints")


def convolution(channels: int, wider: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]


def main(steps: int) -> None:
    torch.manual_seed(0)  # on every rank: then they draw the rows of one classifier
    network = nn.Sequential(*convolution(3, 16), *convolution(16, 32), *convolution(32, 64), nn.Flatten())
    network.extend([nn.Linear(256, FEATURES, bias=False), nn.BatchNorm1d(FEATURES)])
    network = DistributedDataParallel(network)  # without the head, of which every rank has other rows

    loss = fl.CrossEntropyLoss(k=100, margin=fl.Margin(angle=0.5))
    shard = fl.ClassShard.split(IDENTITIES)
    # gather_input: every rank brings its own images, and the loss is that of them all
    head = fl.LinearLoss(FEATURES, IDENTITIES, loss=loss, normalize=True, scale=32.0, shard=shard, gather_input=True)
    # two groups: PyTorch computes no list in which plain tensors and the head's DTensors are mixed
    optimizer = torch.optim.AdamW([{"params": part.parameters()} for part in (network, head)], lr=0.01)

    model = nn.ModuleDict({"network": network, "head": head})
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    done = max((int(path.name) for path in CHECKPOINTS.glob("*")), default=0)
    if done:
        dcp.load(saved, checkpoint_id=CHECKPOINTS / str(done))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

    photographs, everyone = Photographs(IDENTITIES), torch.arange(IDENTITIES)
    queries = photographs.look(everyone, torch.Generator().manual_seed(0))  # images that nobody trains on

    @torch.no_grad()
    def recognised(among: int) -> float:
        """The share of identities among the nearest: the same on every rank, without a matrix of all logits."""
        network.eval()
        nearest = head.topk(network(queries), among).indices  # (identities, among)
        network.train()
        return (nearest == everyone[:, None]).any(1).float().mean().item()

    before = recognised(1)
    for step in range(done, steps):
        generator = torch.Generator().manual_seed(1 + step)
        identity = torch.randint(IDENTITIES, (BATCH,), generator=generator)
        images = photographs.look(identity, generator)
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        optimizer.zero_grad()
        head(network(images[mine]), identity[mine]).backward()
        optimizer.step()

    after, five = recognised(1), recognised(5)
    assert after > before + 0.1, (before, after)
    if dist.get_rank() == 0:
        print(f"steps {done} to {steps} on {dist.get_world_size()} ranks")
        print(f"recognised: {before:.1%} before, {after:.1%} after, {five:.1%} among the five nearest")

    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=CHECKPOINTS / str(steps))  # a new directory: an interrupted save spoils none


dist.init_process_group("gloo")
main(int(sys.argv[1]))
# Nothing may hold the group any more, modules in reference cycles included: gloo's threads would abort the process.
gc.collect()
dist.destroy_process_group()
