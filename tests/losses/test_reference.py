"""The doors themselves, in every backend that CPU tensors reach: both forms, statistics, picks, special rows, strides,
and what finish makes of the statistics."""

import copy
import itertools
import math

import pytest
import torch

import paper
from cases import (
    assert_as_accurate,
    assert_elementwise,
    compute_dtype,
    make_index,
    make_logits,
    make_multihot,
    make_target,
    signed_nan,
)
from doors import (
    CE,
    CRL,
    FORMS,
    LOG_ODDS,
    LOGISTIC,
    LR,
    NLLR,
    SOFTMAX,
    SS_LR,
    backward,
    forward,
    grad_like,
    paper_rows,
    paper_rows_and_grad,
)
from fused_losses import reference
from fused_losses.finish import finish

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INF, NAN = math.inf, math.nan
MEAN_SS_LR = SS_LR._replace(alpha=1.5)
FAMILIES = [CRL, SS_LR]  # one formula of each family, where the formula does not matter

every_form = pytest.mark.parametrize(
    "k, compact", FORMS, ids=[f"{k}-{'compact' if c else 'threshold'}" for k, c in FORMS]
)
both_forms = pytest.mark.parametrize("compact", [False, True], ids=["threshold", "compact"])
both_families = pytest.mark.parametrize("formula", FAMILIES, ids=str)


def roundtrip(backend, formula, logits, target, k=0, compact=False, ignore_index=-100, grad=None, part=None):
    """What forward keeps, and dlogits for an upstream gradient (random if not given)."""
    kept = forward(backend, formula, logits, target, k, compact, ignore_index, part)
    grad = grad_like(logits) if grad is None else grad
    return kept, backward(backend, formula, grad, logits, target, kept, k, compact, ignore_index, part)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, compact", [(0, False), (200_000, False), (200_000, True)])
