"""Margins, smoothing and labels where logits are infinite, NaN, or far from 0."""

import math

import pytest
import torch
import torch.nn.functional as F

import fused_losses as fl
import paper
from cases import CE, CRL, HS_LR, LOGISTIC, LR, NLLR, SOFTMAX, SS_LR, assert_as_accurate, each, value_and_grad
from options import CLASSES, EVERY_LOSS, INDEX, OWN, ROWS, SCALE, SMOOTHED, Case, make_logits, make_target, make_weight

INF = math.inf
LABELLED = ("class indices", "two labels", "padding")


def options_of(loss, margin=True) -> dict:
    smoothing = {"label_smoothing": 0.1} if loss in SMOOTHED else {}
    return {"k": 5, "reduction": "none", **smoothing} | ({"margin": fl.Margin(cosine=0.25)} if margin else {})


@pytest.mark.parametrize("offset", [1000.0, -1000.0, 3e4])
@pytest.mark.parametrize("form", ["class indices", "two labels"])
@each((*SOFTMAX, OWN))
def test_offsets_cost_no_digits(loss, form, offset):
    """Logits that float32 holds exactly, far away, with weights whose sum is 1: the values are those near 0."""
    logits, upstream = (make_logits() * 64).round() / 64, torch.linspace(-1, 2, ROWS)
    for k in (None, 5):
        case = Case(loss, form, label_smoothing=0.1, k=k, dtype=torch.float32)
        ours = value_and_grad(case.ours, (logits + offset).float(), upstream)
        near = value_and_grad(case.yardstick, logits.float(), upstream)
        true = value_and_grad(case.truth, logits, upstream)
        for what, *three in zip(("value", "gradient"), ours, near, true, strict=True):
            assert_as_accurate(*three, what)


@pytest.mark.parametrize("k", [None, 39])
@pytest.mark.parametrize("form", ["class indices", "two labels"])
def test_a_masked_class_and_smoothing_are_torchs(form, k):
    """Smoothing puts mass on a class that cannot be: +inf, as torch, whose gradient is still p - q."""
    logits = make_logits()
    logits[0, 33] = logits[3, [1, 2]] = -INF
    target = make_target(form)
    dense = target if form == "class indices" else torch.zeros_like(logits).scatter(1, target.index, target.weight)
    given = {"label_smoothing": 0.1, "reduction": "none"}
    value, grad = value_and_grad(lambda z: fl.cross_entropy(z, target, k=k, **given), logits, torch.ones(ROWS))
    torchs, of_torch = value_and_grad(lambda z: F.cross_entropy(z, dense, **given), logits, torch.ones(ROWS))
    assert value[0] == value[3] == INF
    torch.testing.assert_close(value, torchs)
    torch.testing.assert_close(grad, of_torch)


@pytest.mark.parametrize("form", LABELLED)
@each(EVERY_LOSS)
def test_masked_negatives_without_smoothing(loss, form):
    """They count nothing: the same as far below all others. Means over S count them."""
    logits = make_logits()
    logits[:, 33:36] = -INF
    far = logits.masked_fill(logits == -INF, -600)
    for k in loss.ks(None, 5, 39):
        given = {"k": k, "reduction": "none", "margin": fl.Margin(0.25, 0.125, SCALE)}
        value, grad = value_and_grad(lambda z: loss(z, make_target(form), **given), logits, torch.ones(ROWS))
        near, of_near = value_and_grad(lambda z: loss(z, make_target(form), **given), far, torch.ones(ROWS))
        torch.testing.assert_close(value, near)
        torch.testing.assert_close(grad, of_near)


@each((*SOFTMAX, LR, HS_LR, SS_LR))
def test_a_masked_label_is_infinitely_wrong(loss):
    """Slope and value as for a plain target at -inf, with a margin and among other labels; others are untouched."""
    logits = make_logits()
    logits[0, 7] = -INF
    for target in (make_target("class indices"), make_target("two labels")):
        for margin in ({}, {"margin": fl.Margin(cosine=0.25)}, {"margin": fl.Margin(0.5, 0.1, SCALE)}):
            value, grad = value_and_grad(
                lambda z: loss(z, target, k=5, reduction="none", **margin), logits, torch.ones(ROWS)
            )
            assert value[0] == INF and value[1:].isfinite().all()
            assert grad[1:].isfinite().all() and not grad[0, [j for j in range(CLASSES) if j != 7]].isnan().any()


