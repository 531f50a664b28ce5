"""The edges of the mathematics: extreme margins and offsets, infinities, NaN, rows and batches with nothing in them."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F

import fused_losses as fl
import paper
from cases import (
    CE,
    CRL,
    DTYPES,
    HS_LR,
    LOGISTIC,
    LOSSES,
    LR,
    NLLR,
    SOFTMAX,
    SS_LR,
    assert_elementwise,
    compute_dtype,
    each,
    each_form,
    make_index,
    make_logits,
    make_multihot,
    signed_nan,
    value_and_grad,
)

INF, NAN = math.inf, math.nan

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rows_and_grad(loss, logits, target, **options):
    return value_and_grad(lambda z: loss(z, target, reduction="none", **options), logits)


# --- margins ----------------------------------------------------------------------------------------------------------


def exact(loss: str, margin: float, alpha: float = 0.0, beta: float = 0.0) -> tuple[Decimal, Decimal]:
    """Value and slope at p = 1 / (1 + e^-d) in 250 digits, from -log p + beta log(alpha + 1 - p) and its derivative."""
    with localcontext() as context:
        context.prec = 250
        d, a, b = Decimal(margin), Decimal(alpha), Decimal(beta)
        p = 1 / (1 + (-d).exp())
        q = 1 - p
        if loss == "nllr_loss":
            return q.ln() - p.ln(), Decimal(-1)
        if loss == "cross_entropy":
            return -p.ln(), -q
        competing = b * (a + q).ln() if b else Decimal(0)
        return -p.ln() + competing, -q - b * p * q / (a + q)


MARGINS = [-200, -88.5, -40, -21, -17, -5, -1, -1e-3, 0, 1e-3, 0.5, 5, 17, 21, 36, 40, 88.5, 103, 200]
EXACT = [(CE, {}), (NLLR, {})] + [
    (CRL, {"alpha": alpha, "beta": beta})
    for alpha in (0.0, 1e-30, 1e-3, 0.3, 1.0, 1.5, 1e4)
    for beta in (0.0, 0.25, 1.0, 3.0)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss, hyper", EXACT, ids=lambda x: x.name if hasattr(x, "name") else str(list(x.values())))
def test_every_margin_to_full_precision(loss, hyper, dtype):
    """Two classes: the margin is z_0 - z_1 exactly. Value and slope right to their own last digits, in both tails."""
    margins = torch.tensor(MARGINS, dtype=dtype)
    logits = torch.stack([margins, torch.zeros_like(margins)], dim=1)
    value, grad = rows_and_grad(loss, logits, torch.zeros(len(MARGINS), dtype=torch.long), **hyper)
    truth = [exact(loss.name, d, **hyper) for d in margins.tolist()]
    true_value, true_slope = torch.tensor([[float(v), float(s)] for v, s in truth], dtype=torch.float64).unbind(1)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    # the value may be a difference of two terms of the size of |d| and beta |log|: relative to these
    terms = sum(abs(v) for v in (true_value, beta_term(loss, margins.double(), **hyper)))
    assert worst(value - true_value, 8 * eps * terms + tiny) <= 1
    # one rounding of the margin, |d| eps, is a relative error of that size in the slope's tails
    bound = (8 + margins.abs()) * eps * true_slope.abs() + tiny
    assert worst(grad[:, 0] - true_slope, bound) <= 1
    assert worst(grad[:, 1] + true_slope, bound) <= 1


def worst(error, bound) -> float:
    return (error.double().abs() / bound).max().item()


def beta_term(loss, margins, alpha=0.0, beta=0.0):
    return beta * torch.log(alpha + torch.sigmoid(-margins)) if loss is CRL and beta else torch.zeros_like(margins)


@dtypes
@pytest.mark.parametrize("z", [-200.0, -88.5, -30.0, -21.0, -17.0, -1.0, 0.0, 1.0, 17.0, 21.0, 30.0, 88.5, 200.0])
@each(LOGISTIC)
def test_saturated_logits_keep_their_gradient(loss, z, dtype):
    """Where the authors' eps takes it away: a positive at -30 is pulled with 1, a negative at 30 pushed with 1."""
    for logits in (torch.tensor([[z, 0.5, -2.0]]), torch.tensor([[0.5, z, -2.0]]), torch.tensor([[-2.0, z, z]])):
        logits = logits.to(dtype)
        for hyper in loss.hypers:
            value, grad = rows_and_grad(loss, logits, torch.tensor([0]), k=2, **hyper)
            true_value, true_grad = value_and_grad(
                lambda x, h=hyper: loss.paper(x, torch.tensor([0]), 2, **h), logits.double()
            )
            assert_elementwise(value, true_value, "value")
            assert_elementwise(grad, true_grad, "gradient")


