"""The GPU door ``finish`` with several labels, smoothing and margins, against the plain one."""

import itertools
import math

import pytest
import torch
from gpu_doors import FORMULAS, IGNORED
from gpu_finish_labels import CLASSES, MARGINS, compare_finish, statistics_of
from gpu_labels import make_labels
from torch import Tensor

from doors import CE, CRL, LR, SS_LR
from fused_losses.gpu import device as gpu
from fused_losses.gpu import finish_labels

INF, NAN = math.inf, math.nan
REDUCTIONS = ("none", "sum", "mean")

each_margin = pytest.mark.parametrize("margin", MARGINS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
one_of_each = pytest.mark.parametrize("formula", [CRL, LR, SS_LR._replace(alpha=3.0)], ids=str)


def ignore_some(labels: Tensor, statistics: Tensor) -> None:
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
    ignore_some(labels, statistics)
    weight = torch.rand((rows, places), generator=torch.Generator().manual_seed(places)) if turn % 4 else None
    compare_finish(formula, statistics, labels, reduction, device, weight, margin, smoothing, k, ignore_index=-1)


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
        compare_finish(formula, statistics, target, reduction, device, weight, margin, k=(0, 7)[turn % 2])
        target[2::9], statistics[2::9] = 2**40, NAN
        target[3::9], statistics[3::9] = -1, NAN
        compare_finish(formula, statistics, target, reduction, device, weight, margin, k=(0, 7)[turn % 2])


@each_reduction
@pytest.mark.parametrize("formula", [CRL, SS_LR._replace(alpha=3.0)], ids=str)
def test_many_rows(formula, reduction, device, monkeypatch):
    """Several programs, which have several blocks each."""
    monkeypatch.setattr(finish_labels, "_MOST_PROGRAMS", 2)
    monkeypatch.setattr(finish_labels, "_WIDE", 256)
    labels = make_labels(700, 2, CLASSES)
    statistics = statistics_of(formula, 700, 2, labels=True)
    statistics[:, 3:].masked_fill_(labels < 0, -INF)
    ignore_some(labels, statistics)
    compare_finish(formula, statistics, labels, reduction, device, margin="both", smoothing=0.1, ignore_index=-1)
    compare_finish(
        formula, statistics[:, 1:4], labels[:, 0].relu(), reduction, device, torch.rand(CLASSES), margin="angle"
    )


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
            compare_finish(
                formula, statistics, labels, reduction, device, weight, margin, smoothing, ignore_index=ignore_index
            )
    if margin != "none":
        index = torch.cat((statistics[:, :2], statistics[:, 3:4]), dim=1)
        compare_finish(formula, index, labels[:, 0].abs(), "none", device, margin=margin)


@one_of_each
def test_ignored_rows_are_0(formula, device):
    statistics, labels = torch.zeros((3, 5)), torch.full((3, 2), -1)
    for reduction, expected in (("none", [0.0, 0.0, 0.0]), ("sum", 0.0), ("mean", NAN)):
        loss, coefficients = compare_finish(
            formula, statistics, labels, reduction, device, margin="angle", smoothing=0.1, ignore_index=-1
        )
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
        assert not coefficients.any()


@each_reduction
@one_of_each
def test_no_rows(formula, reduction, device):
    labels, statistics = torch.empty((0, 2), dtype=torch.int64), torch.empty((0, 5))
    compare_finish(formula, statistics, labels, reduction, device, smoothing=0.1)


def test_a_label_that_is_all_of_the_sum(device):
    """The other labels' sum is no difference from it."""
    statistics = torch.tensor([[0.0, -INF, 0.0, 200.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0, 90.0, 2.0]])
    loss, coefficients = compare_finish(CE, statistics, torch.tensor([[1, 2, 3]] * 2), "none", device)
    assert loss.isfinite().all() and coefficients[:, 3].abs().min() > 1e-9


def test_layouts(device):
    """Labels, weights and statistics of any stride."""
    spread, weight = torch.full((10, 9), -1), torch.rand((3, 5))
    spread[::2, ::3] = make_labels(5, 3, CLASSES)
    statistics = statistics_of(CRL, 5, 3, labels=True).t().contiguous().t()
    compare_finish(CRL, statistics, spread[::2, ::3], "none", device, weight.t(), "both", 0.1)
    one = torch.tensor([[7]]).expand(5, 1)
    compare_finish(CRL, statistics[:, :4], one, "sum", device, weight.t()[:, :1], "both", 0.1)


@one_of_each
def test_launches(formula, device, monkeypatch):
    """One, and one more for a reduction; with too many labels the matrices of plain PyTorch."""
    launched, honest = [], gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda kernel, *rest: launched.append(kernel) or honest(kernel, *rest))
    assert finish_labels._MOST_LABELS == 64
    monkeypatch.setattr(finish_labels, "_MOST_LABELS", 4)
    for places, reduction in itertools.product((4, 5), REDUCTIONS):
        labels = torch.arange(places * 3).view(3, places) % CLASSES
        statistics = statistics_of(formula, 3, places, labels=True)
        compare_finish(formula, statistics, labels, reduction, device, margin="angle")
        assert len(launched) == (places == 4) * (1 if reduction == "none" else 2)
        launched.clear()