@pytest.mark.parametrize("offset", [0.0, -1.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("formula", [CE, NLLR, CRL, *LOGISTIC], ids=str)
def test_many_equal_terms(backend, formula, dtype, offset, k, compact):
    """A plain sum of them rounds every time in the same direction. Training begins at equal logits."""
    logits, target = torch.full((1, 300_007), offset, dtype=dtype), torch.tensor([4])
    logits[0, 9] += 0.4  # the other terms of a softmax are no powers of two
    grad = grad_like(logits)
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact, grad=grad)
    plain, plain_dlogits = roundtrip(reference, formula, logits, target, k, compact, grad=grad)
    rows, gradient = paper_rows_and_grad(formula, logits, target, k, grad)
    assert_as_accurate(kept.loss, plain.loss, rows, "loss")
    assert_as_accurate(dlogits, plain_dlogits, gradient, "gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_many_equal_positives(backend, dtype):
    logits, target = torch.zeros(1, 1_000_003, dtype=dtype), torch.ones(1, 1_000_003, dtype=torch.bool)
    positive_sum = forward(backend, LR, logits, target).statistics[:, 2]
    plain = -torch.nn.functional.logsigmoid(logits).sum(1)
    assert_as_accurate(positive_sum, plain, torch.tensor([1_000_003 * math.log(2)], dtype=torch.float64), "sum")


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formula", SOFTMAX, ids=str)
def test_softmax_doors_agree_with_paper(backend, formula, dtype, k, compact):
    logits, target = make_logits(5, 33, dtype), make_index(5, 33)
    grad = grad_like(logits)
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact, grad=grad)
    value, gradient = paper_rows_and_grad(formula, logits, target, k, grad)
    assert kept.loss.dtype == kept.statistics.dtype == compute_dtype(dtype)
    assert dlogits.dtype == dtype
    atol = 1e-5 if kept.loss.dtype == torch.float32 else 1e-13
    assert_elementwise(kept.loss, value, "value", atol=atol)
    assert_elementwise(dlogits, gradient, "gradient")
    assert kept.coefficients.dtype == compute_dtype(dtype)


@every_form
@pytest.mark.parametrize("form", ["index", "multihot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formula", LOGISTIC, ids=str)
def test_logistic_doors_agree_with_paper(backend, formula, dtype, form, k, compact):
    logits, target = make_logits(5, 33, dtype), make_target(form, 5, 33)
    grad = grad_like(logits)
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact, grad=grad)
    value, gradient = paper_rows_and_grad(formula, logits, target, k, grad)
    assert kept.loss.dtype == kept.statistics.dtype == compute_dtype(dtype)
    assert dlogits.dtype == dtype
    assert_elementwise(kept.loss, value, "value")
    assert_elementwise(dlogits, gradient, "gradient")


@pytest.mark.parametrize("formula", [CE, NLLR, CRL, LR, SS_LR], ids=str)
@pytest.mark.parametrize("k", [1, 4, 32, 33, 40])
def test_compact_and_threshold_form_agree(backend, formula, k):
    """The same picks in the same arithmetic: only the kept form differs. Ties included."""
    logits, target = make_logits(7, 33).mul(2).round().div(2), make_index(7, 33)
    compact, of_compact = roundtrip(backend, formula, logits, target, k, True)
    threshold, of_threshold = roundtrip(backend, formula, logits, target, k, False)
    torch.testing.assert_close(compact.loss, threshold.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(compact.statistics, threshold.statistics, rtol=1e-14, atol=0)
    torch.testing.assert_close(of_compact, of_threshold, rtol=1e-14, atol=0)
    assert torch.equal(of_compact != 0, of_threshold != 0)


# --- picks and statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["index", "multihot"])
@pytest.mark.parametrize("k", [1, 4, 12, 13, 20])
def test_compact_picks_are_the_hardest_with_empty_slots_behind(backend, form, k):
    rows, classes = 6, 13
    logits = make_logits(rows, classes, torch.float32).round()  # many ties
    target = make_target(form, rows, classes)
    kept = forward(backend, LR, logits, target, k, True)
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
def test_threshold_pick_is_the_last_one_taken(backend, form, k):
    rows, classes = 6, 13
    logits = make_logits(rows, classes, torch.bfloat16).round()
    target = make_target(form, rows, classes)
    kept = forward(backend, LR, logits, target, k, False)
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
def test_all_negatives_keep_no_picks(backend, formula):
    logits = make_logits(4, 9, torch.float16)
    kept = forward(backend, formula, logits, make_index(4, 9))
    assert kept.pick_index.shape == kept.pick_logit.shape == (4, 0)
    assert kept.pick_index.dtype == torch.int32
    assert kept.pick_logit.dtype == torch.float16


@every_form
def test_softmax_statistics_are_largest_negative_logsumexp_and_target(backend, k, compact):
    logits, target = make_logits(5, 33), make_index(5, 33)
    m, l, z_y = forward(backend, CE, logits, target, k, compact).statistics.unbind(1)
    negatives = logits.masked_fill(~paper.negatives(logits, target, k or None), -INF)
    assert torch.equal(m, negatives.amax(1))
    assert torch.equal(z_y, logits[range(5), target])
    torch.testing.assert_close(l, (negatives - m[:, None]).exp().sum(1).log(), rtol=1e-13, atol=1e-15)


@every_form
def test_softmax_statistics_without_negatives_above_minus_inf(backend, k, compact):
    logits = torch.tensor([[-INF, 2.0, -INF], [-INF, -INF, -INF]])
    kept = forward(backend, CE, logits, torch.tensor([1, 1]), k, compact)
    assert kept.statistics[0].tolist() == [0.0, -INF, 2.0]
    assert kept.loss[0] == 0
    assert kept.loss[1].isnan()


@every_form
@pytest.mark.parametrize("formula", [LR, SS_LR, SS_LR._replace(params=[0.5], alpha=3.0)], ids=str)
def test_logistic_statistics_are_largest_negative_and_sums(backend, formula, k, compact):
    """Whatever alpha is: the means are made of them afterwards."""
    logits, gamma = make_logits(5, 33), formula.params[0] if formula.params else 0.0
    for target in (make_index(5, 33), make_multihot(5, 33)):
        m, neg, *last = forward(backend, formula, logits, target, k, compact).statistics.unbind(1)
        negative, positive = paper.negatives(logits, target, k or None), paper.positives(logits, target)
        assert torch.equal(m, logits.masked_fill(~negative, -INF).amax(1))
        torch.testing.assert_close(neg, paper.negative_sum(logits, negative, gamma), rtol=1e-13, atol=0)
        if target.dim() == 1:
            (z_y,) = last
            assert torch.equal(z_y, logits[range(5), target])
        else:
            pos, positives = last
            torch.testing.assert_close(pos, paper.positive_sum(logits, positive), rtol=1e-13, atol=0)
            assert torch.equal(positives, target.sum(1).double())


@pytest.mark.parametrize("formula", [CE, LR, SS_LR], ids=str)
@pytest.mark.parametrize("hardest", [0, 5000, 9000])
def test_the_largest_negative_of_a_long_row_is_found_in_every_part(backend, formula, hardest):
    logits = make_logits(2, 9001).clamp(max=9)
    logits[:, hardest] = 10.0
    assert forward(backend, formula, logits, torch.tensor([7, 8])).statistics[:, 0].tolist() == [10.0, 10.0]


@every_form
def test_logistic_statistics_without_negatives_above_minus_inf(backend, k, compact):
    logits = torch.tensor([[-INF, 2.0, -INF]])
    for target in (torch.tensor([1]), torch.tensor([[0, 1, 0]]), torch.ones(1, 3)):
        m, neg, *_ = forward(backend, SS_LR, logits, target, k, compact).statistics[0].tolist()
        assert (m, neg) == (-INF, 0)


@every_form
def test_a_nan_row_still_counts_its_positives(backend, k, compact):
    """They stand in the batch's normaliser, which is every other row's too."""
    logits, multihot = make_logits(5, 33), make_multihot(5, 33)
    logits[2, 7] = NAN
    _, neg, pos, positives = forward(backend, SS_LR, logits, multihot, k, compact).statistics.unbind(1)
    assert (neg.isnan() | pos.isnan()).tolist() == [False, False, True, False, False]
    assert torch.equal(positives, multihot.sum(1).double())


# --- finish -----------------------------------------------------------------------------------------------------------

# formula, form of the target, whether classes have weights
FINISHED = [
    (f, "index", weighted) for f in (LOG_ODDS, CE, NLLR, CRL, LR, SS_LR, MEAN_SS_LR) for weighted in (False, True)
]
FINISHED += [(f, "multihot", False) for f in (LR, SS_LR, MEAN_SS_LR)]
each_finished = pytest.mark.parametrize("formula, form, weighted", FINISHED, ids=str)
each_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def batch(form: str, weighted: bool, dtype: torch.dtype, rows: int = 7):
    """logits, target, weight over 11 classes; some rows are ignored where rows can be."""
    logits, weight = make_logits(rows, 11, dtype), None
    if form == "multihot":
        return logits, make_multihot(rows, 11), None
    target = make_index(rows, 11)
    target[2::3] = -100
    if weighted:
        weight = torch.linspace(0.5, 2, 11, dtype=compute_dtype(dtype))
    return logits, target, weight


def paper_batch(formula, logits, target, k, weight, reduction):
    """The loss in float64, reduced as F.cross_entropy does, and its gradient for an upstream gradient of ones."""
    z = logits.double().requires_grad_()
    if target.dim() == 2:
        rows = paper_rows(formula, z, target, k)
        loss = {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]
    else:
        kept = target != -100
        counts = torch.ones(11, dtype=torch.float64) if weight is None else weight.double()
        counts = counts[target.clamp(min=0)] * kept
        rows = torch.zeros(len(z), dtype=torch.float64)
        rows[kept] = paper_rows(formula, z[kept], target[kept], k)
        rows = rows * counts
        loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counts.sum()}[reduction]
    loss.backward(torch.ones_like(loss))
    return loss.detach(), z.grad


@each_reduction
@pytest.mark.parametrize("k, compact", [(0, False), (3, True), (3, False), (11, True)])
@each_finished
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reductions_weights_and_ignored_rows(backend, dtype, formula, form, weighted, k, compact, reduction):
    logits, target, weight = batch(form, weighted, dtype)
    kept = forward(backend, formula, logits, target, k, compact, weight=weight, reduction=reduction)
    truth, gradient = paper_batch(formula, logits, target, k, weight, reduction)
    assert kept.loss.shape == truth.shape
    assert_elementwise(kept.loss, truth, "loss", atol=1e-5 if dtype != torch.float64 else 1e-13)
    dlogits = backward(backend, formula, torch.ones_like(kept.loss), logits, target, kept, k, compact)
    assert_elementwise(dlogits, gradient, "gradient")
    spec = formula.spec(11, k, compact)
    for ours, theirs in zip(
        backend.finish(kept.statistics, target, weight, reduction, *spec), kept, strict=False
    ):  # what finish makes of the statistics later is what forward made of them
        assert torch.equal(ours, theirs)


@each_finished
def test_coefficients_are_the_derivatives_of_the_loss(backend, formula, form, weighted):
    """By the statistics that lead to the negatives and to the target: from autograd, through the values of the rows."""
    logits, target, weight = batch(form, weighted, torch.float64)
    for reduction in ("none", "sum", "mean"):
        kept = forward(backend, formula, logits, target, 3, True, weight=weight, reduction=reduction)
        statistics = kept.statistics.clone().requires_grad_()
        loss, _ = finish(statistics, target, None, weight, reduction, formula.spec(11, 3, True))
        (derivative,) = torch.autograd.grad(loss.sum(), statistics)
        by_second, by_third = derivative[:, 1], derivative[:, 2] * (1 if form == "index" else -1)
        torch.testing.assert_close(kept.coefficients, torch.stack((by_second, by_third), dim=1))


@each_reduction
@both_families
def test_nothing_to_reduce(backend, formula, reduction):
    for rows in (3, 0):
        logits, target = make_logits(rows, 5, torch.float32), torch.full((rows,), -100)
        kept, dlogits = roundtrip_reduced(backend, formula, logits, target, reduction)
        expected = torch.full((rows,) if reduction == "none" else (), NAN if reduction == "mean" else 0.0)
        torch.testing.assert_close(kept.loss, expected, equal_nan=True)
        assert (kept.coefficients == 0).all()
        assert (dlogits == 0).all()


def roundtrip_reduced(backend, formula, logits, target, reduction, grad=None, **options):
    kept = forward(backend, formula, logits, target, reduction=reduction, **options)
    grad = torch.ones_like(kept.loss) if grad is None else grad
    return kept, backward(backend, formula, grad, logits, target, kept)


@both_families
def test_a_weight_of_zero_is_not_an_ignored_row(backend, formula):
    """As torch: 0 * inf is NaN."""
    logits, target = make_logits(2, 5, torch.float32), torch.tensor([1, 2])
    logits[0, 1] = -INF
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    kept = forward(backend, formula, logits, target, weight=weight)
    assert kept.loss.isnan().tolist() == [True, False]
    assert (kept.coefficients[0] == 0).all()


def test_weights_of_any_stride(backend):
    logits, target, weight = batch("index", True, torch.float32)
    plain = forward(backend, CE, logits, target, weight=weight, reduction="mean")
    wide = torch.stack((weight, torch.full_like(weight, NAN)), dim=1)[:, 0]
    assert all(map(torch.equal, forward(backend, CE, logits, target, weight=wide, reduction="mean"), plain))
    same = torch.tensor(0.5).expand(11)
    expected = forward(backend, CE, logits, target, weight=same.contiguous(), reduction="sum")
    assert all(map(torch.equal, forward(backend, CE, logits, target, weight=same, reduction="sum"), expected))


@pytest.mark.parametrize("formula", [CRL, MEAN_SS_LR], ids=str)
def test_finish_never_reads_the_weight_of_a_target_that_is_no_class(backend, formula):
    """Such rows are NaN already, where nobody may raise."""
    logits, target, weight = batch("index", True, torch.float32)
    statistics = forward(backend, formula, logits, target).statistics
    spec = formula.spec(11)
    loss, coefficients = backend.finish(statistics, target, weight, "none", *spec)
    statistics[1] = NAN
    for bad in (11, 2**62, -1, -(2**63)):
        target[1] = bad
        now, of_now = backend.finish(statistics, target, weight, "none", *spec)
        assert now.isnan().nonzero().flatten().tolist() == of_now.isnan().any(1).nonzero().flatten().tolist() == [1]
        others = torch.arange(7) != 1
        assert torch.equal(now[others], loss[others])
        assert torch.equal(of_now[others], coefficients[others])


@pytest.mark.parametrize("formula", [CE, CRL, MEAN_SS_LR], ids=str)
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_nan_among_the_statistics_is_one_in_the_coefficients(backend, formula, column):
    if column == 0 and formula.family == "logistic":
        return  # m says nothing of the loss
    logits, target, weight = batch("index", True, torch.float32)
    statistics = forward(backend, formula, logits, target).statistics
    statistics[1, column] = NAN
    loss, coefficients = backend.finish(statistics, target, weight, "none", *formula.spec(11))
    assert loss.isnan().tolist() == [row == 1 for row in range(7)]
    assert coefficients.isnan().tolist() == [[row == 1] * 2 for row in range(7)]


@pytest.mark.parametrize("formula", [LR, MEAN_SS_LR], ids=str)
@pytest.mark.parametrize("column", [1, 2])
def test_a_nan_among_the_sums_of_a_multihot_row(backend, formula, column):
    logits, target, _ = batch("multihot", False, torch.float32)
    statistics = forward(backend, formula, logits, target).statistics
    statistics[1, column] = NAN
    loss, coefficients = backend.finish(statistics, target, None, "none", *formula.spec(11))
    assert loss.isnan().tolist() == [row == 1 for row in range(7)]
    assert coefficients.isnan().tolist() == [[row == 1] * 2 for row in range(7)]


@pytest.mark.parametrize("formula, form", [(CE, "index"), (MEAN_SS_LR, "index"), (MEAN_SS_LR, "multihot")], ids=str)
@each_reduction
def test_large_batches_give_the_same_bits_for_any_number_of_threads(backend, formula, form, reduction):
    rows = 9001
    logits, target, weight = batch(form, True, torch.float32, rows)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(forward(backend, formula, logits, target, weight=weight, reduction=reduction)[:2])
        finally:
            torch.set_num_threads(threads)
    if backend is not reference:  # torch's own sums are as they are
        assert all(map(torch.equal, results[0], results[1]))
        assert all(map(torch.equal, results[0], results[2]))
    truth, _ = paper_batch(formula, logits, target, 0, weight, reduction)
    assert_elementwise(results[0][0], truth, "loss", atol=1e-6)


# --- an index to ignore -----------------------------------------------------------------------------------------------


@every_form
@both_families
def test_without_an_index_to_ignore_every_number_is_a_class_or_bad(backend, formula, k, compact):
    logits, target = make_logits(4, 9, torch.float32), torch.tensor([0, 3, 8, 0])
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact, None)
    expected, expected_dlogits = roundtrip(backend, formula, logits, target, k, compact, -100)
    assert all(map(torch.equal, (*kept, dlogits), (*expected, expected_dlogits)))
    assert (dlogits != 0).any(1).all()
    for bad in (-100, -1, 9, -(2**63)):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            forward(backend, formula, logits, torch.tensor([0, bad, 8, 0]), k, compact, None)


