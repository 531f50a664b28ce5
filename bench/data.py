"""What a data set is to `bench.train`, and the one that needs no files. The others: `omniglot.py`, `corel5k.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from bench import metrics, networks
from bench.split import Split


@dataclass(frozen=True)
class Dataset:
    """Disjoint splits, and everything a training run needs to know about them.

    `network` makes the layers below the classifier; they end in `features` numbers per row. `metrics` takes the whole
    model (network, then a linear classifier) and a split; its first entry decides the tuning; larger is better.
    """

    name: str
    train: Split
    validation: Split | None  # the only rows that may decide a hyper-parameter; None where they are trained on, at last
    test: Split  # read once per finished run, never while tuning
    num_classes: int
    network: Callable[[], nn.Module]
    features: int
    metrics: Callable[[nn.Module, Split], dict[str, float]]
    hardest: tuple[int, ...]  # the k worth trying, for losses over the k hardest negatives
    epochs: int
    batch_size: int
    seeds: int = 5  # reported runs per loss
    trials: int = 32  # settings tried per loss
    tuning_seeds: int = 5  # runs per setting tried
    learning_rates: tuple[float, float] = (1e-3, 1.0)  # the range that is searched

    @property
    def multi_hot(self) -> bool:
        return self.train.target.dim() == 2

    def to(self, device: str, dtype: torch.dtype) -> "Dataset":
        """dtype is that of the inputs, and of a model that is trained on them."""
        splits = {name: getattr(self, name) for name in ("train", "validation", "test")}
        moved = {
            name: Split(split.inputs.to(device, dtype), split.target.to(device))
            for name, split in splits.items()
            if split is not None
        }
        return replace(self, **moved)


class DataError(Exception):
    """A file of a data set is missing, or does not hold what it should. Says which, what, and where it comes from."""


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
        network=lambda: networks.perceptron(64, 128),
        features=128,
        metrics=metrics.accuracy,
        hardest=(1, 2, 3, 5),
        epochs=40,
        batch_size=64,
    )


def padded(data: Dataset, num_classes: int) -> Dataset:
    """The same work with a classifier of `num_classes`, of which the last are distractors: learned like the others,
    but never a target, so that only the number of negatives differs."""
    if data.multi_hot or num_classes <= data.num_classes:
        raise ValueError(f"{data.name} cannot be padded to {num_classes} classes")
    return replace(
        data,
        name=f"{data.name}-{num_classes}",
        num_classes=num_classes,
        hardest=(1, 3, 10, 30, 100),
        seeds=3,
        trials=16,
        tuning_seeds=1,
        learning_rates=(1e-4, 1.0),
    )
