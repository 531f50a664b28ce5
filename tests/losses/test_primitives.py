"""The primitives (log_odds, row_statistics, logistic_sums) and losses of the user's own made of them."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_losses as fl
import paper
from cases import (
    CRL,
    HS_LR,
    LR,
    SS_LR,
    assert_as_accurate,
    each,
    make_index,
    make_logits,
    make_multihot,
    value_and_grad,
)
from fused_losses.losses import LossSpec
from ranks import refusal

IGNORED = -100
ROWS, CLASSES = 6, 40
each_k = pytest.mark.parametrize("k", [None, 1, 5], ids=["all", "hardest", "5 hardest"])


def focal(d):
    return -(torch.sigmoid(-d) ** 2) * F.logsigmoid(d)


def generalised_cross_entropy(d):
    return (1 - torch.sigmoid(d) ** 0.7) / 0.7


def poly(d):
    return -F.logsigmoid(d) + torch.sigmoid(-d)


# The same as functions of the target's probability p: focal loss (Lin et al., arXiv 1708.02002, gamma 2), generalised
# cross-entropy (Zhang, Sabuncu, arXiv 1805.07836, q 0.7), Poly-1 (Leng et al., arXiv 2204.12511, epsilon 1).
OWN = {
    "focal": (focal, lambda p: -((1 - p) ** 2) * p.log()),
    "gce": (generalised_cross_entropy, lambda p: (1 - p**0.7) / 0.7),
    "poly": (poly, lambda p: -p.log() + 1 - p),
}
each_own = pytest.mark.parametrize("own", OWN.values(), ids=OWN.keys())


def rows_of(own, logits, target, k):
    """The paper's values of the rows, float64, differentiable; 0 in ignored rows."""
    counted = target != IGNORED
    p, _ = paper.target_and_wrong(logits[counted], target[counted], k)
    return torch.zeros(len(target), dtype=torch.float64).index_put((counted.nonzero().squeeze(1),), own[1](p))


def batch(dtype=torch.float64):
    target = make_index(ROWS, CLASSES)
    target[2] = IGNORED
    return make_logits(ROWS, CLASSES, dtype), target


# --- log-odds and sums ------------------------------------------------------------------------------------------------


@each_k
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_log_odds(k, dtype):
    logits, target = make_logits(ROWS, CLASSES, dtype), make_index(ROWS, CLASSES)
    upstream = torch.linspace(-1, 2, ROWS)
    ours, grad = value_and_grad(lambda z: fl.log_odds(z, target, k=k), logits, upstream)
    truth, true_grad = value_and_grad(lambda z: -paper.nllr(z, target, k), logits.double(), upstream)
    eager, eager_grad = value_and_grad(lambda z: -paper.nllr(z.float(), target, k).to(ours.dtype), logits, upstream)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and grad.dtype == dtype
    assert_as_accurate(ours, eager, truth, "log-odds")
    assert_as_accurate(grad, eager_grad, true_grad, "gradient")


@each_k
def test_row_statistics(k):
    logits, target = batch()
    logits[0, target[0]] = 100
    logits[1, target[1]] = -100
    found = fl.row_statistics(logits, target, k=k)
    counted = target != IGNORED
    negatives = logits.scatter(1, target.clamp(min=0)[:, None], -math.inf)
    expected = negatives.amax(1).masked_fill(~counted, 0)
    assert torch.equal(found.hardest_logit, expected)
    label = logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    assert torch.equal(found.target_logit, label.masked_fill(~counted, 0))
    assert torch.equal(found.correct, (label > negatives.amax(1)) & counted)
    assert found.correct[0] and not found.correct[1]
    assert torch.equal(found.log_odds, fl.log_odds(logits, target, k=k))
    assert (found.log_odds[2], found.correct[2]) == (0, False)


@each_k
def test_log_odds_and_target_logit_are_differentiable_together(k):
    logits, target = batch()

    def penalty(z):
        found = fl.row_statistics(z, target, k=k)
        return (found.log_odds.cos() + found.target_logit**2).sum()

    torch.autograd.gradcheck(penalty, logits.requires_grad_())
    assert not fl.row_statistics(logits, target, k=k).hardest_logit.requires_grad


@each_k
@pytest.mark.parametrize("gamma", [None, 0.0, 2.0, 0.7])
@pytest.mark.parametrize("form", ["index", "multihot"])
def test_logistic_sums(form, gamma, k):
    logits = make_logits(ROWS, CLASSES)
    target = make_index(ROWS, CLASSES) if form == "index" else make_multihot(ROWS, CLASSES)
    truth = logits.clone().requires_grad_()
    positive, negative = paper.positives(truth, target), paper.negatives(truth, target, k)
    expected = paper.positive_sum(truth, positive), paper.negative_sum(truth, negative, gamma or 0.0)
    ours = logits.clone().requires_grad_()
    sums = fl.logistic_sums(ours, target, gamma=gamma, k=k)
    for z, (pos, neg) in ((ours, sums), (truth, expected)):
        (pos * torch.arange(ROWS) - 3 * neg.sin()).sum().backward()
        assert z.grad is not None
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(ours.grad, truth.grad)


