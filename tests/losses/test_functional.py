"""The functions against the paper: values and gradients, reductions, weight, ignore_index, target forms, strides."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import fused_losses as fl
import paper
from cases import (
    CE,
    CLASSES,
    CRL,
    DTYPES,
    HS_LR,
    LOGISTIC,
    LOSSES,
    LR,
    NLLR,
    SOFTMAX,
    SS_LR,
    assert_as_accurate,
    assert_elementwise,
    compute_dtype,
    each,
    make_index,
    make_logits,
    make_multihot,
    make_target,
    value_and_grad,
)
from fused_losses import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# All negatives, one, few, many (on the CPU still the compact form), most, more than there are.
KS = {1: (None, 1), 2: (None, 1), 3: (None, 1, 2, 9), 10: (None, 1, 3, 7, 9)}
KS |= {classes: (None, 1, classes // 100, classes // 4, 3 * classes // 4) for classes in (751, 1000, 21841)}


def assert_agrees(loss, logits, target, k, hyper, rows_seed=0):
    """Row values and the gradient under a random upstream gradient per row: the tolerance rule, then entry by entry."""
    upstream = torch.randn(len(logits), generator=torch.Generator().manual_seed(rows_seed), dtype=torch.float64)
    value, grad = value_and_grad(lambda z: loss(z, target, k=k, reduction="none", **hyper), logits, upstream)
    eager_value, eager_grad = value_and_grad(lambda z: loss.eager(z, target, k, **hyper), logits, upstream)
    true_value, true_grad = value_and_grad(lambda z: loss.paper(z, target, k, **hyper), logits.double(), upstream)

    assert value.dtype == compute_dtype(logits.dtype)
    assert value.shape == (len(logits),)
    assert grad.dtype == logits.dtype
    assert grad.shape == logits.shape
    assert_as_accurate(value, eager_value, true_value, "value")
    assert_as_accurate(grad, eager_grad, true_grad, "gradient")
    assert_elementwise(value, true_value, "value", atol=1e-5 if value.dtype == torch.float32 else 1e-13)
    assert_elementwise(grad, true_grad, "gradient")
    outside = ~(paper.positives(logits, target) | paper.negatives(logits, target, k))
    assert (grad[outside] == 0).all()


# --- values and gradients ---------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("classes", [c for c in CLASSES if c > 1])
@each(LOSSES)
def test_index_targets(loss, classes, dtype):
    rows = 3 if classes > 10_000 else 6
    logits, target = make_logits(rows, classes, dtype), make_index(rows, classes)
    logits[0, target[0]] += 10  # a confident row
    for k in loss.ks(*KS[classes]):
        for hyper in loss.hypers:
            assert_agrees(loss, logits, target, k, hyper)


@dtypes
@pytest.mark.parametrize("classes", [10, 751, 1000])
@each(LOSSES)
def test_the_threshold_form(loss, classes, dtype, monkeypatch):
    """Which form serves is a matter of speed and differs between devices: both are right for the same k."""
    asked = []
    monkeypatch.setattr(ops, "keeps_picks", lambda *shape: bool(asked.append(shape)))
    logits, target = make_logits(6, classes, dtype), make_index(6, classes)
    logits[0, target[0]] += 10
    for hyper in loss.hypers:
        assert_agrees(loss, logits, target, max(3, classes // 4), hyper)
    assert asked


@dtypes
@pytest.mark.parametrize("classes", CLASSES)
@each(LOGISTIC)
def test_multihot_targets(loss, classes, dtype):
    rows = 3 if classes > 10_000 else 6
    logits, target = make_logits(rows, classes, dtype), make_multihot(rows, classes)
    for k in loss.ks(*KS[classes]):
        for hyper in loss.hypers:
            assert_agrees(loss, logits, target, k, hyper)


@dtypes
@each(LOGISTIC)
def test_one_class_logistic(loss, dtype):
    """C = 1: only the positive term is left. (The softmax losses there: test_edges.)"""
    logits, target = make_logits(6, 1, dtype), torch.zeros(6, dtype=torch.long)
    for k in loss.ks(None, 1):
        for hyper in loss.hypers:
            assert_agrees(loss, logits, target, k, hyper)


@dtypes
@each(LOSSES)
def test_tied_logits(loss, dtype):
    """Rounded to few distinct values, as half precision does with many classes."""
    logits, target = make_logits(8, 60, dtype).round(), make_index(8, 60)
    for k in (1, 2, 10, 30, 58, 59):
        assert_agrees(loss, logits, target, k, loss.hypers[0])


@each(SOFTMAX)
def test_defaults_are_all_negatives_mean_and_the_papers_hyper_parameters(loss):
    logits, target = make_logits(6, 10), make_index(6, 10)
    expected = loss.paper(logits, target, None, **loss.hypers[0]).mean()
    torch.testing.assert_close(loss(logits, target), expected)


@each(LOGISTIC)
def test_defaults_of_the_logistic_family(loss):
    logits, target = make_logits(6, 10), make_index(6, 10)
    k = 3 if loss.needs_k else None
    given = {"k": k} if k else {}
    expected = loss.paper(logits, target, k, **loss.hypers[0]).mean()
    torch.testing.assert_close(loss(logits, target, **given), expected)


def test_signatures():
    """Everything behind the target is keyword-only, and the defaults are the documented ones."""
    common = {
        "k": None,
        "ratio": None,
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "margin": None,
        "check_targets": False,
        "shard": None,
    }
    for loss in LOSSES:
        parameters = inspect.signature(getattr(fl, loss.name)).parameters
        assert list(parameters)[:2] == ["logits", "target"]
        options = {name: p.default for name, p in parameters.items() if name not in ("logits", "target")}
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in options)
        smoothed = {} if loss in (HS_LR, SS_LR) else {"label_smoothing": 0.0}  # these fade out what it would smooth
        assert options == common | smoothed | loss.hypers[0]


def test_values_at_zero_logits():
    """What a user sees in the first step of a training run: the README's table."""
    classes, log2 = 751, torch.tensor(2.0).log().item()
    logits, target = torch.zeros(2, classes), torch.tensor([0, 750])
    log_c = torch.tensor(float(classes)).log().item()
    q = 1 - 1 / classes
    expected = {
        "cross_entropy": log_c,
        "nllr_loss": torch.tensor(classes - 1.0).log().item(),
        "crl_loss": log_c + torch.tensor(1.5 + q).log().item(),
        "lr_loss": classes * log2,
        "hs_lr_loss": 2 * log2,
        "ss_lr_loss": 1.25 * log2,
    }
    for name, value in expected.items():
        given = {"k": 7} if name == "hs_lr_loss" else {}
        assert getattr(fl, name)(logits, target, **given).item() == pytest.approx(value, rel=1e-6)


