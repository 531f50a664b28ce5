"""Calls to the doors of a wing: one forward, one backward, and what the paper says that they should give."""

from typing import NamedTuple

import torch
from torch import Tensor

import paper


class Formula(NamedTuple):
    """A loss as the doors know it: family, name and parameters."""

    family: str
    loss: str
    params: list[float]

    def __str__(self) -> str:
        return "-".join([self.loss, *(f"{p:g}" for p in self.params)])


CE, NLLR, LR = Formula("softmax", "cross_entropy", []), Formula("softmax", "nllr", []), Formula("logistic", "lr", [])
CRL, SS_LR = Formula("softmax", "crl", [1.5, 1.0]), Formula("logistic", "ss_lr", [2.0])
SOFTMAX = (
    CE,
    NLLR,
    CRL,
    CRL._replace(params=[0.0, 1.0]),
    CRL._replace(params=[0.3, 2.5]),
    CRL._replace(params=[4.0, 0.0]),
)
LOGISTIC = (LR, SS_LR, SS_LR._replace(params=[0.5]), SS_LR._replace(params=[0.0]))

# (k, compact): k = 0 is all negatives; both forms of the k hardest
FORMS = ((0, False), (1, False), (1, True), (4, False), (4, True), (40, False), (40, True))


class Kept(NamedTuple):
    """What forward gives: value (rows,) or sums (rows, 2), and what backward will be handed."""

    rows: Tensor
    state: Tensor
    pick_index: Tensor
    pick_logit: Tensor


def forward(wing, formula: Formula, logits, target, k=0, compact=False, ignore_index=-100, part=(0, None)) -> Kept:
    """part: first_class and all_classes, of logits that are some columns of a row."""
    door = getattr(wing, f"{formula.family}_forward")
    return Kept(*door(logits, target, formula.loss, formula.params, k, ignore_index, compact, *part))


def backward(
    wing, formula: Formula, grad, logits, target, kept: Kept, k=0, compact=False, ignore_index=-100, part=(0, None)
) -> Tensor:
    """dlogits, with the logits withheld where the form must do without them."""
    door = getattr(wing, f"{formula.family}_backward")
    classes = logits.shape[1]
    withheld = compact and target.ndim == 1
    return door(
        grad,
        None if withheld else logits,
        target,
        *kept[1:],
        formula.loss,
        formula.params,
        k,
        ignore_index,
        classes,
        compact,
        *part,
    )


def grad_like(formula: Formula, logits: Tensor, seed: int = 0) -> Tensor:
    """A random upstream gradient for the row outputs: (rows,) or (rows, 2)."""
    shape = (logits.shape[0],) if formula.family == "softmax" else (logits.shape[0], 2)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def paper_rows(formula: Formula, logits: Tensor, target: Tensor, k: int) -> Tensor:
    """value (rows,) or sums (rows, 2), in float64, differentiable."""
    chosen = k or None
    if formula.family == "softmax":
        hyper = dict(zip(("alpha", "beta"), formula.params, strict=False))
        return getattr(paper, formula.loss)(logits, target, chosen, **hyper)
    positive, negative = paper.positives(logits, target), paper.negatives(logits, target, chosen)
    gamma = formula.params[0] if formula.params else 0.0
    return torch.stack([paper.positive_sum(logits, positive), paper.negative_sum(logits, negative, gamma)], dim=1)


def paper_rows_and_grad(formula: Formula, logits, target, k: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.detach().double().requires_grad_()
    rows = paper_rows(formula, z, target, k)
    rows.backward(grad.double())
    return rows.detach(), z.grad