def test_one_row_and_ignored_rows():
    logits, target = batch()
    assert torch.equal(fl.log_odds(logits[0], target[0]), fl.log_odds(logits, target)[0])
    for part, whole in zip(fl.row_statistics(logits[0], target[0]), fl.row_statistics(logits, target), strict=True):
        assert torch.equal(part, whole[0])
    for part, whole in zip(fl.logistic_sums(logits[0], target[0]), fl.logistic_sums(logits, target), strict=True):
        assert torch.equal(part, whole[0]) and whole[2] == 0


def test_masked_negatives_have_no_hardest():
    logits = torch.full((1, 4), -math.inf)
    logits[0, 1] = 2.0
    found = fl.row_statistics(logits, torch.tensor([1]))
    assert found.hardest_logit.item() == -math.inf and found.log_odds.item() == math.inf and found.correct.item()


def test_second_derivatives_refuse():
    logits, target = batch()
    logits.requires_grad_()
    for value in (fl.log_odds(logits, target).sum(), fl.logistic_sums(logits, target)[1].sum()):
        (grad,) = torch.autograd.grad(value, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


# --- losses of one's own ----------------------------------------------------------------------------------------------


@each_own
@each_k
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "class weights"])
def test_own_loss_from_logits(own, k, reduction, weighted):
    logits, target = batch()
    weight = torch.linspace(0.2, 2, CLASSES, dtype=torch.float64) if weighted else None
    counts = (weight[target.clamp(min=0)] if weighted else torch.ones(ROWS)) * (target != IGNORED)

    def expected(z):
        rows = rows_of(own, z, target, k) * counts
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counts.sum()}[reduction]

    upstream = torch.linspace(-1, 2, ROWS) if reduction == "none" else torch.tensor(-1.7)
    options = {"k": k, "reduction": reduction, "weight": weight}
    truth = value_and_grad(expected, logits, upstream)
    torch.testing.assert_close(
        value_and_grad(lambda z: fl.softmax_loss(z, target, own[0], **options), logits, upstream), truth
    )
    criterion = fl.SoftmaxLoss(own[0], **options)
    torch.testing.assert_close(value_and_grad(lambda z: criterion(z, target), logits, upstream), truth)


@each_own
@pytest.mark.parametrize("k", [None, 1, 5, 30])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_own_loss_of_a_linear_layer(own, k, reduction):
    _, target = batch()
    x, w = make_logits(ROWS, 8, seed=1), make_logits(CLASSES, 8, seed=2) / 3
    criterion = fl.SoftmaxLoss(own[0], k=k, reduction=reduction)
    upstream = torch.linspace(-1, 2, ROWS) if reduction == "none" else torch.tensor(-1.7)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    loss, statistics = fl.linear_loss(*ours, target, loss=criterion, return_statistics=True)
    expected = criterion(F.linear(*theirs), target)
    torch.testing.assert_close(loss, expected)
    for value in (loss, expected):
        value.backward(upstream.to(value.dtype))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for got, of_logits in zip(statistics, fl.row_statistics(F.linear(x, w), target, k=k), strict=True):
        torch.testing.assert_close(got, of_logits)
        assert not got.requires_grad


def own_loss_of_shard(group, cases) -> list:
    shard, answers = fl.ClassShard.split(CLASSES, group), []
    for name, k, logits, target in cases:
        z = logits[:, shard.start : shard.stop].clone().requires_grad_()
        loss = fl.softmax_loss(z, target, OWN[name][0], k=k, shard=shard)
        loss.backward()
        answers.append((loss.detach(), z.grad))
    return answers


@pytest.mark.parametrize("ranks", [2, 3])
def test_own_loss_sharded(world, ranks):
    logits, target = batch()
    cases = [(name, k, logits, target) for name in OWN for k in (None, 5)]
    of_ranks = world.run(ranks, own_loss_of_shard, cases)
    for (name, k, *_), *parts in zip(cases, *of_ranks, strict=True):
        loss, grad = value_and_grad(lambda z, name=name, k=k: fl.softmax_loss(z, target, OWN[name][0], k=k), logits)
        for theirs, _ in parts:
            torch.testing.assert_close(theirs, loss)
        torch.testing.assert_close(torch.cat([part for _, part in parts], dim=1), grad)