# --- cross_entropy is torch's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cross_entropy_is_torchs(dtype, reduction, weighted):
    logits, target = make_logits(9, 12, dtype), make_index(9, 12)
    target[2] = target[5] = 7
    weight = torch.rand(12, dtype=dtype, generator=torch.Generator().manual_seed(3)) if weighted else None
    for ignore_index in (-100, 7):
        options = {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
        value, grad = value_and_grad(lambda z, o=options: fl.cross_entropy(z, target, **o), logits)
        torchs, torchs_grad = value_and_grad(lambda z, o=options: F.cross_entropy(z, target, **o), logits)
        torch.testing.assert_close(value, torchs)
        torch.testing.assert_close(grad, torchs_grad)


# --- reductions -------------------------------------------------------------------------------------------------------


def example(loss, dtype=torch.float64):
    """logits, target with ignored rows, options."""
    logits, target = make_logits(9, 12, dtype), make_index(9, 12)
    target[[1, 6]] = -100
    return logits, target, ({"k": 4} if loss.needs_k else {})


@each(LOSSES)
def test_none_gives_one_value_per_row_and_zero_for_ignored_rows(loss):
    logits, target, options = example(loss)
    kept = target != -100
    rows = loss(logits, target, reduction="none", **options)
    assert rows.shape == (9,)
    assert (rows[~kept] == 0).all()
    expected = loss.paper(logits[kept], target[kept], options.get("k"), **loss.hypers[0])
    torch.testing.assert_close(rows[kept], expected)


@pytest.mark.parametrize("k", [None, 4])
@each(LOSSES)
def test_mean_divides_by_the_rows_not_ignored_and_sum_is_that_many_means(loss, k):
    logits, target, options = example(loss)
    options |= {"k": k} if k else {}
    rows, of_rows = value_and_grad(lambda z: loss(z, target, reduction="none", **options), logits)
    mean, of_mean = value_and_grad(lambda z: loss(z, target, **options), logits)
    total, of_sum = value_and_grad(lambda z: loss(z, target, reduction="sum", **options), logits)
    assert mean.shape == total.shape == ()
    torch.testing.assert_close(mean, rows.sum() / 7)
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(of_mean, of_rows / 7)
    torch.testing.assert_close(of_sum, of_rows)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@each(LOSSES)
def test_weight_counts_rows_by_their_class(loss, weight_dtype):
    logits, target, options = example(loss)
    weight = torch.arange(12).mul(0.25).to(weight_dtype)  # exact in every dtype; class 0 counts nothing
    target[0] = 0
    per_row = torch.where(target == -100, 0, weight.double()[target.clamp(min=0)])
    rows, of_rows = value_and_grad(lambda z: loss(z, target, reduction="none", **options), logits)
    for reduction, divisor in (("none", 1), ("sum", 1), ("mean", per_row.sum())):
        value, grad = value_and_grad(
            lambda z, r=reduction: loss(z, target, weight=weight, reduction=r, **options), logits
        )
        expected = per_row * rows if reduction == "none" else (per_row * rows).sum() / divisor
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, per_row[:, None] * of_rows / divisor)