# --- rows without a target of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", SOFTMAX, ids=str)
def test_shards_of_a_row_merge_to_the_whole_row(backend, formula):
    """A shard that does not hold the target gives its negatives' statistics, and from the merged ones its part of the
    gradient."""
    rows, cut, classes = 6, 5, 12
    logits, target = make_logits(rows, classes), make_index(rows, classes)
    grad = grad_like(logits)
    shards = [(logits[:, :cut], (0, classes)), (logits[:, cut:], (cut, classes))]
    kept = [forward(backend, formula, z, target, part=part) for z, part in shards]
    m_s, l_s, z_y_s = torch.stack([of_shard.statistics for of_shard in kept]).unbind(2)  # (shards, rows) each
    assert torch.equal(z_y_s == -INF, torch.stack([target >= cut, target < cut]))
    m = m_s.amax(0)
    l = torch.logsumexp(l_s + (m_s - m), dim=0)
    merged = torch.stack([m, l, z_y_s.amax(0)], dim=1)
    loss, coefficients = backend.finish(merged, target, None, "none", *formula.spec(classes))

    def finished(statistics, of_shard):
        return of_shard._replace(coefficients=coefficients, statistics=statistics)

    dlogits = [
        backward(backend, formula, grad, z, target, finished(merged, of_shard), part=part)
        for (z, part), of_shard in zip(shards, kept, strict=True)
    ]
    whole, of_whole = roundtrip(backend, formula, logits, target, grad=grad)
    torch.testing.assert_close(merged, whole.statistics, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat(dlogits, dim=1), of_whole, rtol=1e-12, atol=1e-15)


