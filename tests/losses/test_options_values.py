"""Margins, label smoothing and several labels against the judge: every loss with each of them, and all together."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

import fused_losses as fl
import paper
from cases import CE, CRL, HS_LR, LOSSES, LR, NLLR, SOFTMAX, SS_LR, each, value_and_grad
from fused_losses import ops
from options import (
    CLASSES,
    EVERY_LOSS,
    FORMS,
    MARGINS,
    OWN,
    ROWS,
    SCALE,
    SMOOTHED,
    Case,
    assert_agrees,
    everything,
    make_logits,
    make_target,
    margin_option,
    matrix,
)
from test_paper import FACES, MIXED, PEERS, peer

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", matrix(), ids=str)
def test_values_and_gradients(case):
    assert_agrees(case)


@pytest.mark.slow
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("form", FORMS)
@each(EVERY_LOSS)
def test_every_combination(loss, form, margin):
    for case in everything():
        if (case.loss, case.form, case.margin) == (loss, form, margin):
            assert_agrees(case)


def test_the_matrix_has_every_pair():
    """Of any two axes, every two values that go together at all, and of loss, labels and margin every three."""

    def pairs(cases):
        fields = ("loss", "form", "margin", "label_smoothing", "k", "dtype", "weighted")
        return {
            pair for case in cases for pair in combinations(((name, str(getattr(case, name))) for name in fields), 2)
        }

    assert pairs(matrix()) == pairs(everything())
    assert len({(str(c.loss), c.form, c.margin) for c in matrix()}) == len(EVERY_LOSS) * len(FORMS) * len(MARGINS)


def combined(loss, **kwargs) -> list[Case]:
    """The loss with a margin of its own for each row and, where it may be, smoothing."""
    smoothing = 0.1 if loss in SMOOTHED else 0.0
    return [Case(loss, form, "per row", smoothing, **kwargs) for form in ("class indices", "padding", "duplicates")]


@pytest.mark.parametrize("k", [None, 5])
@each(LOSSES)
def test_hyper_parameters(loss, k):
    for hyper in loss.hypers[1:]:
        for case in combined(loss, k=k or (39 if loss.needs_k else None), hyper=hyper):
            assert_agrees(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each(EVERY_LOSS)
def test_the_threshold_form(loss, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "keeps_picks", lambda *shape: bool(asked.append(shape)))
    for k in (1, 5, 30):
        for case in combined(loss, k=k, dtype=dtype):
            assert_agrees(case)
    assert asked


@each(EVERY_LOSS)
def test_tied_logits(loss):
    """Labels among equals: neither they nor what their margin makes of them counts in the selection."""
    logits = make_logits().mul(0.5).round()
    for k in (1, 2, 10, 30, 36):
        for case in combined(loss, k=k):
            assert_agrees(case, logits)


@pytest.mark.parametrize("classes", [751, 4099])
@each((CE, CRL, OWN, LR, SS_LR))
def test_many_classes(loss, classes):
    for k in (None, 1, 20, 600):
        for case in combined(loss, k=k)[1:]:
            assert_agrees(case, make_logits(classes=classes))


@each(EVERY_LOSS)
def test_two_classes(loss):
    """More negatives asked for than there are; rows without negatives, of which one label is the other's only rival."""
    logits = make_logits()[:, [0, 1]]
    index = torch.tensor([[0, 1], [1, -1], [1, 0], [0, 0], [-1, 1], [0, -1]])
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64).expand(ROWS, 2)
    judged = paper.several_labels(index, weight)
    hyper = loss.hypers[0]
    for k in loss.ks(None, 1, 9):
        if loss.family == "softmax":
            one = lambda z, y: loss.paper(z, y, None, **hyper)  # noqa: E731
            judge = lambda z: paper.softmax_rows(one, z, judged, k)  # noqa: E731
        else:
            judge = lambda z: paper.logistic_rows(z, judged, k, **hyper)  # noqa: E731
        ours = lambda z: loss(z, fl.Labels(index, weight), k=k, reduction="none")  # noqa: E731
        upstream = torch.linspace(-1, 2, ROWS)
        torch.testing.assert_close(value_and_grad(ours, logits, upstream), value_and_grad(judge, logits, upstream))


# --- margins ----------------------------------------------------------------------------------------------------------


def psi(z, **margin):
    """psi and its derivative of logits (n,), through NLLR in rows whose one negative is 0."""
    rows, target = torch.stack((z, torch.zeros_like(z)), 1), torch.zeros(len(z), dtype=torch.long)
    value, grad = value_and_grad(
        lambda x: -fl.nllr_loss(x, target, margin=fl.Margin(**margin), reduction="none"), rows, torch.ones(len(z))
    )
    return value, grad[:, 0]


