"""What each loss is, in plain PyTorch: a value and its slope. Nothing here knows a row.

Softmax losses are functions of d, the log-odds of the target among the target and S. Logistic losses add up phi over
the logits z of the negatives. The same page in Triton is ``gpu/formulas.py``, in C++ ``csrc/formulas.h``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INF = math.inf


def softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus turns linear at 20: too early for float64


# --- softmax losses, of the log-odds ----------------------------------------------------------------------------------


def log_odds_value(d: Tensor) -> Tensor:
    return d


def log_odds_slope(d: Tensor) -> Tensor:
    return torch.where(d.isnan(), d, 1.0)


def cross_entropy_value(d: Tensor) -> Tensor:
    return softplus(-d)


def cross_entropy_slope(d: Tensor) -> Tensor:
    return -torch.sigmoid(-d)


def nllr_value(d: Tensor) -> Tensor:
    return -d


def nllr_slope(d: Tensor) -> Tensor:
    return -log_odds_slope(d)


def crl_value(d: Tensor, alpha: float, beta: float) -> Tensor:
    if beta == 0:
        return cross_entropy_value(d)
    log_alpha = torch.full_like(d, math.log(alpha) if alpha > 0 else -INF)
    return cross_entropy_value(d) + beta * torch.logaddexp(log_alpha, -softplus(d))


def crl_slope(d: Tensor, alpha: float, beta: float) -> Tensor:
    competing = torch.sigmoid(d)
    if alpha > 0:
        competing = competing * torch.sigmoid(-(math.log(alpha) + softplus(d)))
    return cross_entropy_slope(d) - beta * competing


# --- logistic losses, of one negative's logit -------------------------------------------------------------------------


def lr_phi(z: Tensor) -> Tensor:
    return softplus(z)


def lr_phi_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z)


def ss_lr_phi(z: Tensor, gamma: float) -> Tensor:
    if gamma == 0:  # 0 * inf at z = -inf
        return softplus(z)
    return torch.sigmoid(z).pow(gamma) * softplus(z)


def ss_lr_phi_slope(z: Tensor, gamma: float) -> Tensor:
    sigma = torch.sigmoid(z)
    if gamma == 0:
        return sigma
    finite = z.clamp(max=torch.finfo(z.dtype).max)  # sigma(-z) * softplus(z) -> 0 at +inf, not 0 * inf
    return sigma.pow(gamma) * (sigma + gamma * torch.sigmoid(-z) * softplus(finite))


class Formula(NamedTuple):
    """value(x, *params) and slope(x, *params): x is d (softmax) or one negative's z (logistic)."""

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]

    @property
    def num_params(self) -> int:
        return self.value.__code__.co_argcount - 1


FORMULAS = {
    "log_odds": Formula(log_odds_value, log_odds_slope),
    "cross_entropy": Formula(cross_entropy_value, cross_entropy_slope),
    "nllr": Formula(nllr_value, nllr_slope),
    "crl": Formula(crl_value, crl_slope),
    "lr": Formula(lr_phi, lr_phi_slope),
    "ss_lr": Formula(ss_lr_phi, ss_lr_phi_slope),
}