@every_form
def test_softmax_row_without_target_is_hopeless_but_has_statistics(backend, k, compact):
    logits = make_logits(3, 9)
    target = torch.tensor([5, 2, 12])
    logits[2, 4] = NAN
    kept = forward(backend, CE, logits, target, k, compact, part=(3, 13))
    assert kept.loss[1] == INF
    assert kept.statistics[1, 2] == -INF
    assert kept.statistics[1, 0] == logits[1].max()  # every class is a negative here
    assert kept.loss[2].isnan()
    assert kept.statistics[2].isnan().any()


@every_form
def test_logistic_row_without_target_has_only_negatives(backend, k, compact):
    logits = make_logits(3, 9)
    target = torch.tensor([5, 2, 12])
    logits[2, 4] = NAN
    grad = grad_like(logits)
    kept, dlogits = roundtrip(backend, SS_LR, logits, target, k, compact, grad=grad, part=(3, 13))
    no_positive = torch.zeros(3, 9, dtype=torch.bool)
    neg, gradient = paper_rows_and_grad(SS_LR, logits, no_positive, k, grad)
    m, ours, z_y = kept.statistics[1]
    assert m == logits[1].max()  # every class is a negative here
    assert_elementwise(ours, neg[1], "negative sum")
    assert z_y == -INF
    assert_elementwise(dlogits[1], gradient[1], "gradient")
    assert kept.loss[2].isnan()
    assert kept.statistics[2].isnan().any()
    assert dlogits[2].isnan().all()