@pytest.mark.parametrize("k", [None, 3])
@each(LOGISTIC)
def test_multihot_reductions(loss, k):
    """Mean over all rows of the paper's rows, whose mean is the authors' batch loss."""
    k = k or (5 if loss.needs_k else None)
    logits, target = make_logits(6, 12), make_multihot(6, 12)
    rows, of_rows = value_and_grad(lambda z: loss.paper(z, target, k, **loss.hypers[0]), logits)
    for reduction, divisor in (("none", 1), ("sum", 1), ("mean", 6)):
        value, grad = value_and_grad(lambda z, r=reduction: loss(z, target, k=k, reduction=r), logits)
        torch.testing.assert_close(value, rows if reduction == "none" else rows.sum() / divisor)
        torch.testing.assert_close(grad, of_rows / divisor)


@pytest.mark.parametrize("missing", ["positives", "negatives"])
@each(LOGISTIC)
def test_multihot_batch_without_positives_or_negatives(loss, missing):
    """A term whose count is 0 is 0."""
    logits = make_logits(4, 7)
    target = torch.full((4, 7), missing == "negatives")
    for k in loss.ks(None, 3):
        for hyper in loss.hypers:
            assert_agrees(loss, logits, target, k, hyper)


@each((HS_LR, SS_LR))
def test_one_hot_rows_equal_index_targets(loss):
    """With one positive per row the batch normalisation is the rows' own."""
    logits, target = make_logits(6, 12), make_index(6, 12)
    one_hot = F.one_hot(target, 12)
    for k in loss.ks(None, 3, 11):
        by_index, of_index = value_and_grad(lambda z, k=k: loss(z, target, k=k), logits)
        by_one_hot, of_one_hot = value_and_grad(lambda z, k=k: loss(z, one_hot, k=k), logits)
        torch.testing.assert_close(by_index, by_one_hot)
        torch.testing.assert_close(of_index, of_one_hot)


def test_lr_is_the_sum_of_torchs_binary_losses():
    logits, multihot = make_logits(6, 12, torch.float32), make_multihot(6, 12)
    expected = F.binary_cross_entropy_with_logits(logits, multihot.float(), reduction="none").sum(1)
    torch.testing.assert_close(fl.lr_loss(logits, multihot, reduction="none"), expected)


# --- targets and logits as they come ----------------------------------------------------------------------------------

INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@each(LOSSES)
def test_index_targets_of_any_integer_dtype(loss, dtype):
    logits, target = make_logits(5, 12), make_index(5, 12)
    options = {"k": 4} if loss.needs_k else {}
    value, grad = value_and_grad(lambda z: loss(z, target.to(dtype), **options), logits)
    expected, expected_grad = value_and_grad(lambda z: loss(z, target, **options), logits)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64,
        torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
    ids=str,
)  # fmt: skip
@each(LOGISTIC)
def test_multihot_targets_of_any_dtype(loss, dtype):
    logits, target = make_logits(5, 12), make_multihot(5, 12)
    value, grad = value_and_grad(lambda z: loss(z, target.to(dtype), k=4), logits)
    expected, expected_grad = value_and_grad(lambda z: loss.paper(z, target, 4, **loss.hypers[0]).mean(), logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)
    x, weight, linear = torch.rand(5, 4), torch.rand(12, 4), loss.linear
    for reduction in ("mean", "none"):
        of_bool, of_dtype = (
            value_and_grad(lambda w, t=t: linear(x, w, t, k=4, reduction=reduction).sum(), weight)
            for t in (target, target.to(dtype))
        )
        assert all(map(torch.equal, of_bool, of_dtype))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each(LOSSES)