@each((*SOFTMAX, OWN))
def test_a_masked_label_of_weight_0_counts_nothing(loss):
    """0 times infinity: the loss is that of the other labels."""
    logits, index = make_logits(), torch.tensor([[7, 8]] * ROWS)
    logits[:, 8] = -INF
    labels = fl.Labels(index, torch.tensor([[1.0, 0.0]] * ROWS))
    for k in (None, 5):
        value, grad = value_and_grad(lambda z: loss(z, labels, k=k, reduction="none"), logits, torch.ones(ROWS))
        alone, of_alone = value_and_grad(
            lambda z: loss(z, index[:, 0], k=k, reduction="none"), logits, torch.ones(ROWS)
        )
        torch.testing.assert_close(value, alone)
        torch.testing.assert_close(grad, of_alone)


@pytest.mark.parametrize("nan", ["label", "negative"])
@pytest.mark.parametrize("form", LABELLED)
@each(EVERY_LOSS)
def test_nan_takes_its_row_and_no_other(loss, form, nan):
    clean = make_logits()
    logits = clean.clone()
    logits[3, 39 if nan == "label" else 17] = math.nan
    others = [0, 1, 2, 4, 5]
    for k in loss.ks(None, 5):
        given = options_of(loss) | {"k": k}
        value, grad = value_and_grad(lambda z: loss(z, make_target(form), **given), logits, torch.ones(ROWS))
        fine, of_fine = value_and_grad(lambda z: loss(z, make_target(form), **given), clean, torch.ones(ROWS))
        assert value[3].isnan() and grad[3].isnan().all()
        torch.testing.assert_close(value[others], fine[others])
        torch.testing.assert_close(grad[others], of_fine[others])


@each((*SOFTMAX, OWN))
def test_ignored_rows_may_hold_anything(loss):
    for form, ignored in (("class indices", [2]), ("rows without labels", [1, 4])):
        logits = make_logits()
        logits[ignored] = torch.tensor([math.nan, INF, -INF] * 14)[:CLASSES].double()
        angle = torch.full((ROWS,), 0.25, dtype=torch.float64)
        angle[ignored] = math.nan
        given = options_of(loss) | {"margin": fl.Margin(angle, 0.1, SCALE)}
        value, grad = value_and_grad(lambda z: loss(z, make_target(form), **given), logits, torch.ones(ROWS))
        assert (value[ignored] == 0).all() and (grad[ignored] == 0).all()
        assert value.isfinite().all() and grad.isfinite().all()
        mean, of_mean = value_and_grad(lambda z: loss(z, make_target(form), **(given | {"reduction": "mean"})), logits)
        assert mean.isfinite() and (of_mean[ignored] == 0).all() and of_mean.isfinite().all()


def test_no_negatives_at_all():
    """All classes are labels, or all others are masked: the values of a softmax over the labels alone."""
    logits = make_logits()[:, :3]
    index = torch.tensor([[0, 1, 2]] * ROWS)
    weight = torch.tensor([[0.5, 0.25, 0.25]] * ROWS, dtype=torch.float64)
    labels, judge = fl.Labels(index, weight), paper.several_labels(index, weight)
    for loss in (CE, NLLR, CRL, OWN):
        one = lambda z, y: loss.paper(z, y, None, **loss.hypers[0])  # noqa: E731
        for k in (None, 2):
            torch.testing.assert_close(
                value_and_grad(lambda z: loss(z, labels, k=k, label_smoothing=0.1), logits),
                value_and_grad(lambda z: paper.softmax_rows(one, z, judge, label_smoothing=0.1).mean(), logits),
            )
    wide = F.pad(logits, (0, 5), value=-INF)
    value, grad = value_and_grad(lambda z: fl.cross_entropy(z, labels), wide)
    few, of_few = value_and_grad(lambda z: fl.cross_entropy(z, labels), logits)
    torch.testing.assert_close((value, grad[:, :3]), (few, of_few))
    assert (grad[:, 3:] == 0).all()


