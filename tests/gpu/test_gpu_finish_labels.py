"""The GPU door ``finish`` with several labels, smoothing and margins, against the plain one."""

import itertools
import math

import pytest
import torch
from gpu_doors import FORMULAS, IGNORED, assert_as_accurate
from gpu_labels import make_labels
from torch import Tensor

from doors import CE, CRL, LR, SS_LR, Formula
from fused_losses import finish
from fused_losses.gpu import device as gpu
from fused_losses.gpu import doors, finish_labels
from fused_losses.margin import Margin, MarginTerms

INF, NAN = math.inf, math.nan
CLASSES, SCALE, BIAS = 50, 6.0, 0.25
MARGINS = {
    "none": (),
    "angle": tuple(MarginTerms.of(Margin(angle=0.5), SCALE, 0.0, torch.float32)),
    "cosine": tuple(MarginTerms.of(Margin(cosine=0.35), SCALE, BIAS, torch.float32)),
    "both": tuple(MarginTerms.of(Margin(angle=0.4, cosine=0.2), SCALE, BIAS, torch.float32)),
    "negative": tuple(MarginTerms.of(Margin(angle=-0.75), SCALE, 0.0, torch.float32)),
}
REDUCTIONS = ("none", "sum", "mean")

each_margin = pytest.mark.parametrize("margin", MARGINS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
one_of_each = pytest.mark.parametrize("formula", [CRL, LR, SS_LR._replace(alpha=3.0)], ids=str)


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


def compare(
    formula, statistics, target, reduction, device, weight=None, margin="none", smoothing=0.0, k=0, ignore_index=IGNORED
):  # fmt: skip
    """-> loss and coefficients, held against the plain finish in the same precision and in float64."""
    labels = target.dim() == 2
    spec = formula.spec(CLASSES, k, ignore_index=ignore_index, labels=labels, label_smoothing=smoothing)
    spec = spec._replace(margin=MARGINS[margin])
    on_device = (None if x is None else x.to(device) for x in (statistics, target, weight))
    ours = [x.cpu() for x in doors.finish(*on_device, reduction, *spec)]
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
    return coefficients.masked_fill(coefficients[:, :1].isnan(), NAN)


def ignored_and_ours(labels: Tensor, statistics: Tensor) -> None:
    labels[1::4], statistics[1::4] = -1, 0.0


# Smoothing, rows, k, weights and reductions take turns.
@each_margin
@pytest.mark.parametrize("places", [1, 2, 3, 7])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_labels(formula, places, margin, device):
    turn = FORMULAS.index(formula) + places + list(MARGINS).index(margin)
    rows, k, reduction, smoothing = (
        (1, 5, 33)[turn % 3],
        (0, 7)[turn // 3 % 2],
        REDUCTIONS[turn // 2 % 3],
        0.1 * (turn % 2),
    )
    labels = make_labels(rows, places, CLASSES)
    statistics = statistics_of(formula, rows, places, labels=True)
    statistics[:, 3:].masked_fill_(labels < 0, -INF)
    ignored_and_ours(labels, statistics)
    weight = torch.rand((rows, places), generator=torch.Generator().manual_seed(places)) if turn % 4 else None
    compare(formula, statistics, labels, reduction, device, weight, margin, smoothing, k, ignore_index=-1)


@pytest.mark.parametrize("margin", [margin for margin in MARGINS if margin != "none"])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_class_indices_with_a_margin(formula, margin, device):
    """With class weights and without; a label that is no class is not looked up."""
    turn = FORMULAS.index(formula) + list(MARGINS).index(margin)
    reduction = REDUCTIONS[turn % 3]
    for rows, weighted in ((1, False), (33, True)):
        target = torch.randint(CLASSES, (rows, 2), generator=torch.Generator().manual_seed(rows))[:, 1]  # of stride 2
        statistics = statistics_of(formula, rows, 1, labels=False)
        target[1::4], statistics[1::4] = IGNORED, 0.0
        weight = torch.rand((CLASSES, 3), generator=torch.Generator().manual_seed(rows))[:, 1] if weighted else None
        compare(formula, statistics, target, reduction, device, weight, margin, k=(0, 7)[turn % 2])
        target[2::9], statistics[2::9] = 2**40, NAN
        target[3::9], statistics[3::9] = -1, NAN
        compare(formula, statistics, target, reduction, device, weight, margin, k=(0, 7)[turn % 2])


@each_reduction
@pytest.mark.parametrize("formula", [CRL, SS_LR._replace(alpha=3.0)], ids=str)
def test_many_rows(formula, reduction, device, monkeypatch):
    """Several programs, which have several blocks each."""
    monkeypatch.setattr(finish_labels, "_MOST_PROGRAMS", 2)
    monkeypatch.setattr(finish_labels, "_WIDE", 256)
    labels = make_labels(700, 2, CLASSES)
    statistics = statistics_of(formula, 700, 2, labels=True)
    statistics[:, 3:].masked_fill_(labels < 0, -INF)
    ignored_and_ours(labels, statistics)
    compare(formula, statistics, labels, reduction, device, margin="both", smoothing=0.1, ignore_index=-1)
    compare(formula, statistics[:, 1:4], labels[:, 0].relu(), reduction, device, torch.rand(CLASSES), margin="angle")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@each_margin
@one_of_each
def test_special_rows(formula, margin, smoothing, device):
    """Rows of a kind that forward gives: without negatives, masked, with NaN and infinities, of no label at all."""
    softmax = formula.family == "softmax"
    empty = -INF if softmax else 0.0
    nothing = (0.0, empty, 0.0)
    rows = {  # m, l or neg, s, the labels' logits
        (*nothing, 3.0, 1.0, -INF): (4, 9, -1),
        (*nothing, 3.0, -INF, -INF): (4, -1, -1),
        (*nothing, -INF, -INF, -INF): (4, 9, 11),  # of another shard, or masked
        (1.0, 2.0, -INF, 3.0, -INF, 0.0): (4, 9, 11),
        (1.0, 2.0, -9.0, -INF, -INF, -INF): (-1, -1, -1),
        (1000.0, 5.0, -90.0, 1003.0, 990.0, 900.0): (4, 9, 11),
        (-80.0, 2.0, -9.0, 80.0, -80.0, 0.0): (4, 9, 11),
        (80.0, 2.0, -900.0, -80.0, -80.0, -INF): (4, 9, -1),
        (1.0, NAN, 2.0, 3.0, NAN, 1.0): (4, 9, 11),
        (NAN, NAN, NAN, 3.0, 4.0, 1.0): (4, 9, 11),
        (1.0, NAN, 2.0, -INF, -INF, -INF): (-1, -1, -1),
        (NAN,) * 6: (4, 9, 2**40),
        (NAN,) * 5 + (0.0,): (-7, 4, 9),
    }  # fmt: skip
    if not softmax:
        rows |= {(1.0, 2.0, 3.0, INF, 1.0, -INF): (4, 9, -1), (INF, INF, INF, 1.0, 2.0, 3.0): (4, 9, 11)}
    statistics, labels = torch.tensor(list(rows)), torch.tensor(list(rows.values()))
    weights = (None, torch.tensor([[1.0, 0.0, 0.5]]).expand(len(rows), 3))
    for weight, ignore_index in zip(weights, (-1, None), strict=True):
        for reduction in ("none", "mean"):
            compare(
                formula, statistics, labels, reduction, device, weight, margin, smoothing, ignore_index=ignore_index
            )
    if margin != "none":
        index = torch.cat((statistics[:, :2], statistics[:, 3:4]), dim=1)
        compare(formula, index, labels[:, 0].abs(), "none", device, margin=margin)


@one_of_each
def test_ignored_rows_are_0(formula, device):
    statistics, labels = torch.zeros((3, 5)), torch.full((3, 2), -1)
    for reduction, expected in (("none", [0.0, 0.0, 0.0]), ("sum", 0.0), ("mean", NAN)):
        loss, coefficients = compare(
            formula, statistics, labels, reduction, device, margin="angle", smoothing=0.1, ignore_index=-1
        )
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
        assert not coefficients.any()


@each_reduction
@one_of_each
def test_no_rows(formula, reduction, device):
    labels, statistics = torch.empty((0, 2), dtype=torch.int64), torch.empty((0, 5))
    compare(formula, statistics, labels, reduction, device, smoothing=0.1)


def test_a_label_that_is_all_of_the_sum(device):
    """The other labels' sum is no difference from it."""
    statistics = torch.tensor([[0.0, -INF, 0.0, 200.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0, 90.0, 2.0]])
    loss, coefficients = compare(CE, statistics, torch.tensor([[1, 2, 3]] * 2), "none", device)
    assert loss.isfinite().all() and coefficients[:, 3].abs().min() > 1e-9


def test_layouts(device):
    """Labels, weights and statistics of any stride."""
    spread, weight = torch.full((10, 9), -1), torch.rand((3, 5))
    spread[::2, ::3] = make_labels(5, 3, CLASSES)
    statistics = statistics_of(CRL, 5, 3, labels=True).t().contiguous().t()
    compare(CRL, statistics, spread[::2, ::3], "none", device, weight.t(), "both", 0.1)
    one = torch.tensor([[7]]).expand(5, 1)
    compare(CRL, statistics[:, :4], one, "sum", device, weight.t()[:, :1], "both", 0.1)


@one_of_each
def test_launches(formula, device, monkeypatch):
    """One, and one more for a reduction; with too many labels the matrices of plain PyTorch."""
    launched, honest = [], gpu.launch
    monkeypatch.setattr(
        gpu, "launch", lambda kernel, *rest, **named: launched.append(kernel) or honest(kernel, *rest, **named)
    )
    assert finish_labels._MOST_LABELS == 64
    monkeypatch.setattr(finish_labels, "_MOST_LABELS", 4)
    for places, reduction in itertools.product((4, 5), REDUCTIONS):
        labels = torch.arange(places * 3).view(3, places) % CLASSES
        statistics = statistics_of(formula, 3, places, labels=True)
        compare(formula, statistics, labels, reduction, device, margin="angle")
        assert len(launched) == (places == 4) * (1 if reduction == "none" else 2)
        launched.clear()
