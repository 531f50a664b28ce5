"""The doors of the Triton kernels: which kernels serve which rows. The contract stands in ``reference.py``."""

import torch
from torch import Tensor

from ..losses import LossSpec
from . import all_negatives, gradient, hardest
from . import finish as finishing
from .device import unserved

__all__ = ["backward", "finish", "forward", "unserved"]


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *spec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, coefficients (rows, 2), statistics (rows, 3 | 4), pick_index and pick_logit (rows, k | 1 | 0)."""
    spec = LossSpec(*spec)
    num_rows = logits.shape[0]
    loss, coefficients = finishing.empty(logits, reduction)
    statistics = logits.new_empty((num_rows, 4 if target.dim() == 2 else 3), dtype=torch.float32)
    pick_logit = logits.new_empty((num_rows, spec.slots))
    picks = torch.empty_like(pick_logit, dtype=torch.int32), pick_logit
    finished = loss, coefficients
    at_once = finishing.ends_rows(target, weight, reduction, spec)
    ending = finishing.ending(spec, statistics, finished if at_once else None)
    with torch.cuda.device_of(logits):
        if num_rows > 0 and spec.k > 0:
            hardest.forward(logits, target, spec, picks, ending)
        elif num_rows > 0:
            all_negatives.forward(logits, target, spec, ending)
        if not at_once:
            finishing.launch(finished, statistics, target, weight, reduction, spec)
    return loss, coefficients, statistics, *picks


def finish(statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *spec) -> tuple[Tensor, Tensor]:
    """loss, and coefficients (rows, 2)."""
    outputs = finishing.empty(statistics, reduction)
    with torch.cuda.device_of(statistics):
        finishing.launch(outputs, statistics, target, weight, reduction, LossSpec(*spec))
    return outputs


def backward(
    grad: Tensor,
    coefficients: Tensor,
    logits: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    num_classes: int,
    *spec,
) -> Tensor:
    """dlogits (rows, classes)."""
    spec = LossSpec(*spec)
    rows = gradient.upstream(grad, coefficients, statistics)
    with torch.cuda.device_of(pick_logit):
        if spec.k > 0:
            return hardest.backward(rows, logits, target, (pick_index, pick_logit), num_classes, spec)
        return all_negatives.backward(rows, logits, target, spec)
