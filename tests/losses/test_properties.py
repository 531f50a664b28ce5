"""Properties that hold for every input, on inputs that hypothesis finds."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import fused_losses as fl
from cases import CE, LOGISTIC, LOSSES, SOFTMAX, each, value_and_grad

finite = st.floats(-60, 60, allow_nan=False, width=32)
few = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 1.0, 1.0 + 2**-20, 30.0])  # ties and near-ties


@st.composite
def batches(draw, distinct=False):
    """Logits (rows, classes) in float64 and class indices (rows,); `distinct`: no ties within a row."""
    rows, classes = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    row = st.lists(finite if distinct else finite | few, min_size=classes, max_size=classes, unique=distinct)
    logits = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64)
    target = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    return logits, target


ks = st.integers(1, 10)
alphas = st.floats(0, 8)
tiny = {"rtol": 1e-10, "atol": 1e-12}


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tiny)


def everything(loss, logits, target, **options):
    return value_and_grad(lambda z: loss(z, target, reduction="none", **options), logits)


@each(LOSSES)
@given(batch=batches(distinct=True), k=ks, seed=st.integers(0, 99))
def test_permuting_the_classes_permutes_the_gradient(loss, batch, k, seed):
    """Without ties: these are settled by position."""
    logits, target = batch
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    value, grad = everything(loss, logits, target, k=k)
    moved = everything(loss, logits[:, order], order.argsort()[target], k=k)
    close(moved, (value, grad[:, order]))


@each(LOSSES)
@given(batch=batches(), k=ks, seed=st.integers(0, 99))
def test_permuting_the_rows_permutes_everything(loss, batch, k, seed):
    logits, target = batch
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    value, grad = everything(loss, logits, target, k=k)
    close(everything(loss, logits[order], target[order], k=k), (value[order], grad[order]))


@each([loss for loss in LOSSES if not loss.needs_k])
@given(batch=batches(), more=st.integers(0, 5))
def test_k_of_all_negatives_is_no_k(loss, batch, more):
    logits, target = batch
    k = logits.shape[1] - 1 + more
    close(everything(loss, logits, target, k=k), everything(loss, logits, target))


@given(batch=batches())
def test_ss_lr_without_focus_is_lr(batch):
    logits, target = batch
    classes = logits.shape[1]
    ours = value_and_grad(lambda z: fl.ss_lr_loss(z, target, gamma=0, alpha=classes - 1, reduction="none"), logits)
    close(ours, value_and_grad(lambda z: fl.lr_loss(z, target, reduction="none"), logits))


@given(batch=batches(), k=ks)
def test_hs_lr_with_alpha_k_is_lr_over_the_k_hardest(batch, k):
    logits, target = batch
    alpha = min(k, logits.shape[1] - 1)
    ours = value_and_grad(lambda z: fl.hs_lr_loss(z, target, k=k, alpha=alpha, reduction="none"), logits)
    close(ours, value_and_grad(lambda z: fl.lr_loss(z, target, k=k, reduction="none"), logits))


@given(batch=batches(), k=ks, alpha=alphas)
def test_ss_lr_without_focus_is_hs_lr(batch, k, alpha):
    logits, target = batch
    ours = value_and_grad(lambda z: fl.ss_lr_loss(z, target, k=k, gamma=0, alpha=alpha, reduction="none"), logits)
    close(ours, value_and_grad(lambda z: fl.hs_lr_loss(z, target, k=k, alpha=alpha, reduction="none"), logits))


@given(batch=batches(), k=st.none() | ks, alpha=alphas)
def test_crl_without_competition_is_cross_entropy(batch, k, alpha):
    logits, target = batch
    ours = value_and_grad(lambda z: fl.crl_loss(z, target, k=k, alpha=alpha, beta=0), logits)
    close(ours, value_and_grad(lambda z: fl.cross_entropy(z, target, k=k), logits))


@given(batch=batches())
def test_cross_entropy_is_torchs(batch):
    logits, target = batch
    ours = value_and_grad(lambda z: fl.cross_entropy(z, target), logits)
    close(ours, value_and_grad(lambda z: F.cross_entropy(z, target), logits))


@given(batch=batches(), k=st.none() | ks)
def test_crl_with_alpha_0_and_beta_1_is_nllr(batch, k):
    logits, target = batch
    ours = value_and_grad(lambda z: fl.crl_loss(z, target, k=k, alpha=0, beta=1), logits)
    close(ours, value_and_grad(lambda z: fl.nllr_loss(z, target, k=k), logits))


@each(LOSSES)
@given(
    batch=batches(),
    k=ks,
    ignored=st.lists(st.integers(0, 4), max_size=3),
    junk=st.sampled_from([0.0, 1e30, float("nan")]),
)
def test_ignored_rows_change_nothing(loss, batch, k, ignored, junk):
    logits, target = batch
    rows = len(logits)
    keep = torch.ones(rows + len(ignored), dtype=torch.bool)
    for place in ignored:
        keep[(place * 7) % len(keep)] = False
    rows = int(keep.sum())
    longer, longer_target = (
        torch.full((len(keep), logits.shape[1]), junk, dtype=torch.float64),
        torch.full((len(keep),), -100),
    )
    logits, target = logits.repeat(4, 1)[:rows], target.repeat(4)[:rows]
    longer[keep], longer_target[keep] = logits, target
    for reduction in ("mean", "sum"):
        value, grad = value_and_grad(lambda z, r=reduction: loss(z, target, k=k, reduction=r), logits)
        longer_value, longer_grad = value_and_grad(
            lambda z, r=reduction: loss(z, longer_target, k=k, reduction=r), longer
        )
        close((longer_value, longer_grad[keep]), (value, grad))
        assert (longer_grad[~keep] == 0).all()


@each(LOSSES)
@given(batch=batches(), k=ks, cut=st.integers(0, 4))
def test_a_batch_is_the_sum_of_its_parts(loss, batch, k, cut):
    logits, target = batch
    whole = value_and_grad(lambda z: loss(z, target, k=k, reduction="sum"), logits)
    parts = [
        value_and_grad(lambda z, t=t: loss(z, t, k=k, reduction="sum"), z)
        for z, t in ((logits[:cut], target[:cut]), (logits[cut:], target[cut:]))
    ]
    close(whole, (parts[0][0] + parts[1][0], torch.cat([parts[0][1], parts[1][1]])))


@each(SOFTMAX)
@given(batch=batches(), k=st.none() | ks, shift=st.integers(-1000, 1000))
def test_softmax_losses_see_differences_only(loss, batch, k, shift):
    """And their gradient rows sum to zero."""
    logits, target = batch
    logits = (logits * 1024).round() / 1024  # so that adding the shift is exact
    value, grad = everything(loss, logits, target, k=k)
    for a, b in zip(everything(loss, logits + shift, target, k=k), (value, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(grad.sum(1), torch.zeros(len(logits), dtype=torch.float64), rtol=0, atol=1e-13)


@each(LOSSES)
@given(batch=batches(), k=ks)
def test_the_target_is_pulled_up_and_the_chosen_pushed_down(loss, batch, k):
    logits, target = batch
    _, grad = everything(loss, logits, target, k=k)
    of_target = F.one_hot(target, logits.shape[1]).bool()
    assert (grad[of_target] <= 0).all()
    assert (grad[~of_target] >= 0).all()
    assert ((grad[~of_target].view(len(logits), -1) != 0).sum(1) <= k).all()


@each([loss for loss in LOSSES if loss.name not in ("nllr_loss",)])
@given(batch=batches(), k=ks)
def test_not_negative(loss, batch, k):
    """CRL at its defaults is at least log 1.5."""
    logits, target = batch
    floor = 0.4054 if loss.name == "crl_loss" else 0
    assert (loss(logits, target, k=k, reduction="none") >= floor).all()


@pytest.mark.parametrize("harder", [CE, *(loss for loss in LOGISTIC if loss.name == "lr_loss")], ids=str)
@given(batch=batches(), k=ks)
def test_more_negatives_cost_more(harder, batch, k):
    logits, target = batch
    fewer = harder(logits, target, k=k, reduction="none")
    more = harder(logits, target, k=k + 1, reduction="none")
    assert (more >= fewer - 1e-12 * fewer.abs()).all()


@each(LOGISTIC)
@given(batch=batches(), k=ks, data=st.data())
def test_multihot_rows_see_their_own_negatives(loss, batch, k, data):
    """A positive more is a candidate less: no gradient is positive on a positive, and at most k are on negatives."""
    logits, _ = batch
    rows, classes = logits.shape
    bits = data.draw(st.lists(st.booleans(), min_size=rows * classes, max_size=rows * classes))
    target = torch.tensor(bits).view(rows, classes)
    value, grad = value_and_grad(lambda z: loss(z, target, k=k), logits)
    expected = value_and_grad(lambda z: loss.paper(z, target, k, **loss.hypers[0]).mean(), logits)
    close((value, grad), expected)