# --- offsets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 3, 30])
@pytest.mark.parametrize(
    "dtype, offset",
    [
        (torch.float64, 6e4),
        (torch.float32, 1e3),
        (torch.float32, -1e3),
        (torch.float16, 6e4),
        (torch.float16, 1e3),
        (torch.bfloat16, 6e4),
    ],
    ids=str,
)
@each(SOFTMAX)
def test_softmax_losses_ignore_a_common_offset(loss, dtype, offset, k):
    """As exactly as the shifted logits themselves are: m + l in one float32 number would lose two digits at 1000."""
    target = make_index(4, 100)
    logits = make_logits(4, 100)
    logits[range(2), target[:2]] += 12  # sure of the first two: their slopes lie in the tail
    logits = (logits + offset).to(dtype)  # rounded here, once
    centred = (logits.double() - offset).to(compute_dtype(dtype))  # exact
    for hyper in loss.hypers:
        value, grad = rows_and_grad(loss, logits, target, k=k, **hyper)
        expected, expected_grad = rows_and_grad(loss, centred, target, k=k, **hyper)
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(value, expected, rtol=16 * eps, atol=16 * eps)
        assert_elementwise(grad, expected_grad.double(), "gradient")


@dtypes
@each(LOGISTIC)
def test_logistic_losses_far_out(loss, dtype):
    """All logits at 6e4 or -6e4: finite, and with the limit's slope."""
    target = torch.tensor([0, 1])
    logits = torch.tensor([[6e4] * 5, [-6e4] * 5], dtype=dtype)
    _, grad = rows_and_grad(loss, logits, target, k=2)
    share = 1 if loss is LR else 1 / 2
    assert grad[0].tolist() == [0, share, share, 0, 0]
    assert grad[1].tolist() == [0, -1, 0, 0, 0]
    value = loss(logits, target, k=2, reduction="none")
    z = float(logits[0, 0])
    torch.testing.assert_close(value, torch.tensor([2 * z if loss is LR else z, z], dtype=value.dtype))


# --- infinities -------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("k", [None, 2, 4, 8])
@each(LOSSES)
def test_masked_negatives_count_nothing_and_get_nothing(loss, dtype, k):
    """A -inf class adds 0 to every sum; if picked it counts in |S|, after all finite ones."""
    if k is None and loss.needs_k:
        k = 9
    logits, target = make_logits(4, 9, dtype), torch.tensor([0, 1, 2, 3])
    logits[:, 5:] = -INF
    value, grad = rows_and_grad(loss, logits, target, k=k)
    expected, expected_grad = rows_and_grad(loss, logits[:, :5], target, k=k and min(k, 4))
    chosen, finite = min(k or 8, 8), min(k or 4, 4)
    if loss in (HS_LR, SS_LR):  # the mean's count
        positive = F.softplus(-logits.gather(1, target[:, None]).squeeze(1).to(value.dtype))
        expected = positive + (expected - positive) * finite / chosen
        of_target = F.one_hot(target, 5).bool()
        expected_grad = torch.where(of_target, expected_grad, expected_grad.double() * finite / chosen).to(dtype)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, :5], expected_grad, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-7)
    assert (grad[:, 5:] == 0).all()


@dtypes
@each(LOSSES)
def test_masked_target_is_infinitely_wrong(loss, dtype):
    """Loss +inf, slope -1, as torch."""
    logits = make_logits(2, 6, dtype)
    logits[0, 3] = -INF
    for k in (2, 5):
        for hyper in loss.hypers:
            value, grad = rows_and_grad(loss, logits, torch.tensor([3, 3]), k=k, **hyper)
            assert value[0] == INF
            assert value[1].isfinite()
            assert grad[0, 3] == -1
            assert grad.isfinite().all()
    torchs = F.cross_entropy(logits.float(), torch.tensor([3, 3]), reduction="none")
    assert torchs[0] == INF


