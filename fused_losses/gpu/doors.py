"""The doors of the Triton kernels: which kernels serve which rows. The contract stands in ``reference.py``."""

import torch
from torch import Tensor

from ..finish import finish as finish_in_pytorch
from ..losses import LossSpec
from . import all_negatives, device, gradient, hardest
from . import finish as finishing
from . import finish_labels as finishing_labels
from .device import unserved

__all__ = ["at_once_", "backward", "backward_", "finish", "forward", "statistics", "unserved"]


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *spec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, coefficients (rows, 2 | 2 + P), statistics (rows, 3 | 4 | 3 + P), pick_index and pick_logit (rows, k | 1 |
    0)."""
    spec = LossSpec.of_op(*spec)
    if spec.labels or spec.margin:
        seen = _statistics(logits, target, spec)
        return *_finish_labels(seen[0], target, weight, reduction, spec), *seen
    finished = finishing.empty(logits, reduction)
    if finishing.ends_rows(target, weight, reduction, spec):
        return *finished, *_statistics(logits, target, spec, finished)
    seen = _statistics(logits, target, spec)
    with torch.cuda.device_of(logits):
        finishing.launch(finished, seen[0], target, weight, reduction, spec)
    return *finished, *seen


def statistics(logits: Tensor, target: Tensor, *spec) -> tuple[Tensor, Tensor, Tensor]:
    """statistics (rows, 3 | 4 | 3 + P), pick_index and pick_logit (rows, k | 1 | 0)."""
    return _statistics(logits, target, LossSpec.of_op(*spec))


def _statistics(
    logits: Tensor, target: Tensor, spec: LossSpec, finished: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """finished: loss and coefficients, if the kernel that has a row fills these too."""
    num_rows = logits.shape[0]
    columns = {"index": 3, "multi_hot": 4, "labels": 3 + target.shape[-1]}[device.kind_of(target, spec)]
    statistics = logits.new_empty((num_rows, columns), dtype=torch.float32)
    pick_logit = logits.new_empty((num_rows, spec.slots))
    picks = torch.empty_like(pick_logit, dtype=torch.int32), pick_logit
    outputs = *(finished or (None, None)), statistics
    with torch.cuda.device_of(logits):
        if num_rows > 0 and spec.k > 0:
            hardest.forward(logits, target, spec, picks, outputs)
        elif num_rows > 0:
            all_negatives.forward(logits, target, spec, outputs)
    return statistics, *picks


def finish(statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *spec) -> tuple[Tensor, Tensor]:
    """loss, and coefficients (rows, 2 | 2 + P)."""
    spec = LossSpec.of_op(*spec)
    if spec.labels or spec.margin:
        return _finish_labels(statistics, target, weight, reduction, spec)
    outputs = finishing.empty(statistics, reduction)
    with torch.cuda.device_of(statistics):
        finishing.launch(outputs, statistics, target, weight, reduction, spec)
    return outputs


def _finish_labels(
    statistics: Tensor, target: Tensor, weight: Tensor | None, reduction: str, spec: LossSpec
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with several labels, smoothing, or a margin."""
    if not finishing_labels.serves(statistics, spec):
        with torch.no_grad():
            return finish_in_pytorch(statistics, target, weight, reduction, spec)
    with torch.cuda.device_of(statistics):
        return finishing_labels.launch(statistics, target, weight, reduction, spec)


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
    seen = target, statistics, pick_index, pick_logit
    return _backward(grad, coefficients, logits, *seen, num_classes, LossSpec.of_op(*spec), in_place=False)


def backward_(
    grad: Tensor,
    coefficients: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    pick_index: Tensor,
    pick_logit: Tensor,
    *spec,
) -> None:
    """The same, written over the logits. A program reads nothing of a row that another one writes, and each element in
    front of writing it."""
    tensors = grad, coefficients, logits, target, statistics, pick_index, pick_logit
    if device.lies_as_matrix(logits):
        _backward(*tensors, logits.shape[1], LossSpec.of_op(*spec), in_place=True)
    else:
        logits.copy_(backward(*tensors, logits.shape[1], *spec))


def _backward(
    grad, coefficients, logits, target, statistics, pick_index, pick_logit, num_classes, spec: LossSpec, in_place: bool
) -> Tensor:  # fmt: skip
    rows = gradient.upstream(grad, coefficients, statistics)
    with torch.cuda.device_of(pick_logit):
        if spec.k > 0:
            return hardest.backward(rows, logits, target, (pick_index, pick_logit), num_classes, spec, in_place)
        return all_negatives.backward(rows, logits, target, spec, in_place)


def at_once_(grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, *spec) -> tuple[Tensor, Tensor]:
    """forward without a reduction and backward_ for the upstream gradient (rows,), in one launch where that can be:
    loss (rows,) and statistics (rows, 3 | 4 | 3 + P), and the gradient over the logits."""
    of = LossSpec.of_op(*spec)
    plain = of.k == 0 and not of.margin and device.kind_of(target, of) == "index" and weight is None
    if plain and device.lies_as_matrix(logits) and all_negatives.are_whole(logits):
        loss, coefficients = finishing.empty(logits, "none")
        statistics = logits.new_empty((logits.shape[0], 3), dtype=torch.float32)
        with torch.cuda.device_of(logits):
            all_negatives.at_once_(grad, logits, target, of, (loss, coefficients, statistics))
    else:
        loss, coefficients, statistics, *picks = forward(logits, target, weight, "none", *spec)
        backward_(grad, coefficients, logits, target, statistics, *picks, *spec)
    return loss, statistics