@each(LOGISTIC)
def test_one_class_and_it_is_a_label(loss):
    logits = make_logits()[:, :1]
    labels = fl.Labels(torch.zeros(ROWS, 1, dtype=torch.long), torch.full((ROWS, 1), 0.75))
    value, grad = value_and_grad(lambda z: loss(z, labels, k=1, reduction="none"), logits, torch.ones(ROWS))
    expected, of_expected = value_and_grad(
        lambda z: F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.75), reduction="none").squeeze(1),
        logits, torch.ones(ROWS),
    )  # fmt: skip
    torch.testing.assert_close((value, grad), (expected, of_expected))


@each(EVERY_LOSS)
def test_no_rows(loss):
    labels = fl.Labels(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    for target in (labels, torch.zeros(0, dtype=torch.long)):
        given = options_of(loss) | {"margin": fl.Margin(torch.zeros(0), 0.0, SCALE)}
        assert loss(torch.zeros(0, CLASSES), target, **given).shape == (0,)
        value, grad = value_and_grad(
            lambda z: loss(z, target, **(given | {"reduction": "mean"})), torch.zeros(0, CLASSES)
        )
        assert value.isnan() and grad.shape == (0, CLASSES)


def test_more_labels_than_classes():
    """Duplicates and empty places may outnumber the classes."""
    index = torch.tensor([[0, 1, 0, -1, 2, 1, 1]] * ROWS)
    weight = torch.full((ROWS, 7), 0.125, dtype=torch.float64)
    logits, judge = make_logits()[:, :4], paper.several_labels(index, weight)
    for loss in EVERY_LOSS:
        if loss.family == "softmax":
            one = lambda z, y: loss.paper(z, y, None, **loss.hypers[0])  # noqa: E731
            expected = paper.softmax_rows(one, logits, judge, 5)
        else:
            expected = paper.logistic_rows(logits, judge, 5, **loss.hypers[0])
        torch.testing.assert_close(loss(logits, fl.Labels(index, weight), k=5, reduction="none"), expected)


@each((CE, OWN, LR))
def test_a_bad_class_with_smoothing_or_a_margin(loss):
    for bad in (CLASSES, -1, -7):
        target = torch.tensor([7, 12, bad, 39, 20, 3])
        for given in ({"label_smoothing": 0.1}, {"margin": fl.Margin(cosine=0.1)}, {"label_smoothing": 0.1, "k": 3}):
            with pytest.raises(IndexError, match=str(bad)):
                loss(make_logits(), target, **given)


def test_half_precision_overflows_to_infinity():
    """GradScaler must see it."""
    logits = make_logits(torch.float16)
    labels = fl.Labels(torch.tensor(INDEX["two labels"]), make_weight("two labels"))
    _, grad = value_and_grad(lambda z: 1e6 * fl.cross_entropy(z, labels, label_smoothing=0.1, reduction="sum"), logits)
    assert grad.isinf().any() and not grad.isnan().any()


def test_a_masked_target_is_infinite_with_smoothing_too():
    logits = torch.randn(3, 5, dtype=torch.float64)
    logits[0, 2], logits[1, 0] = -torch.inf, -torch.inf
    target = torch.tensor([2, 2, 1])
    expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    assert expected.tolist()[:2] == [torch.inf] * 2
    torch.testing.assert_close(fl.cross_entropy(logits, target, reduction="none", label_smoothing=0.1), expected)
    for loss in (fl.nllr_loss, fl.crl_loss, fl.lr_loss):
        found = loss(logits, target, reduction="none", label_smoothing=0.1)
        assert found[:2].tolist() == [torch.inf] * 2 and found[2].isfinite()