@every_form
@both_families
def test_the_classes_beside_the_logits_own_are_elsewhere(backend, formula, k, compact):
    """Of a wider matrix: what stands there is not read either. And an ignored class may be here or there."""
    wide = make_logits(6, 15)
    wide[:, [2, 12]] = 50.0
    target, part, grad = torch.tensor([3, 11, 2, 12, 0, 14]), (3, 15), grad_like(wide)
    for ignore_index, ignored in ((-100, []), (3, [0]), (2, [2]), (12, [3])):
        kept, dlogits = roundtrip(backend, formula, wide[:, 3:12], target, k, compact, ignore_index, grad, part)
        here = torch.tensor([0, 8, -1, -1, -1, -1])
        positive = torch.arange(9) == here[:, None]
        z_y = wide[:, 3:12].where(positive, -INF).amax(1)
        z_y[ignored] = 0
        assert torch.equal(kept.statistics[:, 2], z_y)
        assert not dlogits[ignored].any()
        if formula.family == "logistic":
            value, expected = paper_rows_and_grad(formula, wide[:, 3:12], positive, k, grad)
            expected[ignored], value[ignored] = 0, 0
            with_target = here >= 0  # the value of the others is that of a target at -inf
            torch.testing.assert_close(kept.loss[with_target], value[with_target])
            torch.testing.assert_close(dlogits, expected)


@every_form
@both_families
@pytest.mark.parametrize("ignore_index", [-100, 3, 77, -1])
def test_ignored_rows_are_literal_zeros(backend, formula, ignore_index, k, compact):
    """Whatever the row and its upstream gradient hold; ignore_index is looked at before the class range."""
    logits = make_logits(4, 9, torch.float32)
    logits[0], logits[1] = NAN, INF
    target = torch.tensor([ignore_index, ignore_index, 5, ignore_index])
    grad = torch.tensor([NAN, INF, 1.0, NAN])
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact, ignore_index, grad)
    ignored = [0, 1, 3]
    assert (kept.loss[ignored] == 0).all()
    assert (kept.statistics[ignored] == 0).all()
    assert (kept.coefficients[ignored] == 0).all()
    assert (dlogits[ignored] == 0).all()
    assert kept.loss[2].isfinite()
    assert (dlogits[2] != 0).any()
    for everywhere in (NAN, INF):  # one number for all rows
        grad = torch.tensor(everywhere)
        _, dlogits = roundtrip(backend, formula, logits, target, k, compact, ignore_index, grad)
        assert (dlogits[ignored] == 0).all()


# --- special values ---------------------------------------------------------------------------------------------------


@every_form
@both_families
@pytest.mark.parametrize("sign", [1, -1], ids=["nan", "minus-nan"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["target", "hardest", "easiest"])
def test_nan_of_either_sign_spoils_its_row_and_no_other(backend, formula, sign, dtype, where, k, compact):
    logits, target = make_logits(3, 9, dtype), torch.tensor([1, 1, 1])
    clean, clean_dlogits = roundtrip(backend, formula, logits, target, k, compact)
    others = torch.arange(9) != 1
    column = {"target": 1, "hardest": logits[1].masked_fill(~others, -INF).argmax(), "easiest": logits[1].argmin()}[
        where
    ]
    logits[1, column] = signed_nan(sign, dtype)
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact)
    assert kept.loss[1].isnan()
    assert kept.coefficients[1].isnan().all()
    assert dlogits[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(kept.loss[row], clean.loss[row])
        assert torch.equal(kept.statistics[row], clean.statistics[row])
        assert torch.equal(dlogits[row], clean_dlogits[row])


@every_form
@pytest.mark.parametrize("formula, form", [(CRL, "index"), (SS_LR, "index"), (SS_LR, "multihot")], ids=str)
def test_nan_from_upstream_spoils_the_whole_row(backend, formula, form, k, compact):
    logits, target = make_logits(3, 9), make_target(form, 3, 9)
    _, dlogits = roundtrip(backend, formula, logits, target, k, compact, grad=torch.tensor([1.0, NAN, 1.0]).double())
    assert dlogits[1].isnan().all()
    assert dlogits[[0, 2]].isfinite().all()


@every_form
@pytest.mark.parametrize("formula, form", [(CRL, "index"), (SS_LR, "index"), (SS_LR, "multihot")], ids=str)
@pytest.mark.parametrize("coefficient", [0, 1])
def test_one_nan_coefficient_spoils_the_whole_row(backend, formula, form, coefficient, k, compact):
    """Also 0 * inf: the product with the upstream gradient is what counts."""
    logits, target, grad = make_logits(3, 9), make_target(form, 3, 9), torch.ones(3, dtype=torch.float64)
    kept = forward(backend, formula, logits, target, k, compact)
    for value, upstream in ((NAN, 1.0), (0.0, INF)):
        kept.coefficients[1] = 1
        kept.coefficients[1, coefficient], grad[1] = value, upstream
        dlogits = backward(backend, formula, grad, logits, target, kept, k, compact)
        assert dlogits[1].isnan().all()
        assert dlogits[[0, 2]].isfinite().all()


@every_form
@both_families
def test_masked_class_may_be_picked_last_and_gets_nothing(backend, formula, k, compact):
    logits, target = make_logits(4, 9), torch.tensor([0, 1, 2, 3])
    logits[:, 5:] = -INF
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact)
    assert kept.loss.isfinite().all()
    assert (dlogits[:, 5:] == 0).all()
    assert (dlogits[:, :5] != 0).any(1).all()
    if compact:
        assert ((kept.pick_index >= 0).sum(1) == min(k, 8)).all()
    # the finite classes see nothing of it
    _, expected = paper_rows_and_grad(formula, logits[:, :5], target, k, grad_like(logits))
    assert_elementwise(dlogits[:, :5], expected, "gradient")


