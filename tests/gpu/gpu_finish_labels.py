"""Calls to the GPU door ``finish`` with labels, smoothing and margins, beside the plain one's."""

import torch
from gpu_doors import IGNORED, assert_as_accurate, gpu_backend
from torch import Tensor

from doors import Formula
from fused_losses import finish
from fused_losses.margin import Margin, MarginTerms

CLASSES, SCALE, BIAS = 50, 6.0, 0.25
MARGINS = {
    "none": (),
    "angle": tuple(MarginTerms.of(Margin(angle=0.5), SCALE, 0.0, torch.float32)),
    "cosine": tuple(MarginTerms.of(Margin(cosine=0.35), SCALE, BIAS, torch.float32)),
    "both": tuple(MarginTerms.of(Margin(angle=0.4, cosine=0.2), SCALE, BIAS, torch.float32)),
    "negative": tuple(MarginTerms.of(Margin(angle=-0.75), SCALE, 0.0, torch.float32)),
}


def statistics_of(formula: Formula, rows: int, places: int, labels: bool, seed: int = 0) -> Tensor:
    """(rows, 2 | 3 + places). Every other row's logits are near the clamps of a margin's cosine."""
    generator = torch.Generator().manual_seed(rows + 1000 * seed)
    first = 3 if labels else 2
    statistics = 3 * torch.randn((rows, first + places), generator=generator)
    statistics[::2, first:] = SCALE * torch.rand((len(statistics[::2]), places), generator=generator).mul(2.2).sub(1.1)
    if formula.family == "logistic":
        statistics[:, 1] = statistics[:, 1].abs()
    if labels:
        statistics[:, 2] *= CLASSES
    return statistics


def compare_finish(
    formula, statistics, target, reduction, device, weight=None, margin="none", smoothing=0.0, k=0,
    ignore_index=IGNORED, backend=gpu_backend,
):  # fmt: skip
    """-> loss and coefficients, held against the plain finish in the same precision and in float64."""
    labels = target.dim() == 2
    spec = formula.spec(CLASSES, k, ignore_index=ignore_index, labels=labels, label_smoothing=smoothing)
    spec = spec._replace(margin=MARGINS[margin])
    on_device = (None if x is None else x.to(device) for x in (statistics, target, weight))
    ours = [x.cpu() for x in backend.finish(*on_device, reduction, *spec)]
    theirs = finish.finish(statistics, target, weight, reduction, spec)
    truth = finish.finish(statistics.double(), target, None if weight is None else weight.double(), reduction, spec)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape and x.dtype == torch.float32
    assert torch.equal(ours[1][:, 0].isnan(), theirs[1][:, 0].isnan()), "c is what makes a row NaN"
    what = f"{formula}, {margin}, {smoothing}, {reduction}"
    of_all = ([x[0], _known(x[1])] for x in (ours, theirs, truth))
    for name, *of in zip(("loss", "coefficients"), *of_all, strict=True):
        # Sums of both signs, of which a row may leave next to nothing: held against the scale of all rows.
        if len(statistics) and (formula.loss in ("log_odds", "nllr") or (smoothing and name == "loss")):
            of = [x.reshape(1, -1) for x in of]
        if of[0].numel():
            assert_as_accurate(*of, f"{what}: {name}")
    return ours


def _known(coefficients: Tensor) -> Tensor:
    """In rows with NaN as c the others say nothing."""
    return coefficients.masked_fill(coefficients[:, :1].isnan(), float("nan"))
