"""The data sets of `bench.train`: a loader returns tensors, what is measured on them, and the network to train."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Split(NamedTuple):
    inputs: Tensor  # (rows, ...)
    target: Tensor  # (rows,) class indices


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, and everything a training run needs to know about them.

    `network` makes the layers below the classifier; they end in `features` numbers per row. `metrics` takes the whole
    model (network, then a linear classifier) and a split; its first entry decides the tuning; larger is better.
    """

    name: str
    train: Split
    validation: Split  # the only rows that may decide a hyper-parameter
    test: Split  # read once per finished run, never while tuning
    num_classes: int
    network: Callable[[], nn.Module]
    features: int
    metrics: Callable[[nn.Module, Split], dict[str, float]]
    hardest: tuple[int, ...]  # the k worth trying, for losses over the k hardest negatives
    epochs: int
    batch_size: int

    def to(self, device: str) -> "Dataset":
        moved = {name: Split(*(t.to(device) for t in getattr(self, name))) for name in ("train", "validation", "test")}
        return replace(self, **moved)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> dict[str, float]:
    return {"accuracy": (model(split.inputs).argmax(1) == split.target).double().mean().item()}


def digits() -> Dataset:
    """The 1797 handwritten digits (8 x 8 pixels) in scikit-learn: 718 to train, 360 to validate, 719 to test."""
    images, labels = load_digits(return_X_y=True)
    inputs, target = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)  # (1797, 64), (1797,)
    rows, test = train_test_split(torch.arange(len(target)), test_size=719, stratify=target, random_state=0)
    train, validation = train_test_split(rows, test_size=360, stratify=target[rows], random_state=0)
    return Dataset(
        name="digits",
        train=Split(inputs[train], target[train]),
        validation=Split(inputs[validation], target[validation]),
        test=Split(inputs[test], target[test]),
        num_classes=10,
        network=lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        features=128,
        metrics=accuracy,
        hardest=(1, 2, 3, 5),
        epochs=40,
        batch_size=64,
    )
