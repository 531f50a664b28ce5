"""The doors themselves, in every wing that CPU tensors reach: both forms, state, picks, special rows, strides."""

import copy
import itertools
import math

import pytest
import torch

import paper
from cases import (
    assert_elementwise,
    compute_dtype,
    make_index,
    make_logits,
    make_multihot,
    make_target,
    signed_nan,
)
from doors import CE, CRL, FORMS, LOGISTIC, LR, NLLR, SOFTMAX, SS_LR, backward, forward, grad_like, paper_rows_and_grad

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INF, NAN = math.inf, math.nan
FAMILIES = [CRL, SS_LR]  # one formula of each family, where the formula does not matter

every_form = pytest.mark.parametrize(
    "k, compact", FORMS, ids=[f"{k}-{'compact' if c else 'threshold'}" for k, c in FORMS]
)
both_forms = pytest.mark.parametrize("compact", [False, True], ids=["threshold", "compact"])
both_families = pytest.mark.parametrize("formula", FAMILIES, ids=str)


def roundtrip(wing, formula, logits, target, k=0, compact=False, ignore_index=-100, grad=None, part=(0, None)):
    """What forward keeps, and dlogits for an upstream gradient (random if not given)."""
    kept = forward(wing, formula, logits, target, k, compact, ignore_index, part)
    grad = grad_like(formula, logits) if grad is None else grad
    return kept, backward(wing, formula, grad, logits, target, kept, k, compact, ignore_index, part)


# --- values and gradients ---------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formula", SOFTMAX, ids=str)
def test_softmax_doors_agree_with_paper(wing, formula, dtype, k, compact):
    logits, target = make_logits(5, 33, dtype), make_index(5, 33)
    grad = grad_like(formula, logits)
    kept, dlogits = roundtrip(wing, formula, logits, target, k, compact, grad=grad)
    value, gradient = paper_rows_and_grad(formula, logits, target, k, grad)
    assert kept.rows.dtype == kept.state.dtype == compute_dtype(dtype)
    assert dlogits.dtype == dtype
    atol = 1e-5 if kept.rows.dtype == torch.float32 else 1e-13
    assert_elementwise(kept.rows, value, "value", atol=atol)
    assert_elementwise(dlogits, gradient, "gradient")


