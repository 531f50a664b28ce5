"""The handwritten digits of scikit-learn: the data set that needs no files."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from bench.evidence import metrics, networks
from bench.evidence.data import Dataset, Split


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