# loss: value and dz_y at d = +inf
SURE = {
    "cross_entropy": [({}, 0.0, 0.0)],
    "nllr_loss": [({}, -INF, -1.0)],
    "crl_loss": [
        ({"alpha": 1.5, "beta": 1.0}, math.log(1.5), 0.0),
        ({"alpha": 0.25, "beta": 2.0}, 2 * math.log(0.25), 0.0),
        ({"alpha": 0.0, "beta": 1.0}, -INF, -1.0),
        ({"alpha": 0.0, "beta": 0.25}, -INF, -0.25),
        ({"alpha": 0.0, "beta": 0.0}, 0.0, 0.0),
        ({"alpha": 2.0, "beta": 0.0}, 0.0, 0.0),
    ],
}


@dtypes
@pytest.mark.parametrize("shape", ["one class", "all others masked"])
@pytest.mark.parametrize("k", [None, 1, 3])
@each([loss for loss in SOFTMAX if loss.name in SURE])
def test_no_negatives_above_minus_inf(loss, k, shape, dtype):
    """d = +inf: the value and the slope are the limits, the negatives' gradient is 0."""
    logits = torch.tensor([[0.7]] if shape == "one class" else [[0.7, -INF, -INF, -INF]], dtype=dtype)
    for hyper, value_there, slope_there in SURE[loss.name]:
        value, grad = rows_and_grad(loss, logits, torch.tensor([0]), k=k, **hyper)
        torch.testing.assert_close(value, torch.tensor([value_there], dtype=value.dtype))
        assert grad[0, 0] == slope_there
        assert (grad[0, 1:] == 0).all()


@each(SOFTMAX)
def test_all_logits_masked_is_nan(loss):
    for classes, k in ((1, None), (4, None), (4, 2), (100, 1)):
        logits = torch.full((2, classes), -INF)
        logits[1] = make_logits(1, classes, torch.float32)[0]
        value, grad = rows_and_grad(loss, logits, torch.tensor([0, 0]), k=k)
        assert value[0].isnan()
        assert grad[0].isnan().all()
        assert not grad[1].isnan().any()


@dtypes
@pytest.mark.parametrize("where", ["target", "negative", "both"])
@each(SOFTMAX)
def test_plus_inf_makes_a_softmax_row_nan(loss, where, dtype):
    """As torch: inf - inf. The other rows are untouched."""
    for k in (None, 1, 4):
        logits, target = make_logits(3, 9, dtype), torch.tensor([2, 2, 2])
        clean, clean_grad = rows_and_grad(loss, logits, target, k=k)
        logits[1, {"target": [2], "negative": [5], "both": [2, 5]}[where]] = INF
        value, grad = rows_and_grad(loss, logits, target, k=k)
        assert value[1].isnan()
        assert grad[1].isnan().all()
        assert torch.equal(value[[0, 2]], clean[[0, 2]])
        assert torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


@dtypes
@each(LOGISTIC)
def test_plus_inf_is_the_limit_in_a_logistic_row(loss, dtype):
    logits = torch.tensor([[INF, 0.5, -1.0, -2.0], [0.5, INF, -1.0, -2.0]], dtype=dtype)
    for k in (2, 3):
        for hyper in loss.hypers:
            if hyper.get("alpha") == 0:  # 0 * inf
                continue
            value, grad = rows_and_grad(loss, logits, torch.tensor([0, 0]), k=k, **hyper)
            share = hyper.get("alpha", k) / k
            assert value[0].isfinite()  # a target at +inf costs nothing
            assert grad[0, 0] == 0
            assert value[1] == INF  # a negative at +inf
            torch.testing.assert_close(grad[1, 1], torch.tensor(share, dtype=dtype))
            assert grad.isfinite().all()


def test_gamma_at_minus_inf_weighs_as_its_formula_says():
    """gamma = 0 weighs exactly 1, and -inf adds nothing at any gamma."""
    logits = torch.tensor([[0.0, -INF, 3.0]])
    for gamma in (0.0, 0.5, 2.0):
        value, grad = rows_and_grad(SS_LR, logits, torch.tensor([0]), gamma=gamma, alpha=2.0)
        true_value, true_grad = value_and_grad(
            lambda z, g=gamma: paper.ss_lr(z, torch.tensor([0]), alpha=1.0, gamma=g), logits[:, [0, 2]].double()
        )
        assert_elementwise(value, true_value, "value")
        assert_elementwise(grad[:, [0, 2]], true_grad, "gradient")
        assert grad[0, 1] == 0