def test_a_single_row_without_a_batch(loss, reduction):
    logits, target = make_logits(1, 12), make_index(1, 12)
    for k in loss.ks(None, 4):
        value, grad = value_and_grad(lambda z, k=k: loss(z, target[0], k=k, reduction=reduction), logits[0])
        expected, expected_grad = value_and_grad(lambda z, k=k: loss(z, target, k=k, reduction="sum"), logits)
        assert value.shape == ()
        assert torch.equal(value, expected)
        assert torch.equal(grad, expected_grad[0])


@each(LOGISTIC)
def test_a_single_multihot_row_without_a_batch(loss):
    logits, target = make_logits(1, 12), make_multihot(3, 12)[1:2]
    value, grad = value_and_grad(lambda z: loss(z, target[0], k=4), logits[0])
    expected, expected_grad = value_and_grad(lambda z: loss(z, target, k=4), logits)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad[0])


def test_single_ignored_row():
    logits = torch.randn(5, requires_grad=True)
    loss = fl.cross_entropy(logits, torch.tensor(-100), reduction="sum")
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("k", [2, 40])
@each(LOSSES)
def test_strides_of_logits(loss, k):
    """The gradient arrives where the numbers came from, whatever the view."""
    base, target = make_logits(100, 10).t(), make_index(10, 100)
    value, grad = value_and_grad(lambda z: loss(z.t().contiguous(), target, k=k), base.t().contiguous())
    for view in (lambda z: z.t(), lambda z: z.t().contiguous().t().t()):
        other, of_other = value_and_grad(lambda z, view=view: loss(view(z), target, k=k), base.t().contiguous())
        torch.testing.assert_close(other, value, rtol=1e-13, atol=0)
        torch.testing.assert_close(of_other, grad, rtol=1e-12, atol=1e-17)
    wide = torch.cat([base, base.new_full((10, 3), torch.nan)], dim=1)
    _, of_wide = value_and_grad(lambda z: loss(z[:, :100], target, k=k), wide)
    torch.testing.assert_close(of_wide[:, :100], grad.t(), rtol=1e-12, atol=1e-17)
    assert (of_wide[:, 100:] == 0).all()
    row = base[:1].clone()
    _, of_row = value_and_grad(lambda z: loss(z.expand(10, 100), target, k=k), row)
    _, of_rows = value_and_grad(lambda z: loss(z, target, k=k), row.repeat(10, 1))
    torch.testing.assert_close(of_row, of_rows.sum(0, keepdim=True), rtol=1e-12, atol=1e-17)


@each(LOSSES)
def test_strided_targets(loss):
    logits, target = make_logits(6, 12), make_index(6, 12)
    expected = loss(logits, target, k=3)
    assert torch.equal(loss(logits, target.repeat_interleave(2)[::2], k=3), expected)
    assert torch.equal(loss(logits, torch.cat([target[:1], target])[1:], k=3), expected)


@each(LOSSES)
def test_arguments_are_never_modified(loss):
    logits, target = make_logits(6, 100, torch.float32).requires_grad_(), make_index(6, 100)
    weight = torch.rand(100)
    before = [t.detach().clone() for t in (logits, target, weight)]
    versions = [t._version for t in (logits, target, weight)]
    for k in loss.ks(None, 2, 50):
        loss(logits, target, k=k, weight=weight).backward()
    assert [t._version for t in (logits, target, weight)] == versions
    assert all(torch.equal(a, b) for a, b in zip((logits, target, weight), before, strict=True))


@pytest.mark.parametrize("check_targets", [False, True])
@each((CE, NLLR, CRL, LR, SS_LR, HS_LR))
def test_check_targets_changes_no_value(loss, check_targets):
    logits, target = make_logits(6, 12), make_index(6, 12)
    assert torch.equal(loss(logits, target, k=3, check_targets=check_targets), loss(logits, target, k=3))


def test_half_precision_loss_is_float32():
    for dtype in (torch.float16, torch.bfloat16):
        for reduction in ("none", "mean", "sum"):
            assert (
                fl.lr_loss(make_logits(3, 9, dtype), make_target("index", 3, 9), reduction=reduction).dtype
                == torch.float32
            )
