"""How a loss works inside: who pulls on a row, and how far the target is ahead. Seen on the same rows all the way."""

from collections.abc import Callable

import torch
from torch import nn

from bench.evidence.contenders import LOGISTIC
from bench.evidence.data import Split

EASY = 0.1  # a negative class is easy for a row if the model gives it less than this probability, sigma(z_j)
ROWS = 256

Probe = Callable[[nn.Module, nn.Module], dict[str, float]]  # model, criterion -> what is seen


def probe_of(train: Split) -> Probe:
    """Looks at up to 256 rows of the training split, evenly spread over it, with the model as it is evaluated."""
    rows = torch.linspace(0, len(train.target) - 1, min(ROWS, len(train.target))).long().unique()
    inputs, target = (tensor[rows.to(tensor.device)] for tensor in train)

    def probe(model: nn.Module, criterion: nn.Module) -> dict[str, float]:
        training = model.training
        with torch.no_grad():
            logits = model.eval()(inputs)
        model.train(training)
        return mechanisms(logits, target, criterion)

    return probe


def mechanisms(logits: torch.Tensor, target: torch.Tensor, criterion: nn.Module) -> dict[str, float]:
    """For a logistic loss the easy share: how much of the negatives' gradient, summed over rows and classes, easy
    classes bear. For a softmax loss the margin: the mean of p_y minus the largest wrong probability."""
    negative = target == 0 if target.dim() == 2 else torch.ones_like(logits, dtype=torch.bool)
    if target.dim() == 1:
        negative.scatter_(1, target[:, None], False)
    if isinstance(criterion, LOGISTIC):
        leaf = logits.detach().requires_grad_()
        criterion(leaf, target).backward()
        pull = leaf.grad.masked_fill(~negative, 0)
        easy = pull.masked_fill(logits.sigmoid() >= EASY, 0)
        return {"easy share": (easy.sum(dtype=torch.float64) / pull.sum(dtype=torch.float64)).item()}
    p = logits.softmax(1)
    wrong = p.masked_fill(~negative, 0).amax(1)
    return {"margin": (p.gather(1, target[:, None])[:, 0] - wrong).mean().item()}