@pytest.mark.parametrize("angle", [0.01, 0.5, 1.5, 3.1, -0.01, -0.5, -3.1])
@pytest.mark.parametrize("cosine", [0.0, 0.35, -0.1])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_psi(angle, cosine, scale):
    z = scale * torch.cos(torch.linspace(0.001, 3.14, 300, dtype=torch.float64))
    ours = psi(z, angle=angle, cosine=cosine, scale=scale)
    judge = paper.Margin(angle, cosine, scale)
    true = value_and_grad(lambda x: torch.stack([paper.psi(of_row, judge) for of_row in x]), z)
    torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-11)
    if angle < 2.3:  # a wider angle is never worth more; for larger margins it is, where theta + angle passes pi
        assert (ours[0][1:] <= ours[0][:-1]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("angle", [0.5, -0.5, 3.0])
def test_psi_where_the_angle_is_0_or_pi(angle, dtype):
    """At the ends, and beyond them, where a rounded logit may lie: there the value stays, and the slope is bounded."""
    scale = 8.0
    ends = torch.tensor([scale, -scale], dtype=dtype)
    value, slope = psi(ends, angle=angle, scale=scale)
    judge = [paper.psi(of_row.double(), paper.Margin(angle, 0.0, scale)) for of_row in ends]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), torch.stack(judge), rtol=tolerance, atol=tolerance)
    bound = 1 + 2048 * abs(torch.tensor(angle).sin().item())
    assert (slope.abs() <= bound * 1.001).all()
    beyond = torch.tensor([scale * 1.25, -scale * 1.25], dtype=dtype)
    of_beyond, slope_beyond = psi(beyond, angle=angle, scale=scale)
    torch.testing.assert_close(of_beyond, value)
    assert slope_beyond.isfinite().all() and (slope_beyond.abs() <= bound * 1.001).all()


def test_a_cosine_margin_takes_any_logits():
    """And no angle and no cosine is no margin."""
    logits, target = 30 * make_logits(), make_target("class indices")
    moved = logits - 0.35 * 2 * F.one_hot(target.clamp(min=0), CLASSES)
    for loss in EVERY_LOSS:
        options = {"k": 5, "reduction": "none"}
        ours = loss(logits, target, margin=fl.Margin(cosine=0.35, scale=2), **options)
        torch.testing.assert_close(ours, loss(moved, target, **options))
        ours = loss(logits, target, margin=fl.Margin(cosine=0.7), **options)
        torch.testing.assert_close(ours, loss(moved, target, **options))
        for nothing in (fl.Margin(), fl.Margin(scale=3.0)):
            torch.testing.assert_close(
                value_and_grad(lambda z: loss(z, target, margin=nothing, **options), logits, torch.ones(ROWS)),
                value_and_grad(lambda z: loss(z, target, **options), logits, torch.ones(ROWS)),
            )


@pytest.mark.parametrize("name", ["angle", "cosine", "both", "per row"])
def test_log_odds_take_a_margin(name):
    case = Case(NLLR, "class indices", name)
    for k in (None, 5):
        ours = value_and_grad(
            lambda z: fl.log_odds(z, case.target, k=k, **margin_option(name)), make_logits(), torch.ones(ROWS)
        )
        true = value_and_grad(
            lambda z: -Case(case.loss, case.form, name, k=k).truth(z), make_logits(), torch.ones(ROWS)
        )
        torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_margins_of_rows_come_in_any_dtype_and_stride(dtype):
    logits, target = make_logits(), make_target("class indices")
    angle, cosine = MARGINS["per row"]["angle"], MARGINS["per row"]["cosine"]  # exact in every dtype
    expected = fl.cross_entropy(logits, target, margin=fl.Margin(angle, cosine, SCALE))
    for change in (lambda t: t.to(dtype), lambda t: t.repeat_interleave(2).to(dtype)[::2]):
        assert torch.equal(
            fl.cross_entropy(logits, target, margin=fl.Margin(change(angle), change(cosine), SCALE)), expected
        )
    one = fl.cross_entropy(logits, target, margin=fl.Margin(0.5, 0.25, SCALE))
    every = fl.Margin(torch.full((ROWS,), 0.5), torch.full((ROWS,), 0.25), SCALE)
    torch.testing.assert_close(one, fl.cross_entropy(logits, target, margin=every))


# --- labels -----------------------------------------------------------------------------------------------------------


