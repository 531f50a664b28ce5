"""Who takes part, and which hyper-parameters each may choose."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_losses as fl
from bench.evidence.data import Dataset
from bench.evidence.networks import CosineClassifier

LOGISTIC = (fl.LRLoss, fl.HSLRLoss, fl.SSLRLoss)


@dataclass(frozen=True)
class LogRange:
    low: float
    high: float

    def at(self, u: float) -> float:
        """The value at u in [0, 1), to two digits: what is recorded is what was run."""
        return float(f"{self.low * (self.high / self.low) ** u:.2g}")


@dataclass(frozen=True)
class Choice:
    options: tuple

    def at(self, u: float):
        return self.options[int(u * len(self.options))]


Space = dict[str, LogRange | Choice]


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable[..., nn.Module]
    space: Space = field(default_factory=dict)  # keyword arguments of the loss
    scale: LogRange | None = None  # of the classifier's cosines; None: a linear layer with a bias
    margin: LogRange | None = None  # on the target's cosine
    angle: LogRange | None = None  # radians, on the target's angle

    def classifier(self, features: int, num_classes: int, settings: dict) -> nn.Module:
        prior = -math.log(num_classes - 1) if settings.get("prior_bias") else 0.0
        if self.scale is not None:
            return CosineClassifier(features, num_classes, settings["scale"], prior if self.feels_bias else None)
        classifier = nn.Linear(features, num_classes)
        nn.init.constant_(classifier.bias, prior)
        return classifier

    def criterion(self, settings: dict, linear: bool = False) -> nn.Module:
        """linear: for an ``fl.LinearLoss``, which knows its scale itself."""
        options = {name: settings[name] for name in self.space}
        if self.margin or self.angle:
            scale = None if linear else settings["scale"]
            options["margin"] = fl.Margin(settings.get("angle", 0.0), settings.get("margin", 0.0), scale)
        return self.loss(**options)

    @property
    def feels_bias(self) -> bool:
        """Cosines have one bias for all classes, which a softmax loss does not feel and then does not get."""
        return self.scale is None or issubclass(self.loss, LOGISTIC)

    def searched(self, data: Dataset) -> Space:
        """What may be chosen.

        The prior bias, -log(C - 1), starts the classifier at probability 1/C for every class. It moves all logits
        alike, so a softmax loss does not feel it; LR is spared unlearning C - 1 negatives per row.
        """
        shared: Space = {"lr": LogRange(*data.learning_rates)}
        if self.feels_bias:
            shared["prior_bias"] = Choice((False, True))
        axes = {"scale": self.scale, "margin": self.margin, "angle": self.angle}
        return shared | self.space | {name: axis for name, axis in axes.items() if axis is not None}


def sampled_classes(num_classes: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of the batch and random others, a tenth of all together; and the place of each among them."""
    order = torch.rand(num_classes).index_fill_(0, target, 2.0)  # those of the batch first
    sampled = order.topk(max(1, num_classes // 10, len(target.unique()))).indices
    return sampled, torch.empty_like(order, dtype=torch.int64).scatter_(0, sampled, torch.arange(len(sampled)))


class SampledCrossEntropy(nn.Module):
    """Cross-entropy over sampled classes: Partial FC's arithmetic (An et al., CVPR 2022, arXiv 2203.15565,
    section 3.3)."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        sampled, place = sampled_classes(logits.shape[1], target)
        return F.cross_entropy(logits[:, sampled], place[target])


def cases(data: Dataset) -> list[Case]:
    """A multi-hot target is for the logistic losses only."""
    k = Choice(data.hardest)
    crl = {"alpha": LogRange(0.3, 10.0), "beta": LogRange(0.1, 3.0)}
    alpha = LogRange(0.3, 30.0)
    # a mean over C - 1 negatives leaves each alpha / (C - 1)
    ss_lr = {"alpha": LogRange(0.3, max(30.0, data.num_classes - 1.0)), "gamma": LogRange(0.3, 5.0)}
    lr = Case("LR", fl.LRLoss)
    hs_lr = Case("HS-LR", fl.HSLRLoss, {"alpha": alpha, "k": k})
    if data.multi_hot:
        return [
            lr,
            hs_lr,
            Case("SS-LR", fl.SSLRLoss, ss_lr),
            Case("LR, k hardest", fl.LRLoss, {"k": k}),
            Case("SS-LR, k hardest", fl.SSLRLoss, {**ss_lr, "k": k}),
        ]
    known = [
        Case("CE", fl.CrossEntropyLoss),
        Case("NLLR", fl.NLLRLoss),
        Case("CRL", fl.CRLLoss, crl),
        lr,
        hs_lr,
        Case("SS-LR", fl.SSLRLoss, ss_lr),
        Case("CE, k hardest", fl.CrossEntropyLoss, {"k": k}),
        Case("CRL, k hardest", fl.CRLLoss, {**crl, "k": k}),
    ]
    if data.num_classes // 10 > data.batch_size:
        known.append(Case("CE, 10 % random", SampledCrossEntropy))
    if not data.open_set:
        return known
    scale, margin, angle = LogRange(4.0, 64.0), LogRange(0.02, 0.5), LogRange(0.02, 0.6)
    return [
        *known,
        Case("CE, smoothing", fl.CrossEntropyLoss, {"label_smoothing": LogRange(0.01, 0.3)}),
        Case("CE, cosines", fl.CrossEntropyLoss, scale=scale),
        Case("CosFace", fl.CrossEntropyLoss, scale=scale, margin=margin),
        Case("ArcFace", fl.CrossEntropyLoss, scale=scale, angle=angle),
        Case("CosFace, k hardest", fl.CrossEntropyLoss, {"k": k}, scale, margin=margin),
        Case("ArcFace, k hardest", fl.CrossEntropyLoss, {"k": k}, scale, angle=angle),
        Case("LR, cosines", fl.LRLoss, scale=scale),
        Case("HS-LR, cosines", fl.HSLRLoss, {"alpha": alpha, "k": k}, scale),
        Case("SS-LR, cosines", fl.SSLRLoss, ss_lr, scale),
    ]
