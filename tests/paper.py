"""The judge: every loss from the formula that its authors' code states, naively, in float64, with autograd's gradient.

Nothing of the package is imported here. A function takes logits (rows, classes) and a target, class indices (rows,) or
a multi-hot matrix (rows, classes), and returns one value per row (rows,), whose mean is the loss that its paper states.
`k` restricts the negatives of a row to its k hardest; `None` means all of them. Meant for finite logits whose
differences stay below 700, where float64 neither overflows nor underflows in any of these formulas.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def positives(logits: Tensor, target: Tensor) -> Tensor:
    """Which entries are positive: bool (rows, classes)."""
    if target.ndim == logits.ndim:
        return target != 0
    positive = torch.zeros(logits.shape, dtype=torch.bool)
    for row, label in enumerate(target.tolist()):
        positive[row, label] = True
    return positive


def negatives(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """S, the chosen negatives: bool (rows, classes). The k hardest are those with the largest logits; among equals the
    lowest class index comes first."""
    positive = positives(logits, target)
    if k is None:
        return ~positive
    chosen = torch.zeros_like(positive)
    for row, (values, taken) in enumerate(zip(logits.detach().double().numpy(), positive.numpy(), strict=True)):
        hardest_first = np.argsort(-values, kind="stable")
        chosen[row, hardest_first[~taken[hardest_first]][:k]] = True
    return chosen


# Softmax family. The target is one class; over the k hardest, the softmax runs over {target} + S.


def target_and_wrong(logits: Tensor, target: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """p_y and sum over j in S of p_j: (rows,) each."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    p = torch.softmax(logits.double().masked_fill(~(positive | negative), -torch.inf), dim=1)
    return (p * positive).sum(1), (p * negative).sum(1)


def cross_entropy(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """-log p_y: the baseline of every paper below."""
    p_target, _ = target_and_wrong(logits, target, k)
    return -torch.log(p_target)


def nllr(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """-log( p_y / sum_{j != y} p_j ): Zhu et al., arXiv 1804.10690; CRL's code at alpha = 0, beta = 1."""
    p_target, p_wrong = target_and_wrong(logits, target, k)
    return -torch.log(p_target / p_wrong)


def crl(logits: Tensor, target: Tensor, k: int | None = None, *, alpha: float, beta: float) -> Tensor:
    """log( (alpha + sum_{j != y} p_j)^beta / p_y ): ratio.py of github.com/PRIS-CV/CRL-code, whose constant A is
    alpha + 1, so that its A - p_y is the bracket here; without its clamp and eps. arXiv 1907.13349, 1912.11642."""
    p_target, p_wrong = target_and_wrong(logits, target, k)
    return torch.log((alpha + p_wrong) ** beta / p_target)


# Logistic family. s = sigmoid(z); log s and log(1 - s) = log sigmoid(-z) without the authors' eps.


def positive_sum(logits: Tensor, positive: Tensor) -> Tensor:
    """-sum over the positives of log s: (rows,)."""
    return -(F.logsigmoid(logits.double()) * positive).sum(1)


def negative_sum(logits: Tensor, negative: Tensor, gamma: float = 0.0) -> Tensor:
    """-sum over the chosen negatives of s^gamma log(1 - s): (rows,)."""
    z = logits.double()
    return -(torch.sigmoid(z) ** gamma * F.logsigmoid(-z) * negative).sum(1)


def two_means(positive_sum: Tensor, positive: Tensor, negative_sum: Tensor, negative: Tensor, alpha: float) -> Tensor:
    """Rows whose mean is the authors' batch loss: the mean over the batch's positives plus alpha times the mean over
    its chosen negatives. A mean over nothing is 0."""
    rows, count_positive, count_negative = len(positive), int(positive.sum()), int(negative.sum())
    return rows * (positive_sum / max(count_positive, 1) + alpha * negative_sum / max(count_negative, 1))


def lr(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """-sum_{positive} log s - sum_{negative} log(1 - s): one binary logistic loss per class, the baseline that
    arXiv 1811.08400 starts from (not in its code)."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    return positive_sum(logits, positive) + negative_sum(logits, negative)


def hs_lr(logits: Tensor, target: Tensor, k: int, *, alpha: float) -> Tensor:
    """-(1/P) sum_{positive} log s - alpha (1/(N K)) sum_i sum_{j in TopK_i} log(1 - s): Eq. 5 of arXiv 1811.08400 as
    class HS_LR of LR_Focus_pytorch.py states it (github.com/qd301/FocusRectificationLogisticRegression)."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    return two_means(positive_sum(logits, positive), positive, negative_sum(logits, negative), negative, alpha)


def ss_lr(logits: Tensor, target: Tensor, k: int | None = None, *, alpha: float, gamma: float) -> Tensor:
    """-(1/P) sum_{positive} log s - alpha (1/M) sum_{negative} s^gamma log(1 - s): Eq. 6 of arXiv 1811.08400 as class
    SS_LR of the same file states it; M = the number of (chosen) negatives in the batch."""
    positive, negative = positives(logits, target), negatives(logits, target, k)
    return two_means(positive_sum(logits, positive), positive, negative_sum(logits, negative, gamma), negative, alpha)