@each((*SOFTMAX, OWN))
def test_mixup_over_all_negatives_is_the_mean_of_two_calls(loss):
    logits, a, b, lam = make_logits(), torch.tensor([7, 12, 0, 39, 20, 3]), torch.tensor([8, 12, 1, 0, 3, 20]), 0.25
    of = {"reduction": "none"}
    torch.testing.assert_close(
        value_and_grad(lambda z: loss(z, fl.Labels.mixup(a, b, lam), **of), logits, torch.ones(ROWS)),
        value_and_grad(lambda z: lam * loss(z, a, **of) + (1 - lam) * loss(z, b, **of), logits, torch.ones(ROWS)),
    )


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_smoothed_cross_entropy_is_torchs(reduction, dtype, eps):
    logits, target = make_logits(dtype), make_target("class indices")
    upstream = torch.linspace(-1, 2, ROWS) if reduction == "none" else None
    ours, torchs = (
        value_and_grad(lambda z: f(z, target, label_smoothing=eps, reduction=reduction), logits, upstream)
        for f in (fl.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_cross_entropy_of_labels_is_torchs_of_soft_targets(eps):
    logits, labels = make_logits(), torch.tensor([[7, 8, 9]] * ROWS)
    weight = torch.rand(ROWS, 3, dtype=torch.float64).softmax(1)
    dense = torch.zeros_like(logits).scatter(1, labels, weight)
    torch.testing.assert_close(
        value_and_grad(lambda z: fl.cross_entropy(z, fl.Labels(labels, weight), label_smoothing=eps), logits),
        value_and_grad(lambda z: F.cross_entropy(z, dense, label_smoothing=eps), logits),
    )


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_lr_is_torchs_binary_loss_of_soft_targets(eps):
    logits, labels = make_logits(), torch.tensor([[7, 8, 9]] * ROWS)
    weight = torch.rand(ROWS, 3, dtype=torch.float64)
    dense = (1 - eps) * torch.zeros_like(logits).scatter(1, labels, weight) + eps / CLASSES
    torch.testing.assert_close(
        value_and_grad(
            lambda z: fl.lr_loss(z, fl.Labels(labels, weight), label_smoothing=eps, reduction="sum"), logits
        ),
        value_and_grad(lambda z: F.binary_cross_entropy_with_logits(z, dense, reduction="sum"), logits),
    )


@pytest.mark.parametrize("variant", ["timm", "fast-reid"])
def test_the_smoothings_of_the_field(variant):
    """fast-reid spreads eps over the other C - 1 classes: our eps is eps C / (C - 1)."""
    logits, target, eps = make_logits(), torch.tensor([7, 12, 0, 39, 20, 3]), 0.1
    off = eps / (CLASSES if variant == "timm" else CLASSES - 1)
    on = 1 - eps + (off if variant == "timm" else 0)
    q = torch.full_like(logits, off).scatter(1, target[:, None], on)
    ours = eps if variant == "timm" else eps * CLASSES / (CLASSES - 1)
    torch.testing.assert_close(
        fl.cross_entropy(logits, target, label_smoothing=ours), -(q * logits.log_softmax(1)).sum(1).mean()
    )


@each(EVERY_LOSS)
def test_a_label_of_weight_0_is_no_negative(loss):
    logits = make_logits()
    index, weight = torch.tensor([[7, 8]] * ROWS), torch.tensor([[1.0, 0.0]] * ROWS)
    logits[:, 8] = 0.9 * SCALE  # it would be picked
    _, grad = value_and_grad(lambda z: loss(z, fl.Labels(index, weight), k=5, reduction="sum"), logits)
    hardest = logits.index_fill(1, torch.tensor([7, 8]), -torch.inf).topk(5).indices
    touched = torch.zeros_like(logits, dtype=torch.bool).scatter(1, hardest, True)
    touched[:, [7, 8]] = True
    assert (grad[~touched] == 0).all() and (grad[touched] != 0).all()


# --- what other libraries give ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FACES)
def test_margins_are_those_of_pytorch_metric_learning(case):
    x, w = (peer(case, key).clone().requires_grad_() for key in ("input", "weight"))
    scale = float(peer(case, "scale"))
    found = {key: float(peer(case, key)) for key in ("angle", "cosine") if f"{case}/{key}" in PEERS}
    logits = scale * F.normalize(x, dim=1) @ F.normalize(w, dim=1).t()
    value = fl.cross_entropy(logits, peer(case, "target"), margin=fl.Margin(**found, scale=scale))
    value.backward()
    torch.testing.assert_close(value.detach(), peer(case, "value"), rtol=1e-12, atol=0)
    for leaf, key in ((x, "dinput"), (w, "dweight")):
        torch.testing.assert_close(leaf.grad, peer(case, key), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("made", ["mixup", "from_dense"])
def test_smoothing_and_mixed_labels_are_timms(case, made):
    logits, a, b, lam = (peer(case, key) for key in ("logits", "a", "b", "lam"))
    labels = fl.Labels.mixup(a, b, lam) if made == "mixup" else fl.Labels.from_dense(peer(case, "plain_target"), 2)
    eps = float(peer(case, "label_smoothing"))
    value, grad = value_and_grad(lambda z: fl.cross_entropy(z, labels, label_smoothing=eps), logits)
    torch.testing.assert_close(value, peer(case, "value"), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, peer(case, "grad"), rtol=1e-10, atol=1e-14)


@each((HS_LR, SS_LR))
def test_rows_of_the_batch_losses_count_labels(loss):
    """R (pos / all labels + alpha neg / all of S), whatever the weights are."""
    case = Case(loss, "rows without labels", "both", k=5)
    unweighted = Case(loss, "rows without labels", "both", k=5, weighted=False)
    for which in (case, unweighted):
        assert_agrees(which)
        torch.testing.assert_close(which.ours(make_logits(), "mean"), which.truth(make_logits()).mean())
