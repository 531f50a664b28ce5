"""Calls to the doors of a backend: one forward, one backward, and what the paper says that they should give."""

from typing import NamedTuple

import torch
from torch import Tensor

import paper
from fused_losses.losses import FAMILIES, LossSpec


class Formula(NamedTuple):
    """A loss as the doors know it: name, parameters, and the weight of the negatives' mean (None: plain sums)."""

    loss: str
    params: list[float]
    alpha: float | None = None

    def __str__(self) -> str:
        mean = [] if self.alpha is None else [f"mean {self.alpha:g}"]
        return "-".join([self.loss, *(f"{p:g}" for p in self.params), *mean])

    @property
    def family(self) -> str:
        return FAMILIES[self.loss]

    def spec(self, num_classes: int, k=0, compact=False, ignore_index=-100, part=None, **labels) -> LossSpec:
        """part: first_class and all_classes; None: all classes are at hand. labels: the last fields."""
        part = part or (0, num_classes)
        return LossSpec(self.loss, self.params, self.alpha, k, ignore_index, *part, compact, **labels)


LOG_ODDS, CE, NLLR = Formula("log_odds", []), Formula("cross_entropy", []), Formula("nllr", [])
CRL, LR, SS_LR = Formula("crl", [1.5, 1.0]), Formula("lr", []), Formula("ss_lr", [2.0])
SOFTMAX = (
    LOG_ODDS,
    CE,
    NLLR,
    CRL,
    CRL._replace(params=[0.0, 1.0]),
    CRL._replace(params=[0.3, 2.5]),
    CRL._replace(params=[4.0, 0.0]),
)
LOGISTIC = (
    LR,
    LR._replace(alpha=1.0),
    SS_LR,
    SS_LR._replace(alpha=3.0),
    SS_LR._replace(params=[0.5]),
    SS_LR._replace(params=[0.0], alpha=0.5),
)

# (k, compact): k = 0 is all negatives; both forms of the k hardest
FORMS = ((0, False), (1, False), (1, True), (4, False), (4, True), (40, False), (40, True))


class Kept(NamedTuple):
    """What forward gives: the loss, and what backward will be handed."""

    loss: Tensor
    coefficients: Tensor
    statistics: Tensor
    pick_index: Tensor
    pick_logit: Tensor


def forward(
    backend, formula: Formula, logits, target, k=0, compact=False, ignore_index=-100, part=None, weight=None,
    reduction="none",
) -> Kept:  # fmt: skip
    spec = formula.spec(logits.shape[1], k, compact, ignore_index, part)
    return Kept(*backend.forward(logits, target, weight, reduction, *spec))


def backward(
    backend, formula: Formula, grad, logits, target, kept: Kept, k=0, compact=False, ignore_index=-100, part=None
) -> Tensor:
    """dlogits, with the logits withheld where the form must do without them."""
    withheld = compact and k > 0 and target.ndim == 1
    spec = formula.spec(logits.shape[1], k, compact, ignore_index, part)
    _, coefficients, *rest = kept
    given = None if withheld else logits
    return backend.backward(grad, coefficients, given, target, *rest, logits.shape[1], *spec)


class Seen(NamedTuple):
    """What the statistics door gives."""

    statistics: Tensor
    pick_index: Tensor
    pick_logit: Tensor


def statistics(
    backend, formula: Formula, logits, labels, k=0, compact=False, ignore_index=None, part=None, label_smoothing=0.0
) -> Seen:
    """labels: (rows, P)."""
    options = {"labels": True, "label_smoothing": label_smoothing}
    spec = formula.spec(logits.shape[1], k, compact, ignore_index, part, **options)
    return Seen(*backend.statistics(logits, labels, *spec))


def backward_of_labels(
    backend, formula: Formula, grad, coefficients, logits, labels, seen: Seen, k=0, compact=False, ignore_index=None,
    part=None, label_smoothing=0.0,
) -> Tensor:  # fmt: skip
    """dlogits for coefficients (rows, 2 + P), with the logits withheld in the compact form."""
    options = {"labels": True, "label_smoothing": label_smoothing}
    spec = formula.spec(logits.shape[1], k, compact, ignore_index, part, **options)
    given = None if compact and k > 0 else logits
    return backend.backward(grad, coefficients, given, labels, *seen, logits.shape[1], *spec)


def grad_like(logits: Tensor, seed: int = 0) -> Tensor:
    """A random upstream gradient for the values of the rows, (rows,)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(logits.shape[0], dtype=torch.float64, generator=generator).to(dtype)


def paper_rows(formula: Formula, logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Values (rows,) in float64, differentiable."""
    chosen = k or None
    if formula.loss == "log_odds":
        return -paper.nllr(logits, target, chosen)
    if formula.family == "softmax":
        hyper = dict(zip(("alpha", "beta"), formula.params, strict=False))
        return getattr(paper, formula.loss)(logits, target, chosen, **hyper)
    positive, negative = paper.positives(logits, target), paper.negatives(logits, target, chosen)
    gamma = formula.params[0] if formula.params else 0.0
    sums = paper.positive_sum(logits, positive), paper.negative_sum(logits, negative, gamma)
    if formula.alpha is None:
        return sums[0] + sums[1]
    return paper.two_means(sums[0], positive, sums[1], negative, formula.alpha)


def paper_rows_and_grad(formula: Formula, logits, target, k: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.detach().double().requires_grad_()
    rows = paper_rows(formula, z, target, k)
    rows.backward(grad.double())
    return rows.detach(), z.grad