@each_own
def test_own_loss_compiles(own):
    logits, target = batch(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: fl.softmax_loss(z, target, own[0], k=5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grad(compiled, logits), value_and_grad(lambda z: fl.softmax_loss(z, target, own[0], k=5), logits)
    )


@pytest.mark.parametrize("value, match", [
    (lambda d: d.sum(), r"one number per row, a Tensor of shape \(6,\), got \(\)"),
    (lambda d: 1.0, "got float"),
    (lambda d: d[:, None], r"got \(6, 1\)"),
], ids=["scalar", "number", "column"])  # fmt: skip
def test_what_value_must_give(value, match):
    logits, target = batch()
    with pytest.raises(ValueError, match=match):
        fl.softmax_loss(logits, target, value)


def test_value_must_be_a_function():
    logits, target = batch()
    for make in (lambda: fl.SoftmaxLoss(2.0), lambda: fl.softmax_loss(logits, target, 2.0)):
        with pytest.raises(TypeError, match="value must be a function of the log-odds"):
            make()


def test_value_may_be_assigned():
    logits, target = batch()
    criterion = fl.SoftmaxLoss(focal)
    criterion.value = poly
    assert torch.equal(criterion(logits, target), fl.softmax_loss(logits, target, poly))


# --- statistics beside the loss of a linear layer ---------------------------------------------------------------------


@each([CRL, LR, HS_LR, SS_LR])
@pytest.mark.parametrize("k", [1, 30, None])
@pytest.mark.parametrize("gradients", [False, True])
def test_statistics_of_a_linear_layer(loss, k, gradients):
    if k is None and loss.needs_k:
        k = CLASSES - 1
    _, target = batch()
    x, w = make_logits(ROWS, 8, seed=1), make_logits(CLASSES, 8, seed=2).requires_grad_(gradients)
    value, found = loss.linear(x, w, target, k=k, return_statistics=True)
    assert torch.equal(value, loss.linear(x, w, target, k=k))
    expected = fl.row_statistics(F.linear(x, w).detach(), target, k=k)
    torch.testing.assert_close(found[1:], expected[1:])
    if loss.family == "softmax":
        torch.testing.assert_close(found.log_odds, expected.log_odds)
    else:
        assert found.log_odds is None


def test_statistics_want_class_indices():
    x, w = make_logits(ROWS, 8), make_logits(CLASSES, 8)
    with pytest.raises(ValueError, match="class-index targets only"):
        LR.linear(x, w, make_multihot(ROWS, CLASSES), return_statistics=True)


# --- ignored rows, ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_a_loss_gives_for_an_ignored_row_does_not_count(reduction):
    """At d = 0, where it is called for such a row, this one is infinite."""
    logits, target = batch()
    counted = target != IGNORED
    ours, grad = value_and_grad(
        lambda z: fl.softmax_loss(z, target, lambda d: 1 / d, reduction=reduction), logits, torch.tensor(2.0).expand(
            (ROWS,) if reduction == "none" else ())
    )  # fmt: skip
    expected = fl.softmax_loss(logits[counted], target[counted], lambda d: 1 / d, reduction=reduction)
    torch.testing.assert_close(ours[counted] if reduction == "none" else ours, expected)
    assert ours.isfinite().all() and (grad[2] == 0).all() and grad.isfinite().all()


def test_coefficients_are_zeros_where_nothing_counts(backend):
    """Their share of a mean over nothing is 0 / 0."""
    spec = LossSpec("cross_entropy", [], None, 0, IGNORED, 0, CLASSES, False)
    target = torch.full((3,), IGNORED)
    loss, coefficients = backend.finish(torch.zeros(3, 3), target, None, "mean", *spec)
    assert loss.isnan() and (coefficients == 0).all()


def statistics_of_shard(group) -> list:
    shard = fl.ClassShard.split(CLASSES, group)
    logits, target = batch()
    x, w = make_logits(ROWS, 8, seed=1), make_logits(CLASSES, 8, seed=2)
    mine = slice(shard.start, shard.stop)
    _, of_linear = fl.linear_loss(x, w[mine], target, loss=fl.LRLoss(), shard=shard, return_statistics=True)
    return [
        fl.row_statistics(logits[:, mine], target, shard=shard),
        fl.row_statistics(logits[:, mine], target, k=3, shard=shard),
        fl.logistic_sums(logits[:, mine], target, gamma=2.0, shard=shard),
        of_linear[1:],
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_statistics_sharded(world, ranks):
    logits, target = batch()
    x, w = make_logits(ROWS, 8, seed=1), make_logits(CLASSES, 8, seed=2)
    whole = [
        fl.row_statistics(logits, target),
        fl.row_statistics(logits, target, k=3),
        fl.logistic_sums(logits, target, gamma=2.0),
        fl.row_statistics(F.linear(x, w), target)[1:],
    ]
    for of_rank in world.run(ranks, statistics_of_shard):
        for got, expected in zip(of_rank, whole, strict=True):
            torch.testing.assert_close(tuple(got), tuple(expected))


def bad_label_beside_an_empty_shard(group) -> list[str]:
    rank = dist.get_rank(group)
    shard = fl.ClassShard((0, 10)[rank], 10, 10, group)
    logits, target = torch.zeros(3, len(shard)), torch.tensor([1, 10, 2])
    x, w = torch.zeros(3, 4), torch.zeros(len(shard), 4)
    return [
        refusal(fl.cross_entropy, logits, target, shard=shard),
        refusal(fl.log_odds, logits, target, shard=shard),
        refusal(fl.linear_cross_entropy, x, w, target, shard=shard),
    ]


def test_a_rank_without_classes_refuses_a_bad_label_too(world):
    """It enters no door, and would wait for the others."""
    for said in world.run(2, bad_label_beside_an_empty_shard):
        assert all(text.startswith("IndexError: Target 10 is out of bounds. (row 1, 10 classes)") for text in said)