# --- bad targets ------------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("bad", [7, -1, -101, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1])
def test_class_out_of_range_raises_in_torchs_words(backend, formula, bad):
    with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\. \(row 1, 7 classes\)"):
        forward(backend, formula, make_logits(3, 7), torch.tensor([0, bad, 6]))


@both_families
@pytest.mark.parametrize("bad", [10, -1, 2**63 - 1, -(2**63), -(2**63) + 1])
def test_class_out_of_range_of_all_shards(backend, formula, bad):
    """3 to 9 are the logits', 0 to 2 are another's; nobody has the others."""
    with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\. \(row 2, 10 classes\)"):
        forward(backend, formula, make_logits(3, 7), torch.tensor([0, 9, bad]), part=(3, 10))


@both_families
@pytest.mark.parametrize(
    "part", [(-1, 9), (4, 10), (1, 7), (-(2**63), 7), (2**63 - 1, 2**63 - 1), (0, -(2**63)), (0, 0)]
)
def test_parts_that_are_none(backend, formula, part):
    logits, target = make_logits(3, 7), torch.tensor([4, 5, 6])
    kept = forward(backend, formula, logits, target)
    for call in (
        lambda: forward(backend, formula, logits, target, part=part),
        lambda: backward(backend, formula, grad_like(logits), logits, target, kept, part=part),
    ):
        with pytest.raises((ValueError, OverflowError), match="class"):
            call()


@pytest.mark.parametrize("wrong", [torch.tensor(0.5), torch.tensor(2), torch.tensor(-1), torch.tensor(NAN)], ids=str)
def test_multihot_entries_other_than_0_and_1_raise(backend, wrong):
    target = make_multihot(3, 7).to(wrong.dtype)
    target[1, 2] = wrong
    with pytest.raises((ValueError, RuntimeError), match="0 or 1"):
        forward(backend, LR, make_logits(3, 7), target)


MULTI_HOT_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


@pytest.mark.parametrize("dtype", MULTI_HOT_DTYPES, ids=str)
def test_multihot_targets_of_any_dtype(backend, dtype):
    """Also -0.0, and 70 classes: a block that is all zeros and one that is not."""
    logits, target = make_logits(4, 200, torch.float32), make_multihot(4, 200)
    target[:, 64:128] = False
    of_dtype = target.to(torch.float32)
    if dtype.is_floating_point:
        of_dtype = torch.where(target, of_dtype, -0.0)
        assert of_dtype.signbit().any()
    of_dtype = of_dtype.to(dtype)
    grad = grad_like(logits)
    for k, compact in ((0, False), (5, True), (5, False)):
        expected, expected_dlogits = roundtrip(backend, LR, logits, target, k, compact, grad=grad)
        kept, dlogits = roundtrip(backend, LR, logits, of_dtype, k, compact, grad=grad)
        for ours, theirs in zip((*kept, dlogits), (*expected, expected_dlogits), strict=True):
            assert torch.equal(ours, theirs)
    if dtype != torch.bool:
        bits = of_dtype.view(torch.uint8).clone()
        bits[2, 70 * dtype.itemsize] ^= 2  # neither 0 nor 1: at a zero, a small number
        with pytest.raises((ValueError, RuntimeError), match=r"0 or 1.* row 2, class 70"):
            forward(backend, LR, logits, bits.view(dtype))


def test_nan_of_a_float8_without_minus_zero(backend):
    for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        target = torch.zeros(3, 7, dtype=torch.uint8)
        target[1, 2] = 0x80
        with pytest.raises((ValueError, RuntimeError), match="0 or 1"):
            forward(backend, LR, make_logits(3, 7), target.view(dtype))


# --- arguments that do not fit ----------------------------------------------------------------------------------------


@both_families
@both_forms
@pytest.mark.parametrize("bad", [9, 10**6, 2**31 - 1, -2, -(2**31)])
def test_picks_that_are_no_classes(backend, formula, compact, bad):
    logits, target = make_logits(3, 9, torch.float32), make_index(3, 9)
    kept = forward(backend, formula, logits, target, 4, compact)
    kept.pick_index[1, -1] = bad
    with pytest.raises(IndexError, match=r"Picks must be classes or -1, which those of row 1 are not\. \(9 classes\)"):
        backward(backend, formula, grad_like(logits), logits, target, kept, 4, compact)


@both_families
def test_picks_in_any_order(backend, formula):
    logits, target = make_logits(3, 40, torch.float32), make_index(3, 40)
    kept, dlogits = roundtrip(backend, formula, logits, target, 17, True)
    order = torch.randperm(17)
    shuffled = kept._replace(pick_index=kept.pick_index[:, order], pick_logit=kept.pick_logit[:, order])
    grad = grad_like(logits)
    torch.testing.assert_close(backward(backend, formula, grad, logits, target, shuffled, 17, True), dlogits)


