"""Calls to the GPU doors with labels (rows, P) beside the reference's."""

import torch
from gpu_doors import Unchecked, assert_as_accurate, assert_same_picks, gpu_backend
from torch import Tensor

from doors import Formula, grad_like
from fused_losses.gpu.layout import gradient_row_stride


def make_labels(rows: int, most: int, classes: int, seed: int = 0) -> Tensor:
    """Ascending and distinct, (rows, most); row r has r % (most + 1) empty places, but the first none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((rows, most), -1)
    for row, line in enumerate(labels):
        number = min(most - row % (most + 1), classes)
        line[:number] = torch.randperm(classes, generator=generator)[:number].sort().values
    return labels


def coefficients_for(labels: Tensor, seed: int = 0) -> Tensor:
    """c, b, t_1 ... t_P, (rows, 2 + P)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((labels.shape[0], 2 + labels.shape[1]), generator=generator)


def compare_labels(
    formula: Formula, logits: Tensor, labels: Tensor, k: int = 0, compact: bool = False, smoothing: float = 0.0, *,
    backend=gpu_backend, ignore_index: int | None = -1, part=(0, None), coefficients: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Statistics and gradient of the GPU doors: the picks are the reference's, bit for bit; the rest is held against
    the reference in the same precision and in float64. part: first_class and all_classes. Gives dlogits."""
    classes = logits.shape[1]
    spec = formula.spec(classes, k, compact, ignore_index, (part[0], part[1] or classes))
    spec = spec._replace(labels=True, label_smoothing=smoothing)
    coefficients = coefficients_for(labels).to(logits.device) if coefficients is None else coefficients
    grad = grad_like(logits).to(logits.device) if grad is None else grad

    def step(backend, dtype):
        seen = backend.statistics(logits.to(dtype), labels, *spec)
        given = None if compact and k else logits.to(dtype)
        known = coefficients.clone()
        known[:, 0].masked_fill_(seen[0][:, 1].isnan(), float("nan"))  # as every finish does
        numbers = (x.to(seen[0].dtype) for x in (grad, known))
        return *seen, backend.backward(*numbers, given, labels, *seen, classes, *spec)

    ours, theirs, truth = step(backend, logits.dtype), step(Unchecked(), logits.dtype), step(Unchecked(), torch.float64)
    assert ours[0].dtype == torch.float32 and ours[0].shape == (len(labels), 3 + labels.shape[1])
    assert_same_picks(logits, ours[1:3], theirs[1:3])
    assert_as_accurate(*(_comparable(x, formula, spec) for x, *_ in (ours, theirs, truth)), f"{formula}: statistics")
    stride = classes if compact and k else gradient_row_stride(classes, logits.stride(), logits.element_size())
    assert ours[3].dtype == logits.dtype and ours[3].stride() == (stride, 1)
    assert_as_accurate(ours[3], theirs[3], truth[3], f"{formula}: dlogits")
    return ours[3]


def _comparable(statistics: Tensor, formula: Formula, spec) -> Tensor:
    """Without what may be anything: of rows with a NaN all but that it is in the second column; s where it has no
    sense; and s by itself, whose scale is not that of the others."""
    nan = statistics[:, 1:2].isnan()
    rest = statistics.masked_fill(nan, float("nan"))
    rest[:, 2].masked_fill_((statistics[:, 0] == float("inf")) & ~nan[:, 0], 0)
    return rest
