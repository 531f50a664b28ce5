"""What a data set is to `bench.evidence.train`. The loaders: `digits.py`, `omniglot.py`, `corel5k.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Split(NamedTuple):
    """Rows of a data set and what they are to be recognised as."""

    inputs: Tensor  # (rows, ...)
    target: Tensor  # (rows,) class indices, or (rows, classes) multi-hot


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
    open_set: bool = False  # the test's classes are none of training's
    settings_of: str | None = None  # another set, on which the hyper-parameters were chosen

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