def misfits(grad, target, kept):
    """Arguments of backward in the compact form, 4 picks of 3 rows, one of them of a wrong shape, dtype or device."""
    tensors = {"grad": grad, "target": target, **kept._asdict()}
    del tensors["loss"]
    for name, tensor in tensors.items():
        for wrong in (
            tensor[:2],
            torch.cat((tensor, tensor)),
            tensor[None],
            tensor[..., None],
            tensor[..., :0],
            tensor.to(torch.int16),
            tensor.to("meta"),
            *([] if name == "grad" else [tensor.flatten()[0]]),
        ):
            yield f"{name} {tuple(wrong.shape)} {wrong.dtype}", {**tensors, name: wrong}, {}
    for options in (
        {"k": 2**62},
        {"k": 2**31},
        {"k": -1},
        {"k": 3},
        {"num_classes": 0},
        {"num_classes": -5},
        {"num_classes": 2**31},
    ):
        yield str(options), tensors, options
    empty = {**tensors, "pick_index": kept.pick_index[:, :0], "pick_logit": kept.pick_logit[:, :0]}
    yield "rows * k overflows", empty, {"k": 2**62}
    yield "no picks", empty, {}


@both_families
def test_what_backward_refuses(backend, formula):
    logits, target = make_logits(3, 9, torch.float32), make_index(3, 9)
    kept = forward(backend, formula, logits, target, 4, True)
    for what, tensors, options in misfits(grad_like(logits), target, kept):
        num_classes = options.get("num_classes", 9)
        spec = formula.spec(9, options.get("k", 4), True)
        order = ("target", "statistics", "pick_index", "pick_logit")
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            backend.backward(
                tensors["grad"], tensors["coefficients"], None, *(tensors[name] for name in order), num_classes, *spec
            )  # fmt: skip
            pytest.fail(what)


