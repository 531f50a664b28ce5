"""The GPU door ``finish`` against the plain one: rows below, at and above one block of its kernel."""

import math

import pytest
import torch
from gpu_doors import FORMULAS, IGNORED, assert_as_accurate, poisoned
from torch import Tensor

import cases
from doors import CRL, LOGISTIC, LR, SS_LR, Formula
from fused_losses import finish
from fused_losses.gpu import device as gpu
from fused_losses.gpu import doors

INF, NAN = math.inf, math.nan
CLASSES = 50

each_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def statistics_of(formula: Formula, rows: int, multi_hot: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    statistics = 3 * torch.randn((rows, 4 if multi_hot else 3), generator=generator)
    if formula.family == "logistic":
        statistics[:, 1] = statistics[:, 1].abs()
    if multi_hot:
        statistics[:, 2] = statistics[:, 2].abs()
        statistics[:, 3] = torch.randint(CLASSES + 1, (rows,), generator=generator).float()
    return statistics


def compare(formula, statistics, target, reduction, device, weight=None, k=0, ignore_index=IGNORED):
    """-> loss and coefficients, held against the plain finish in the same precision and in float64."""
    spec = formula.spec(CLASSES, k, ignore_index=ignore_index)
    on_device = (None if x is None else x.to(device) for x in (statistics, target, weight))
    ours = [x.cpu() for x in doors.finish(*on_device, reduction, *spec)]
    theirs = finish.finish(statistics, target, weight, reduction, spec)
    weight = None if weight is None else weight.double()
    truth = finish.finish(statistics.double(), target, weight, reduction, spec)
    for name, *of in zip(("loss", "coefficients"), ours, theirs, truth, strict=True):
        assert of[0].shape == of[1].shape and of[0].dtype == torch.float32
        if of[0].shape[:1] > (1000,):  # among so many, some values are the difference of two larger numbers
            of = [x.reshape(1, -1) for x in of]
        assert_as_accurate(*of, f"{formula}: {name}")
    return ours


@each_reduction
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 1024, 2500])
def test_rows(rows, formula, reduction, device):
    target = torch.randint(CLASSES, (rows, 2), generator=torch.Generator().manual_seed(rows))[:, 1]  # of stride 2
    target[1::3] = IGNORED
    statistics = statistics_of(formula, rows, multi_hot=False)
    statistics[1::3] = 0
    compare(formula, statistics, target, reduction, device, k=7)


@each_reduction
@pytest.mark.parametrize("formula", [CRL, SS_LR], ids=str)
def test_class_weights(formula, reduction, device):
    """Of the classes of all shards; a label that is no class is not looked up."""
    target = torch.tensor([0, 49, 7, IGNORED, 50, -1, 2**40])
    statistics = statistics_of(formula, 7, multi_hot=False)
    statistics[4:] = NAN
    weight = torch.rand((CLASSES, 3))[:, 1]
    compare(formula, statistics, target, reduction, device, weight)
    loss, _ = compare(formula, statistics[:4], target[:4], reduction, device, weight)
    assert loss.isfinite().all()


@each_reduction
@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.parametrize("rows", [5, 2500])
@pytest.mark.parametrize("formula", LOGISTIC, ids=str)
def test_multi_hot(formula, rows, k, reduction, device):
    """The means are over the terms of the batch."""
    target = torch.zeros((rows, CLASSES), dtype=torch.bool)  # its entries are not read
    compare(formula, statistics_of(formula, rows, multi_hot=True), target, reduction, device, k=k)


@pytest.mark.parametrize("positives", [0, CLASSES])
def test_a_mean_over_nothing_is_0(positives, device):
    statistics = torch.tensor([[0.0, 3.0, 2.0, positives]]).expand(3, 4)
    for k in (0, 7):
        compare(LR._replace(alpha=2.0), statistics, torch.zeros((3, CLASSES)), "mean", device, k=k)


def test_many_positives_are_counted_exactly(device):
    """What a lane counts is beyond 2^25, where fp32 rounds each 99999 up to a multiple of 4."""
    rows, classes, positives = 600 * 1024, 100_003, 99_999
    statistics = torch.tensor([[0.0, 3.0, 2.0, positives]]).expand(rows, 4)
    spec = LR._replace(alpha=2.0).spec(classes)
    target = torch.zeros((1, 1), dtype=torch.bool, device=device).expand(rows, classes)
    loss, coefficients = doors.finish(statistics.to(device), target, None, "sum", *spec)  # which is not read
    assert coefficients.unique(dim=0).tolist() == [[pytest.approx(x, rel=2e-7) for x in (0.5, -1 / positives)]]
    assert loss.item() == pytest.approx(rows * (2 / positives + 1.5), rel=2e-7)


@pytest.mark.parametrize("formula", [CRL, SS_LR], ids=str)
def test_special_rows(formula, device):
    statistics = torch.tensor([
        [0.0, -INF, 3.0], [0.0, 0.0, -INF], [1000.0, 5.0, 1003.0], [NAN, NAN, 0.0], [1.0, NAN, 0.0], [1.0, 2.0, NAN],
        [-80.0, 2.0, 80.0], [80.0, 2.0, -80.0],
    ])  # fmt: skip
    if formula is SS_LR:
        statistics[0, 1] = INF
    for reduction in ("none", "mean"):
        compare(formula, statistics, torch.arange(8), reduction, device)
    target = torch.full((8,), IGNORED)
    loss, coefficients = compare(formula, statistics, target, "none", device)
    assert not loss.any() and not coefficients.any()


@pytest.mark.parametrize("formula", [CRL, SS_LR], ids=str)
def test_no_label_is_ignored(formula, device):
    target = torch.tensor([IGNORED, 1, 2])
    loss, coefficients = compare(formula, statistics_of(formula, 3, False), target, "none", device, ignore_index=None)
    assert loss.all() and coefficients.all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_reduce(rows, device):
    statistics, target = torch.zeros((rows, 3)), torch.full((rows,), IGNORED)
    for reduction, expected in (("sum", 0.0), ("mean", NAN)):
        loss, coefficients = compare(CRL, statistics, target, reduction, device)
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
        assert not coefficients.any()
    assert compare(CRL, statistics, target, "none", device)[0].shape == (rows,)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_many_equal_rows(reduction, weighted, device):
    """A plain sum of them rounds every time in the same direction."""
    rows = 1_000_003
    statistics, target = torch.zeros((rows, 3)), torch.zeros(rows, dtype=torch.int64)
    weight = torch.full((CLASSES,), 0.7) if weighted else None
    spec = CRL.spec(CLASSES)
    on_device = (None if x is None else x.to(device) for x in (statistics, target, weight))
    loss, _ = doors.finish(*on_device, reduction, *spec)
    same, _ = finish.finish(statistics, target, weight, reduction, spec)
    weight = None if weight is None else weight.double()
    truth, _ = finish.finish(statistics.double(), target, weight, reduction, spec)
    cases.assert_as_accurate(loss.cpu(), same, truth, reduction)


def test_one_launch(device, monkeypatch):
    launched, honest = [], gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda kernel, *rest: launched.append(kernel) or honest(kernel, *rest))
    for reduction in ("none", "mean"):
        compare(CRL, statistics_of(CRL, 2500, False), torch.arange(2500) % CLASSES, reduction, device)
    assert len(launched) == 2


def test_which_statistic_is_nan_is_not_compared():
    assert poisoned(torch.tensor([[1.0, NAN, 2.0], [1.0, 2.0, 3.0]])).isnan().sum() == 3
