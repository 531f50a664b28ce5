"""The layers below the classifier: one small network per kind of work, the same for every loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perceptron(inputs: int, hidden: int) -> nn.Sequential:
    """(rows, inputs) -> (rows, hidden), two layers."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())


def regularised_perceptron(inputs: int, hidden: int, dropout: float = 0.5) -> nn.Sequential:
    """The same for few rows and sparse inputs: with batch normalisation and dropout."""
    layers: list[nn.Module] = []
    for width in (inputs, hidden):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class ChannelsLast(nn.Module):
    """Convolutions on the CPU take a quarter less time when the channels of a pixel lie side by side."""

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def embedding(features: int) -> nn.Sequential:
    """(rows, 1, 28, 28) -> (rows, features): three strided convolutions, one linear layer, and what re-identification
    calls a neck: embeddings that are centred, so that rows do not all push the same classes at first."""
    layers: list[nn.Module] = [ChannelsLast()]
    for channels, wider in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(128 * 4 * 4, features, bias=False), nn.BatchNorm1d(features)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class CosineClassifier(nn.Linear):
    """(rows, features) -> (rows, classes): scale times the cosine of the angle between a row and a class's vector, and
    one bias for all classes, which starts at `bias`, or none."""

    def __init__(self, features: int, num_classes: int, scale: float, bias: float | None):
        super().__init__(features, num_classes)  # a bias is drawn: the network behind starts as beside every classifier
        self.scale = scale
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, input: Tensor) -> Tensor:
        logits = self.scale * F.linear(F.normalize(input, dim=1), F.normalize(self.weight, dim=1))
        return logits if self.bias is None else logits + self.bias
