"""Who takes part, and which hyper-parameters each may choose."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

import fused_losses as fl
from bench.evidence.data import Dataset


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


def shared_space(data: Dataset) -> Space:
    """What every loss may choose.

    The prior bias, -log(C - 1), starts the classifier at probability 1/C for every class. It moves all logits alike, so
    a softmax loss does not feel it; LR is spared unlearning C - 1 negatives per row.
    """
    return {"lr": LogRange(*data.learning_rates), "prior_bias": Choice((False, True))}


def cases(data: Dataset) -> list[Case]:
    """A multi-hot target is for the logistic losses only."""
    k = Choice(data.hardest)
    crl = {"alpha": LogRange(0.3, 10.0), "beta": LogRange(0.1, 3.0)}
    alpha = LogRange(0.3, 30.0)
    ss_lr = {"alpha": alpha, "gamma": LogRange(0.3, 5.0)}
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
    return [
        Case("CE", fl.CrossEntropyLoss),
        Case("NLLR", fl.NLLRLoss),
        Case("CRL", fl.CRLLoss, crl),
        lr,
        hs_lr,
        Case("SS-LR", fl.SSLRLoss, ss_lr),
        Case("CE, k hardest", fl.CrossEntropyLoss, {"k": k}),
        Case("CRL, k hardest", fl.CRLLoss, {**crl, "k": k}),
    ]