# --- NaN --------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("sign", [1, -1], ids=["nan", "minus-nan"])
@each(LOSSES)
def test_nan_spoils_its_row_whole_and_no_other(loss, sign, dtype):
    """Also where the NaN is not among the hardest, and in the compact form (k = 1 of 100)."""
    for k in loss.ks(None, 1, 50, 99):
        for column in (0, 17, 99):  # the target, and two others
            logits, target = make_logits(3, 100, dtype), torch.tensor([0, 0, 0])
            clean, clean_grad = rows_and_grad(loss, logits, target, k=k)
            logits[1, column] = signed_nan(sign, dtype)
            value, grad = rows_and_grad(loss, logits, target, k=k)
            assert value[1].isnan()
            assert grad[1].isnan().all()
            assert torch.equal(value[[0, 2]], clean[[0, 2]])
            assert torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


@pytest.mark.parametrize("sign", [1, -1], ids=["nan", "minus-nan"])
@each(LOGISTIC)
def test_nan_in_a_multihot_row(loss, sign):
    for k in loss.ks(None, 1, 50):
        logits, target = make_logits(4, 100, torch.float32), make_multihot(4, 100)
        clean, clean_grad = rows_and_grad(loss, logits, target, k=k)
        logits[1, 17] = signed_nan(sign, torch.float32)
        value, grad = rows_and_grad(loss, logits, target, k=k)
        assert value[1].isnan()
        assert grad[1].isnan().all()
        assert torch.equal(value[[0, 2, 3]], clean[[0, 2, 3]])
        assert torch.equal(grad[[0, 2, 3]], clean_grad[[0, 2, 3]])


@each(LOSSES)
def test_nan_row_makes_the_mean_nan_but_not_the_other_gradients(loss):
    logits, target = make_logits(3, 20), make_index(3, 20)
    _, clean_grad = value_and_grad(lambda z: loss(z, target, k=3), logits)
    logits[1, 4] = NAN
    value, grad = value_and_grad(lambda z: loss(z, target, k=3), logits)
    assert value.isnan()
    assert grad[1].isnan().all()
    torch.testing.assert_close(grad[[0, 2]], clean_grad[[0, 2]])


# --- rows and batches with nothing in them ----------------------------------------------------------------------------


