"""The same losses as a careful PyTorch user writes them: torch's own functions, in float32 for half-precision logits,
else in the logits' dtype. The yardstick of the tolerance rule (cases.py), not a judge."""

import torch
import torch.nn.functional as F
from torch import Tensor

import paper


def working(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def softmax_terms(logits: Tensor, target: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """log p_y and the sum of the wrong probabilities, over {target} + S."""
    positive, negative = paper.positives(logits, target), paper.negatives(logits, target, k)
    log_p = F.log_softmax(working(logits).masked_fill(~(positive | negative), -torch.inf), dim=1)
    return log_p.gather(1, target[:, None]).squeeze(1), log_p.masked_fill(~negative, -torch.inf).exp().sum(1)


def cross_entropy(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    if k is None:
        return F.cross_entropy(working(logits), target, reduction="none")
    return -softmax_terms(logits, target, k)[0]


def nllr(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    z, negative = working(logits), paper.negatives(logits, target, k)
    return torch.logsumexp(z.masked_fill(~negative, -torch.inf), dim=1) - z.gather(1, target[:, None]).squeeze(1)


def crl(logits: Tensor, target: Tensor, k: int | None = None, *, alpha: float, beta: float) -> Tensor:
    log_p, wrong = softmax_terms(logits, target, k)
    return -log_p + beta * torch.log(alpha + wrong)


def logistic_terms(logits: Tensor, target: Tensor, k: int | None, gamma: float) -> tuple[Tensor, Tensor, int, int]:
    positive, negative = paper.positives(logits, target), paper.negatives(logits, target, k)
    z = working(logits)
    terms = F.binary_cross_entropy_with_logits(z, positive.to(z.dtype), reduction="none")
    focus = torch.sigmoid(z) ** gamma if gamma else 1
    sums = (terms * positive).sum(1), (focus * terms * negative).sum(1)
    return *sums, max(int(positive.sum()), 1), max(int(negative.sum()), 1)


def lr(logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    pos, neg, _, _ = logistic_terms(logits, target, k, 0)
    return pos + neg


def hs_lr(logits: Tensor, target: Tensor, k: int, *, alpha: float) -> Tensor:
    return ss_lr(logits, target, k, alpha=alpha, gamma=0)


def ss_lr(logits: Tensor, target: Tensor, k: int | None = None, *, alpha: float, gamma: float) -> Tensor:
    pos, neg, positives, negatives = logistic_terms(logits, target, k, gamma)
    return len(pos) * (pos / positives + alpha * neg / negatives)