@both_families
def test_what_forward_refuses(backend, formula):
    logits, target, weight, spec = make_logits(3, 9, torch.float32), make_index(3, 9), torch.ones(9), formula.spec(9)
    for wrong in (
        (logits[0], target, None, "none", *spec),
        (logits[None], target, None, "none", *spec),
        (logits[:, :0], target, None, "none", *spec),
        (logits.long(), target, None, "none", *spec),
        (logits, target[:2], None, "none", *spec),
        (logits, target[0], None, "none", *spec),
        (logits, target.int(), None, "none", *spec),
        (logits, target.float(), None, "none", *spec),
        (logits, target[:, None], None, "none", *spec),
        (logits, torch.zeros(3, 9, 1), None, "none", *spec),
        (logits, torch.zeros(3, 9, dtype=torch.complex64), None, "none", *spec),
        (logits, target.to("meta"), None, "none", *spec),
        (logits.to("meta"), target, None, "none", *spec),
        (logits, target, weight[:8], "none", *spec),
        (logits, target, weight[None], "none", *spec),
        (logits, target, weight.double(), "none", *spec),
        (logits, target, weight.to("meta"), "none", *spec),
        (logits, make_multihot(3, 9), weight, "none", *spec),
        (logits, target, None, "median", *spec),
        (logits, target, None, "none", *spec._replace(k=-1)),
        (logits, target, None, "none", *spec._replace(k=2**31)),
        (logits, target, None, "none", *spec._replace(k=2**62)),
        (logits, target, None, "none", *spec._replace(loss="nothing", params=[])),
        (logits, target, None, "none", *spec._replace(params=[1.0, 1.0, 1.0])),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            backend.forward(*wrong)
            pytest.fail(str(wrong[2:]))


@both_families
def test_what_finish_refuses(backend, formula):
    statistics, target, weight, spec = torch.zeros(3, 3), make_index(3, 9), torch.ones(9), formula.spec(9)
    for wrong in (
        (statistics[0], target, None, "none", *spec),
        (statistics[:2], target, None, "none", *spec),
        (statistics[:, :2], target, None, "none", *spec),
        (torch.zeros(3, 4), target, None, "none", *spec),
        (statistics.half(), target, None, "none", *spec),
        (statistics.long(), target, None, "none", *spec),
        (statistics.to("meta"), target, None, "none", *spec),
        (statistics, target[:2], None, "none", *spec),
        (statistics, target.int(), None, "none", *spec),
        (statistics, make_multihot(3, 9), None, "none", *spec),
        (statistics, target, weight[:8], "none", *spec),
        (statistics, target, weight.double(), "none", *spec),
        (statistics, target, None, "median", *spec),
        (statistics, target, None, "none", *spec._replace(loss="nothing", params=[])),
        (statistics, target, None, "none", *spec._replace(params=[1.0, 1.0, 1.0])),
        (statistics, target, None, "none", *spec._replace(all_classes=0)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            backend.finish(*wrong)
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
def test_strides_of_logits_do_not_matter(backend, formula, dtype, k, compact):
    logits, target = make_logits(5, 19, dtype), make_index(5, 19)
    expected, expected_dlogits = roundtrip(backend, formula, logits, target, k, compact)
    # torch's own vector and scalar loops, one per memory layout, differ in the last bits
    rtol = 16 * torch.finfo(compute_dtype(dtype)).eps
    dlogits_rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else rtol
    for name, view in strided(logits):
        kept, dlogits = roundtrip(backend, formula, view, target, k, compact)
        assert torch.equal(kept.pick_index, expected.pick_index), name
        assert torch.equal(kept.pick_logit, expected.pick_logit), name
        torch.testing.assert_close(kept.loss, expected.loss, rtol=rtol, atol=0, msg=name)
        torch.testing.assert_close(kept.statistics, expected.statistics, rtol=rtol, atol=0, msg=name)
        torch.testing.assert_close(dlogits, expected_dlogits, rtol=dlogits_rtol, atol=0, msg=name)
        assert dlogits.is_contiguous(), name


@every_form
@both_families
def test_expanded_logits(backend, formula, k, compact):
    row, target = make_logits(1, 19), make_index(5, 19)
    kept, dlogits = roundtrip(backend, formula, row.expand(5, 19), target, k, compact)
    expected, expected_dlogits = roundtrip(backend, formula, row.repeat(5, 1), target, k, compact)
    assert torch.equal(kept.pick_index, expected.pick_index)
    torch.testing.assert_close(kept.loss, expected.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(dlogits, expected_dlogits, rtol=1e-14, atol=0)


@every_form
@both_families
def test_strides_of_target_and_grad_do_not_matter(backend, formula, k, compact):
    logits, target = make_logits(5, 19), make_index(5, 19)
    grad = grad_like(logits)
    _, expected = roundtrip(backend, formula, logits, target, k, compact, grad=grad)
    wide_target = torch.stack([target, torch.full_like(target, 10**6)], dim=1)[:, 0]
    wide_grad = torch.stack([grad, torch.full_like(grad, NAN)], dim=1)[:, 0]
    _, dlogits = roundtrip(backend, formula, logits, wide_target, k, compact, grad=wide_grad)
    assert torch.equal(dlogits, expected)

    one = torch.tensor(0.37, dtype=torch.float64)
    _, expected = roundtrip(backend, formula, logits, target, k, compact, grad=one.repeat(grad.shape))
    for same in (one, one.expand(grad.shape)):
        _, dlogits = roundtrip(backend, formula, logits, target, k, compact, grad=same)
        assert torch.equal(dlogits, expected)

    same = target[:1].expand(5)
    _, expected = roundtrip(backend, formula, logits, same.contiguous(), k, compact, grad=grad)
    _, dlogits = roundtrip(backend, formula, logits, same, k, compact, grad=grad)
    assert torch.equal(dlogits, expected)


@both_forms
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64], ids=str
)
def test_multihot_of_any_dtype_and_stride(backend, dtype, compact):
    logits, target = make_logits(5, 19), make_multihot(5, 19)
    expected, expected_dlogits = roundtrip(backend, SS_LR, logits, target, 3, compact)
    for view in (target.to(dtype), target.to(dtype).t().contiguous().t()):
        kept, dlogits = roundtrip(backend, SS_LR, logits, view, 3, compact)
        assert all(map(torch.equal, kept, expected))
        assert torch.equal(dlogits, expected_dlogits)


@every_form
@pytest.mark.parametrize("formula, form", [(CRL, "index"), (SS_LR, "index"), (SS_LR, "multihot")], ids=str)
def test_doors_touch_none_of_their_arguments(backend, formula, form, k, compact):
    logits, target = make_logits(5, 19, torch.float32), make_target(form, 5, 19)
    grad = grad_like(logits)
    before = copy.deepcopy((logits, target, grad))
    kept = forward(backend, formula, logits, target, k, compact)
    kept_before = copy.deepcopy(kept)
    dlogits = backward(backend, formula, grad, logits, target, kept, k, compact)
    assert all(map(torch.equal, (logits, target, grad), before))
    assert all(map(torch.equal, kept, kept_before))
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (logits, target, grad, *kept) if tensor.numel()}
    assert dlogits.untyped_storage().data_ptr() not in theirs


@every_form
@both_families
@pytest.mark.parametrize("rows, classes", [(0, 5), (1, 1), (1, 5), (3, 1)])
def test_smallest_shapes(backend, formula, rows, classes, k, compact):
    logits, target = make_logits(rows, classes, torch.float32), make_index(rows, classes)
    kept, dlogits = roundtrip(backend, formula, logits, target, k, compact)
    slots = k if compact else min(k, 1)
    assert kept.loss.shape == (rows,)
    assert kept.coefficients.shape == (rows, 2)
    assert kept.statistics.shape == (rows, 3)
    assert kept.pick_index.shape == kept.pick_logit.shape == (rows, slots)
    assert dlogits.shape == (rows, classes)
    assert not dlogits.isnan().any()


@every_form
@both_families
def test_bits_do_not_depend_on_the_number_of_threads(backend, formula, k, compact):
    logits, target = make_logits(9, 4099, torch.float32), make_index(9, 4099)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            kept, dlogits = roundtrip(backend, formula, logits, target, k, compact)
        finally:
            torch.set_num_threads(threads)
        results.append((*kept, dlogits))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_compact_picks_stand_in_the_order_of_their_classes(backend):
    """On the CPU. Whoever merges the picks of blocks of classes relies on it, for the lowest class among equals."""
    for values, (rows, classes, k) in itertools.product((1, 3, 10**6), ((3, 40, 1), (5, 333, 40), (4, 20000, 1000))):
        logits = torch.randint(values, (rows, classes), generator=torch.Generator().manual_seed(k)).float()
        *_, index, logit = forward(backend, NLLR, logits, make_index(rows, classes), k, True)
        assert (index[:, 1:] > index[:, :-1]).all()
        assert torch.equal(logits.gather(1, index.long()), logit)