@pytest.mark.parametrize("filling", [NAN, -NAN, INF, -INF, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each(LOSSES)
def test_ignored_rows_are_zeros_whatever_they_hold(loss, reduction, filling):
    logits, target = make_logits(4, 100, torch.float32), torch.tensor([-100, 3, -100, 5])
    logits[[0, 2]] = filling
    for k in loss.ks(None, 1, 50):
        for weight in (None, torch.ones(100)):
            options = {"k": k, "reduction": reduction, "weight": weight}
            value, grad = value_and_grad(lambda z, o=options: loss(z, target, **o), logits)
            expected, expected_grad = value_and_grad(lambda z, o=options: loss(z, target[[1, 3]], **o), logits[[1, 3]])
            assert (grad[[0, 2]] == 0).all()
            torch.testing.assert_close(grad[[1, 3]], expected_grad)
            if reduction == "none":
                assert (value[[0, 2]] == 0).all()
                value = value[[1, 3]]
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("upstream", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each(LOSSES)
def test_ignored_rows_are_zeros_whatever_comes_down(loss, reduction, upstream):
    """Also if their logits are NaN, and if no row counts."""
    for target in (torch.tensor([-100, 3, -100, 5]), torch.full((4,), -100)):
        ignored = target < 0
        logits = make_logits(4, 100, torch.float32)
        logits[0] = NAN
        for k in loss.ks(None, 1, 70):
            for weight in (None, torch.ones(100)):
                z = logits.clone().requires_grad_()
                value = loss(z, target, k=k, reduction=reduction, weight=weight)
                value.backward(torch.full_like(value, upstream))
                assert (z.grad[ignored] == 0).all()
                assert not z.grad[~ignored].isfinite().all(1).any()


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 10**12])
@each(LOSSES)
def test_all_rows_ignored(loss, ignore_index):
    """Mean NaN with a zero gradient, sum 0, as torch."""
    logits, target = make_logits(3, 12, torch.float32), torch.full((3,), ignore_index)
    for k in loss.ks(None, 2):
        mean, of_mean = value_and_grad(lambda z, k=k: loss(z, target, k=k, ignore_index=ignore_index), logits)
        total, of_sum = value_and_grad(
            lambda z, k=k: loss(z, target, k=k, ignore_index=ignore_index, reduction="sum"), logits
        )
        assert mean.isnan()
        assert total == 0
        assert (of_mean == 0).all()
        assert (of_sum == 0).all()


@each_form
def test_empty_batch(loss, form):
    target = torch.empty(0, dtype=torch.long) if form == "index" else torch.empty(0, 12)
    for k in loss.ks(None, 2, 200):
        for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", None)):
            value, grad = value_and_grad(
                lambda z, k=k, r=reduction: loss(z, target, k=k, reduction=r), torch.empty(0, 12)
            )
            assert value.shape == ((0,) if reduction == "none" else ())
            assert grad.shape == (0, 12)
            if expected is not None:
                torch.testing.assert_close(value, torch.tensor(expected), equal_nan=True)


@each(LOSSES)
def test_all_weights_zero(loss):
    """The mean divides by their sum: NaN, as torch."""
    logits, target = make_logits(3, 12), make_index(3, 12)
    k = 3 if loss.needs_k else None
    value = loss(logits, target, k=k, weight=torch.zeros(12, dtype=torch.float64))
    assert value.isnan()
    assert F.cross_entropy(logits, target, weight=torch.zeros(12, dtype=torch.float64)).isnan()


# --- half precision ---------------------------------------------------------------------------------------------------


@each(LOSSES)
def test_overflow_of_a_half_precision_gradient_is_inf(loss):
    """GradScaler must see it. The product is taken in float32 first, so 65536 * slope is whole until the cast."""
    logits, target = torch.zeros(2, 100, dtype=torch.float16), torch.tensor([0, 0])
    logits[0, 0] = -40  # slope -1
    for k in (1, 50):
        _, grad = value_and_grad(lambda z, k=k: loss(z, target, k=k, reduction="sum") * 2.0**17, logits)
        assert grad[0, 0] == -INF
        assert not grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each(LOSSES)
def test_scaled_gradient_is_rounded_once(loss, dtype):
    """A scale of 2^14 applied before the cast saves what the cast alone would flush: entries near 1e-9."""
    logits, target = make_logits(4, 1000, dtype), make_index(4, 1000)
    for k in loss.ks(None, 5, 400):
        _, grad = value_and_grad(lambda z, k=k: loss(z, target, k=k) * 2.0**14, logits)
        _, truth = value_and_grad(lambda z, k=k: loss.paper(z, target, k, **loss.hypers[0]).mean(), logits.double())
        assert_elementwise(grad, truth * 2.0**14, "gradient")


# --- class indices out of range ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [12, -1, -99, 10**15])
@each(LOSSES)
def test_class_out_of_range_raises_torchs_error(loss, bad):
    logits = make_logits(3, 12)
    for k in loss.ks(None, 2):
        with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\."):
            loss(logits, torch.tensor([0, bad, 1]), k=k)
    with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\."):
        F.cross_entropy(logits, torch.tensor([0, bad, 1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each(LOSSES)
def test_class_out_of_range_on_cuda_is_nan_without_a_sync(loss):
    logits, target = make_logits(3, 12, torch.float32).cuda(), torch.tensor([0, 12, -5]).cuda()
    for k in loss.ks(None, 2):
        torch.cuda.set_sync_debug_mode("error")
        try:
            value, grad = rows_and_grad(loss, logits, target, k=k)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert value.isnan().tolist() == [False, True, True]
        assert grad.isnan().all(1).tolist() == [False, True, True]
        assert grad[0].isfinite().all()
        with pytest.raises(IndexError, match="Target 12 is out of bounds"):
            loss(logits, target, k=k, check_targets=True)


def test_one_class_reductions():
    """C = 1 and N = 1 through the public functions."""
    assert fl.cross_entropy(torch.tensor([[3.0]]), torch.tensor([0])) == 0
    assert fl.hs_lr_loss(torch.tensor([[0.0]]), torch.tensor([0]), k=1).item() == pytest.approx(math.log(2))
    assert fl.ss_lr_loss(torch.tensor([[0.0]]), torch.tensor([0])).item() == pytest.approx(math.log(2))