@every_form
@pytest.mark.parametrize("form", ["index", "multihot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formula", LOGISTIC, ids=str)
def test_logistic_doors_agree_with_paper(wing, formula, dtype, form, k, compact):
    logits, target = make_logits(5, 33, dtype), make_target(form, 5, 33)
    grad = grad_like(formula, logits)
    kept, dlogits = roundtrip(wing, formula, logits, target, k, compact, grad=grad)
    sums, gradient = paper_rows_and_grad(formula, logits, target, k, grad)
    assert kept.rows.dtype == kept.state.dtype == compute_dtype(dtype)
    assert dlogits.dtype == dtype
    assert_elementwise(kept.rows, sums, "sums")
    assert_elementwise(dlogits, gradient, "gradient")


@pytest.mark.parametrize("formula", [CE, NLLR, CRL, LR, SS_LR], ids=str)
@pytest.mark.parametrize("k", [1, 4, 32, 33, 40])
def test_compact_and_threshold_form_agree(wing, formula, k):
    """The same picks in the same arithmetic: only the kept form differs. Ties included."""
    logits, target = make_logits(7, 33).mul(2).round().div(2), make_index(7, 33)
    compact, of_compact = roundtrip(wing, formula, logits, target, k, True)
    threshold, of_threshold = roundtrip(wing, formula, logits, target, k, False)
    torch.testing.assert_close(compact.rows, threshold.rows, rtol=1e-14, atol=0)
    torch.testing.assert_close(compact.state, threshold.state, rtol=1e-14, atol=0)
    torch.testing.assert_close(of_compact, of_threshold, rtol=1e-14, atol=0)
    assert torch.equal(of_compact != 0, of_threshold != 0)


# --- picks and state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["index", "multihot"])
@pytest.mark.parametrize("k", [1, 4, 12, 13, 20])
def test_compact_picks_are_the_hardest_with_empty_slots_behind(wing, form, k):
    rows, classes = 6, 13
    logits = make_logits(rows, classes, torch.float32).round()  # many ties
    target = make_target(form, rows, classes)
    kept = forward(wing, LR, logits, target, k, True)
    assert kept.pick_index.shape == kept.pick_logit.shape == (rows, k)
    assert kept.pick_index.dtype == torch.int32
    assert kept.pick_logit.dtype == torch.float32
    chosen = paper.negatives(logits, target, k)
    for row in range(rows):
        index, logit = kept.pick_index[row].long(), kept.pick_logit[row]
        taken = index >= 0
        assert sorted(index[taken].tolist()) == chosen[row].nonzero().flatten().tolist()
        assert torch.equal(logit[taken], logits[row, index[taken]])
        assert (index[~taken] == -1).all()
        assert (logit[~taken] == -INF).all()


@pytest.mark.parametrize("form", ["index", "multihot"])
@pytest.mark.parametrize("k", [1, 4, 12, 13, 20])
def test_threshold_pick_is_the_last_one_taken(wing, form, k):
    rows, classes = 6, 13
    logits = make_logits(rows, classes, torch.bfloat16).round()
    target = make_target(form, rows, classes)
    kept = forward(wing, LR, logits, target, k, False)
    assert kept.pick_index.shape == kept.pick_logit.shape == (rows, 1)
    assert kept.pick_index.dtype == torch.int32
    assert kept.pick_logit.dtype == torch.bfloat16
    chosen = paper.negatives(logits, target, k)
    for row in range(rows):
        taken = chosen[row].nonzero().flatten().tolist()
        last = max(taken, key=lambda j: (-logits[row, j].item(), j), default=-1)
        assert kept.pick_index[row].item() == last
        assert kept.pick_logit[row].item() == (logits[row, last].item() if taken else -INF)


@both_families
def test_all_negatives_keep_no_picks(wing, formula):
    logits = make_logits(4, 9, torch.float16)
    kept = forward(wing, formula, logits, make_index(4, 9))
    assert kept.pick_index.shape == kept.pick_logit.shape == (4, 0)
    assert kept.pick_index.dtype == torch.int32
    assert kept.pick_logit.dtype == torch.float16


@every_form
def test_softmax_state_is_largest_negative_logsumexp_and_target(wing, k, compact):
    logits, target = make_logits(5, 33), make_index(5, 33)
    m, l, z_y = forward(wing, CE, logits, target, k, compact).state.unbind(1)
    negatives = logits.masked_fill(~paper.negatives(logits, target, k or None), -INF)
    assert torch.equal(m, negatives.amax(1))
    assert torch.equal(z_y, logits[range(5), target])
    torch.testing.assert_close(l, (negatives - m[:, None]).exp().sum(1).log(), rtol=1e-13, atol=1e-15)


@every_form
def test_softmax_state_without_negatives_above_minus_inf(wing, k, compact):
    logits = torch.tensor([[-INF, 2.0, -INF], [-INF, -INF, -INF]])
    kept = forward(wing, CE, logits, torch.tensor([1, 1]), k, compact)
    assert kept.state[0].tolist() == [0.0, -INF, 2.0]
    assert kept.rows[0] == 0
    assert kept.rows[1].isnan()


@every_form
def test_logistic_state_is_target_logit_and_number_of_positives(wing, k, compact):
    logits, target, multihot = make_logits(5, 33), make_index(5, 33), make_multihot(5, 33)
    z_y, count = forward(wing, SS_LR, logits, target, k, compact).state.unbind(1)
    assert torch.equal(z_y, logits[range(5), target])
    assert count.tolist() == [1] * 5
    z_y, count = forward(wing, SS_LR, logits, multihot, k, compact).state.unbind(1)
    assert z_y.tolist() == [0] * 5
    assert torch.equal(count, multihot.sum(1).double())


@every_form
def test_a_nan_row_still_counts_its_positives(wing, k, compact):
    """They stand in the batch's normaliser, which is every other row's too."""
    logits, multihot = make_logits(5, 33), make_multihot(5, 33)
    logits[2, 7] = NAN
    z_y, count = forward(wing, SS_LR, logits, multihot, k, compact).state.unbind(1)
    assert z_y.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(count, multihot.sum(1).double())


# --- rows without a target of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", SOFTMAX, ids=str)
def test_shards_of_a_row_merge_to_the_whole_row(wing, formula):
    """A shard that does not hold the target gives its negatives' statistics, and from the merged state its part of the
    gradient."""
    rows, cut, classes = 6, 5, 12
    logits, target = make_logits(rows, classes), make_index(rows, classes)
    grad = grad_like(formula, logits)
    shards = [(logits[:, :cut], (0, classes)), (logits[:, cut:], (cut, classes))]
    kept = [forward(wing, formula, z, target, part=part) for z, part in shards]
    m_s, l_s, z_y_s = torch.stack([of_shard.state for of_shard in kept]).unbind(2)  # (shards, rows) each
    assert torch.equal(z_y_s == -INF, torch.stack([target >= cut, target < cut]))
    m = m_s.amax(0)
    l = torch.logsumexp(l_s + (m_s - m), dim=0)
    merged = torch.stack([m, l, z_y_s.amax(0)], dim=1)
    dlogits = [
        backward(wing, formula, grad, z, target, of_shard._replace(state=merged), part=part)
        for (z, part), of_shard in zip(shards, kept, strict=True)
    ]
    whole, of_whole = roundtrip(wing, formula, logits, target, grad=grad)
    torch.testing.assert_close(merged, whole.state, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(torch.cat(dlogits, dim=1), of_whole, rtol=1e-12, atol=1e-15)


@every_form
def test_softmax_row_without_target_is_hopeless_but_has_statistics(wing, k, compact):
    logits = make_logits(3, 9)
    target = torch.tensor([5, 2, 12])
    logits[2, 4] = NAN
    kept = forward(wing, CE, logits, target, k, compact, part=(3, 13))
    assert kept.rows[1] == INF
    assert kept.state[1, 2] == -INF
    assert kept.state[1, 0] == logits[1].max()  # every class is a negative here
    assert kept.rows[2].isnan()
    assert kept.state[2].isnan().any()


@every_form
def test_logistic_row_without_target_has_only_negatives(wing, k, compact):
    logits = make_logits(3, 9)
    target = torch.tensor([5, 2, 12])
    logits[2, 4] = NAN
    grad = grad_like(SS_LR, logits)
    kept, dlogits = roundtrip(wing, SS_LR, logits, target, k, compact, grad=grad, part=(3, 13))
    assert kept.rows[1, 0] == 0
    assert kept.state[1].tolist() == [0, 0]
    no_positive = torch.zeros(3, 9, dtype=torch.bool)
    sums, gradient = paper_rows_and_grad(SS_LR, logits, no_positive, k, grad)
    assert_elementwise(kept.rows[1, 1], sums[1, 1], "negative sum")
    assert_elementwise(dlogits[1], gradient[1], "gradient")
    assert kept.rows[2].isnan().all()
    assert kept.state[2, 0].isnan()
    assert dlogits[2].isnan().all()


@every_form
@both_families
def test_the_classes_beside_the_logits_own_are_elsewhere(wing, formula, k, compact):
    """Of a wider matrix: what stands there is not read either. And an ignored class may be here or there."""
    wide = make_logits(6, 15)
    wide[:, [2, 12]] = 50.0
    target, part, grad = torch.tensor([3, 11, 2, 12, 0, 14]), (3, 15), grad_like(formula, wide)
    for ignore_index, ignored in ((-100, []), (3, [0]), (2, [2]), (12, [3])):
        kept, dlogits = roundtrip(wing, formula, wide[:, 3:12], target, k, compact, ignore_index, grad, part)
        here = torch.tensor([0, 8, -1, -1, -1, -1])
        positive = torch.arange(9) == here[:, None]
        if formula.family == "logistic":
            sums, expected = paper_rows_and_grad(formula, wide[:, 3:12], positive, k, grad)
            expected[ignored], sums[ignored] = 0, 0
            torch.testing.assert_close(kept.rows, sums)
            torch.testing.assert_close(dlogits, expected)
            count = positive.sum(1).index_fill(0, torch.tensor(ignored, dtype=torch.long), 0)
            assert torch.equal(kept.state[:, 1], count.double())
        else:
            z_y = wide[:, 3:12].where(positive, -INF).amax(1)
            z_y[ignored] = 0
            assert torch.equal(kept.state[:, 2], z_y)
            assert not dlogits[ignored].any()


@every_form
@both_families
@pytest.mark.parametrize("ignore_index", [-100, 3, 77, -1])
def test_ignored_rows_are_literal_zeros(wing, formula, ignore_index, k, compact):
    """Whatever the row and its upstream gradient hold; ignore_index is looked at before the class range."""
    logits = make_logits(4, 9, torch.float32)
    logits[0], logits[1] = NAN, INF
    target = torch.tensor([ignore_index, ignore_index, 5, ignore_index])
    grad = torch.full_like(grad_like(formula, logits), NAN)
    grad[2], grad[1] = 1, INF
    kept, dlogits = roundtrip(wing, formula, logits, target, k, compact, ignore_index, grad)
    ignored = [0, 1, 3]
    assert (kept.rows[ignored] == 0).all()
    assert (kept.state[ignored] == 0).all()
    assert (dlogits[ignored] == 0).all()
    assert kept.rows[2].isfinite().all()
    assert (dlogits[2] != 0).any()


# --- special values ---------------------------------------------------------------------------------------------------


@every_form
@both_families
@pytest.mark.parametrize("sign", [1, -1], ids=["nan", "minus-nan"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["target", "hardest", "easiest"])
def test_nan_of_either_sign_spoils_its_row_and_no_other(wing, formula, sign, dtype, where, k, compact):
    logits, target = make_logits(3, 9, dtype), torch.tensor([1, 1, 1])
    clean, clean_dlogits = roundtrip(wing, formula, logits, target, k, compact)
    others = torch.arange(9) != 1
    column = {"target": 1, "hardest": logits[1].masked_fill(~others, -INF).argmax(), "easiest": logits[1].argmin()}[
        where
    ]
    logits[1, column] = signed_nan(sign, dtype)
    kept, dlogits = roundtrip(wing, formula, logits, target, k, compact)
    assert kept.rows[1].isnan().all()
    assert dlogits[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(kept.rows[row], clean.rows[row])
        assert torch.equal(kept.state[row], clean.state[row])
        assert torch.equal(dlogits[row], clean_dlogits[row])


@both_forms
def test_nan_coefficient_spoils_the_whole_softmax_row(wing, compact):
    logits, target = make_logits(3, 9), make_index(3, 9)
    _, dlogits = roundtrip(wing, CRL, logits, target, 2, compact, grad=torch.tensor([1.0, NAN, 1.0]).double())
    assert dlogits[1].isnan().all()
    assert dlogits[[0, 2]].isfinite().all()


@every_form
@both_families
def test_masked_class_may_be_picked_last_and_gets_nothing(wing, formula, k, compact):
    logits, target = make_logits(4, 9), torch.tensor([0, 1, 2, 3])
    logits[:, 5:] = -INF
    kept, dlogits = roundtrip(wing, formula, logits, target, k, compact)
    assert kept.rows.isfinite().all()
    assert (dlogits[:, 5:] == 0).all()
    assert (dlogits[:, :5] != 0).any(1).all()
    if compact:
        assert ((kept.pick_index >= 0).sum(1) == min(k, 8)).all()
    # the finite classes see nothing of it
    _, expected = paper_rows_and_grad(formula, logits[:, :5], target, k, grad_like(formula, logits))
    assert_elementwise(dlogits[:, :5], expected, "gradient")


# --- bad targets ------------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("bad", [7, -1, -101, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1])
def test_class_out_of_range_raises_in_torchs_words(wing, formula, bad):
    with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\. \(row 1, 7 classes\)"):
        forward(wing, formula, make_logits(3, 7), torch.tensor([0, bad, 6]))


@both_families
@pytest.mark.parametrize("bad", [10, -1, 2**63 - 1, -(2**63), -(2**63) + 1])
def test_class_out_of_range_of_all_shards(wing, formula, bad):
    """3 to 9 are the logits', 0 to 2 are another's; nobody has the others."""
    with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\. \(row 2, 10 classes\)"):
        forward(wing, formula, make_logits(3, 7), torch.tensor([0, 9, bad]), part=(3, 10))


@both_families
@pytest.mark.parametrize("part", [(-1, 9), (4, 10), (1, 7), (-(2**63), None), (2**63 - 1, None), (0, -(2**63))])
def test_parts_that_are_none(wing, formula, part):
    logits, target = make_logits(3, 7), torch.tensor([4, 5, 6])
    kept = forward(wing, formula, logits, target)
    for call in (
        lambda: forward(wing, formula, logits, target, part=part),
        lambda: backward(wing, formula, grad_like(formula, logits), logits, target, kept, part=part),
    ):
        with pytest.raises((ValueError, OverflowError), match="class"):
            call()


@pytest.mark.parametrize("wrong", [torch.tensor(0.5), torch.tensor(2), torch.tensor(-1), torch.tensor(NAN)], ids=str)
def test_multihot_entries_other_than_0_and_1_raise(wing, wrong):
    target = make_multihot(3, 7).to(wrong.dtype)
    target[1, 2] = wrong
    with pytest.raises((ValueError, RuntimeError), match="0 or 1"):
        forward(wing, LR, make_logits(3, 7), target)


MULTI_HOT_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


@pytest.mark.parametrize("dtype", MULTI_HOT_DTYPES, ids=str)
def test_multihot_targets_of_any_dtype(wing, dtype):
    """Also -0.0, and 70 classes: a block that is all zeros and one that is not."""
    logits, target = make_logits(4, 200, torch.float32), make_multihot(4, 200)
    target[:, 64:128] = False
    of_dtype = target.to(torch.float32)
    if dtype.is_floating_point:
        of_dtype = torch.where(target, of_dtype, -0.0)
        assert of_dtype.signbit().any()
    of_dtype = of_dtype.to(dtype)
    grad = grad_like(LR, logits)
    for k, compact in ((0, False), (5, True), (5, False)):
        expected, expected_dlogits = roundtrip(wing, LR, logits, target, k, compact, grad=grad)
        kept, dlogits = roundtrip(wing, LR, logits, of_dtype, k, compact, grad=grad)
        for ours, theirs in zip((*kept, dlogits), (*expected, expected_dlogits), strict=True):
            assert torch.equal(ours, theirs)
    if dtype != torch.bool:
        bits = of_dtype.view(torch.uint8).clone()
        bits[2, 70 * dtype.itemsize] ^= 2  # neither 0 nor 1: at a zero, a small number
        with pytest.raises((ValueError, RuntimeError), match=r"0 or 1.* row 2, class 70"):
            forward(wing, LR, logits, bits.view(dtype))


def test_nan_of_a_float8_without_minus_zero(wing):
    for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        target = torch.zeros(3, 7, dtype=torch.uint8)
        target[1, 2] = 0x80
        with pytest.raises((ValueError, RuntimeError), match="0 or 1"):
            forward(wing, LR, make_logits(3, 7), target.view(dtype))


# --- arguments that do not fit ----------------------------------------------------------------------------------------


@both_families
@both_forms
@pytest.mark.parametrize("bad", [9, 10**6, 2**31 - 1, -2, -(2**31)])
def test_picks_that_are_no_classes(wing, formula, compact, bad):
    logits, target = make_logits(3, 9, torch.float32), make_index(3, 9)
    kept = forward(wing, formula, logits, target, 4, compact)
    kept.pick_index[1, -1] = bad
    with pytest.raises(IndexError, match=r"Picks must be classes or -1, which those of row 1 are not\. \(9 classes\)"):
        backward(wing, formula, grad_like(formula, logits), logits, target, kept, 4, compact)


@both_families
def test_picks_in_any_order(wing, formula):
    logits, target = make_logits(3, 40, torch.float32), make_index(3, 40)
    kept, dlogits = roundtrip(wing, formula, logits, target, 17, True)
    order = torch.randperm(17)
    shuffled = kept._replace(pick_index=kept.pick_index[:, order], pick_logit=kept.pick_logit[:, order])
    grad = grad_like(formula, logits)
    torch.testing.assert_close(backward(wing, formula, grad, logits, target, shuffled, 17, True), dlogits)


def misfits(formula, grad, target, kept):
    """Arguments of backward for 4 compact picks of 3 rows, one of them of a wrong shape, dtype or device."""
    tensors = {"grad": grad, "target": target, **dict(zip(kept._fields[1:], kept[1:], strict=True))}
    for name, tensor in tensors.items():
        for wrong in (
            tensor[:2],
            torch.cat((tensor, tensor)),
            tensor[None],
            tensor[..., None],
            tensor.flatten()[0],
            tensor[..., :0],
            tensor.to(torch.int16),
            tensor.to("meta"),
        ):
            yield f"{name} {tuple(wrong.shape)} {wrong.dtype}", {**tensors, name: wrong}, {}
    for options in (
        {"k": 2**62},
        {"k": 2**31},
        {"k": -1},
        {"k": 3},
        {"classes": 0},
        {"classes": -5},
        {"classes": 2**31},
    ):
        yield str(options), tensors, options
    empty = {**tensors, "pick_index": kept.pick_index[:, :0], "pick_logit": kept.pick_logit[:, :0]}
    yield "rows * k overflows", empty, {"k": 2**62}
    yield "no picks", empty, {}


@both_families
def test_what_backward_refuses(wing, formula):
    logits, target = make_logits(3, 9, torch.float32), make_index(3, 9)
    kept = forward(wing, formula, logits, target, 4, True)
    for what, tensors, options in misfits(formula, grad_like(formula, logits), target, kept):
        grad, *others = tensors.values()
        k, classes = options.get("k", 4), options.get("classes", 9)
        call = getattr(wing, f"{formula.family}_backward")
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            call(grad, None, *others, formula.loss, formula.params, k, -100, classes, True)
            pytest.fail(what)


@both_families
def test_what_forward_refuses(wing, formula):
    logits, target = make_logits(3, 9, torch.float32), make_index(3, 9)
    options = formula.loss, formula.params
    call = getattr(wing, f"{formula.family}_forward")
    for wrong in (
        (logits[0], target, *options, 0),
        (logits[None], target, *options, 0),
        (logits[:, :0], target, *options, 0),
        (logits.long(), target, *options, 0),
        (logits, target[:2], *options, 0),
        (logits, target[0], *options, 0),
        (logits, target.int(), *options, 0),
        (logits, target.float(), *options, 0),
        (logits, target[:, None], *options, 0),
        (logits, torch.zeros(3, 9, 1), *options, 0),
        (logits, torch.zeros(3, 9, dtype=torch.complex64), *options, 0),
        (logits, target.to("meta"), *options, 0),
        (logits.to("meta"), target, *options, 0),
        (logits, target, *options, -1),
        (logits, target, *options, 2**31),
        (logits, target, *options, 2**62),
        (logits, target, "nothing", [], 0),
        (logits, target, formula.loss, [1.0, 1.0, 1.0], 0),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call(*wrong, -100, True)
            pytest.fail(str(wrong[2:]))


# --- tensors as they come ---------------------------------------------------------------------------------------------


def strided(logits):
    """The same (rows, classes) numbers under other strides."""
    rows, classes = logits.shape
    yield "transposed", logits.t().contiguous().t()
    yield "odd row stride", torch.cat([logits, logits[:, :3]], dim=1)[:, :classes]
    yield "every second column", logits.repeat_interleave(2, dim=1)[:, ::2]
    yield "every second row", logits.repeat_interleave(2, dim=0)[::2]
    yield "offset storage", torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(rows, classes)


@every_form
@both_families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strides_of_logits_do_not_matter(wing, formula, dtype, k, compact):
    logits, target = make_logits(5, 19, dtype), make_index(5, 19)
    expected, expected_dlogits = roundtrip(wing, formula, logits, target, k, compact)
    # torch's own vector and scalar loops, one per memory layout, differ in the last bits
    rtol = 16 * torch.finfo(compute_dtype(dtype)).eps
    dlogits_rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else rtol
    for name, view in strided(logits):
        kept, dlogits = roundtrip(wing, formula, view, target, k, compact)
        assert torch.equal(kept.pick_index, expected.pick_index), name
        assert torch.equal(kept.pick_logit, expected.pick_logit), name
        torch.testing.assert_close(kept.rows, expected.rows, rtol=rtol, atol=0, msg=name)
        torch.testing.assert_close(kept.state, expected.state, rtol=rtol, atol=0, msg=name)
        torch.testing.assert_close(dlogits, expected_dlogits, rtol=dlogits_rtol, atol=0, msg=name)
        assert dlogits.is_contiguous(), name


@every_form
@both_families
def test_expanded_logits(wing, formula, k, compact):
    row, target = make_logits(1, 19), make_index(5, 19)
    kept, dlogits = roundtrip(wing, formula, row.expand(5, 19), target, k, compact)
    expected, expected_dlogits = roundtrip(wing, formula, row.repeat(5, 1), target, k, compact)
    assert torch.equal(kept.pick_index, expected.pick_index)
    torch.testing.assert_close(kept.rows, expected.rows, rtol=1e-14, atol=0)
    torch.testing.assert_close(dlogits, expected_dlogits, rtol=1e-14, atol=0)


@every_form
@both_families
def test_strides_of_target_and_grad_do_not_matter(wing, formula, k, compact):
    logits, target = make_logits(5, 19), make_index(5, 19)
    grad = grad_like(formula, logits)
    _, expected = roundtrip(wing, formula, logits, target, k, compact, grad=grad)
    wide_target = torch.stack([target, torch.full_like(target, 10**6)], dim=1)[:, 0]
    wide_grad = torch.stack([grad, torch.full_like(grad, NAN)], dim=1).select(1, 0)
    _, dlogits = roundtrip(wing, formula, logits, wide_target, k, compact, grad=wide_grad)
    assert torch.equal(dlogits, expected)

    one = torch.tensor(0.37, dtype=torch.float64)
    _, expected = roundtrip(wing, formula, logits, target, k, compact, grad=one.repeat(grad.shape))
    _, dlogits = roundtrip(wing, formula, logits, target, k, compact, grad=one.expand(grad.shape))
    assert torch.equal(dlogits, expected)

    same = target[:1].expand(5)
    _, expected = roundtrip(wing, formula, logits, same.contiguous(), k, compact, grad=grad)
    _, dlogits = roundtrip(wing, formula, logits, same, k, compact, grad=grad)
    assert torch.equal(dlogits, expected)


@both_forms
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64], ids=str
)
def test_multihot_of_any_dtype_and_stride(wing, dtype, compact):
    logits, target = make_logits(5, 19), make_multihot(5, 19)
    expected, expected_dlogits = roundtrip(wing, SS_LR, logits, target, 3, compact)
    for view in (target.to(dtype), target.to(dtype).t().contiguous().t()):
        kept, dlogits = roundtrip(wing, SS_LR, logits, view, 3, compact)
        assert all(map(torch.equal, kept, expected))
        assert torch.equal(dlogits, expected_dlogits)


@every_form
@pytest.mark.parametrize("formula, form", [(CRL, "index"), (SS_LR, "index"), (SS_LR, "multihot")], ids=str)
def test_doors_touch_none_of_their_arguments(wing, formula, form, k, compact):
    logits, target = make_logits(5, 19, torch.float32), make_target(form, 5, 19)
    grad = grad_like(formula, logits)
    before = copy.deepcopy((logits, target, grad))
    kept = forward(wing, formula, logits, target, k, compact)
    kept_before = copy.deepcopy(kept)
    dlogits = backward(wing, formula, grad, logits, target, kept, k, compact)
    assert all(map(torch.equal, (logits, target, grad), before))
    assert all(map(torch.equal, kept, kept_before))
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (logits, target, grad, *kept) if tensor.numel()}
    assert dlogits.untyped_storage().data_ptr() not in theirs


@every_form
@both_families
@pytest.mark.parametrize("rows, classes", [(0, 5), (1, 1), (1, 5), (3, 1)])
def test_smallest_shapes(wing, formula, rows, classes, k, compact):
    logits, target = make_logits(rows, classes, torch.float32), make_index(rows, classes)
    kept, dlogits = roundtrip(wing, formula, logits, target, k, compact)
    slots = k if compact else min(k, 1)
    assert kept.rows.shape == ((rows,) if formula.family == "softmax" else (rows, 2))
    assert kept.state.shape == ((rows, 3) if formula.family == "softmax" else (rows, 2))
    assert kept.pick_index.shape == kept.pick_logit.shape == (rows, slots)
    assert dlogits.shape == (rows, classes)
    assert not dlogits.isnan().any()


@every_form
@both_families
def test_bits_do_not_depend_on_the_number_of_threads(wing, formula, k, compact):
    logits, target = make_logits(9, 4099, torch.float32), make_index(9, 4099)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            kept, dlogits = roundtrip(wing, formula, logits, target, k, compact)
        finally:
            torch.set_num_threads(threads)
        results.append((*kept, dlogits))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_compact_picks_stand_in_the_order_of_their_classes(wing):
    """On the CPU. Whoever merges the picks of blocks of classes relies on it, for the lowest class among equals."""
    for values, (rows, classes, k) in itertools.product((1, 3, 10**6), ((3, 40, 1), (5, 333, 40), (4, 20000, 1000))):
        logits = torch.randint(values, (rows, classes), generator=torch.Generator().manual_seed(k)).float()
        _, _, index, logit = wing.softmax_forward(logits, make_index(rows, classes), "nllr", [], k, -100, True)
        assert (index[:, 1:] > index[:, :-1]).all()
        assert torch.equal(logits.gather(1, index.long()), logit)
