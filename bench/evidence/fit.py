"""One training: the same network, initial weights, batches, optimiser and schedule for every loss."""

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

import fused_losses as fl
from bench.evidence.contenders import Case
from bench.evidence.data import Dataset
from bench.evidence.mechanisms import Probe

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
FIRST = 50  # steps whose losses are kept: two ways to compute a loss must agree there, before rounding has grown


@dataclass
class Run:
    model: nn.Module
    first_losses: list[float]  # of the first 50 steps
    train_loss: list[float]  # mean over the rows of each epoch
    validation: list[float]  # the first metric after each epoch; empty where there is no such split
    loss_ms: float  # median over the steps: the loss, forward and backward (with linear=True, the classifier too)
    step_ms: float  # median over the steps: network, loss and optimiser
    mechanisms: dict[str, list[float]]  # what the probe saw, before the first epoch and after each


def pace(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up in a straight line for the first twentieth, down along a cosine."""
    return min(20 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2)


def fit(
    data: Dataset,
    case: Case,
    settings: dict,
    seed: int,
    epochs: int,
    progress: tqdm,
    linear: bool = False,
    probe: Probe | None = None,
    shard: fl.ClassShard | None = None,
) -> Run:
    """With `linear`, classifier and loss are one `fl.LinearLoss`, and no logits are made while training.

    With a `shard` too, from `fl.ClassShard.split`: every rank runs the network on all rows, and has its own classes of
    the classifier, which the ranks put together wherever the model is looked at.
    """
    device = data.train.inputs.device
    torch.manual_seed(seed)
    classifier = case.classifier(data.features, data.num_classes, settings)
    model = nn.Sequential(data.network(), classifier).to(device, data.train.inputs.dtype)
    criterion = case.criterion(settings, linear)
    body, head = model, criterion
    if linear:
        # made without memory or random numbers: its parameters are the model's own, which can so be evaluated
        head = fl.LinearLoss(
            data.features, data.num_classes, loss=criterion, bias=case.scale is None, normalize=case.scale is not None,
            scale=settings.get("scale", 1.0), logit_bias=case.scale is not None and case.feels_bias, shard=shard,
            device="meta",
        )  # fmt: skip
        body = model[0]
        for name, whole in classifier.named_parameters():
            setattr(head, name, own_classes(whole, shard))
    parameters = model.parameters()
    if shard is not None:  # DTensors, which are no group with the network's
        parameters = [{"params": part.parameters()} for part in (body, head)]
    optimizer = torch.optim.SGD(parameters, settings["lr"], MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = epochs * math.ceil(len(data.train.target) / data.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))

    def clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def looked_at() -> nn.Module:
        if shard is not None:
            for whole, mine in zip(classifier.parameters(), head.parameters(), strict=True):
                whole.copy_(mine.full_tensor())
        return model.eval()

    first_losses, train_loss, validation, loss_s, step_s = [], [], [], [], []
    seen = [probe(model, criterion)] if probe else []
    for _ in range(epochs):
        total = 0.0
        order = torch.randperm(len(data.train.target)).to(device)  # drawn on the CPU: the same batches on every device
        for rows in order.split(data.batch_size):
            inputs, target = data.train.inputs[rows], data.train.target[rows]
            started = clock()
            output = body(inputs)  # (rows, classes), or with linear (rows, features)
            leaf = output.detach().requires_grad_()  # the graph is cut here so that the loss can be timed alone
            optimizer.zero_grad()
            before_loss = clock()
            loss = head(leaf, target)
            loss.backward()
            after_loss = clock()
            output.backward(leaf.grad)
            optimizer.step()
            schedule.step()
            step_s.append(clock() - started)
            loss_s.append(after_loss - before_loss)
            value = loss.item()
            total += value * len(rows)
            if len(first_losses) < FIRST:
                first_losses.append(value)
        train_loss.append(total / len(order))
        if data.validation is not None:
            validation.append(next(iter(data.metrics(looked_at(), data.validation).values())))
        if probe:
            seen.append(probe(looked_at(), criterion))
        model.train()
        progress.update()
    mechanisms = {name: [moment[name] for moment in seen] for name in seen[0]} if seen else {}
    loss_ms, step_ms = (1e3 * statistics.median(seconds) for seconds in (loss_s, step_s))
    return Run(looked_at(), first_losses, train_loss, validation, loss_ms, step_ms, mechanisms)


def own_classes(whole: nn.Parameter, shard: fl.ClassShard | None) -> nn.Parameter:
    if shard is None:
        return whole
    mine = whole.detach() if whole.dim() == 0 else whole.detach()[shard.start : shard.stop]
    return nn.Parameter(shard.dtensor(mine.clone()))
