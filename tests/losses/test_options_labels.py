"""Labels: how they are made, and that they are the targets which they stand for."""

import pytest
import torch
import torch.nn.functional as F

import fused_losses as fl
import paper
from cases import CE, LOGISTIC, each, value_and_grad
from options import CLASSES, EVERY_LOSS, INDEX, ROWS, SCALE, SMOOTHED, make_logits, make_target, make_weight

WEIGHTED = ("one label", "two labels", "three labels", "duplicates", "padding", "rows without labels")


def same(loss, ours, theirs, **options):
    """Values and gradients with either target."""
    upstream = torch.tensor([1.0, -0.75, 0.5, 1.5, -0.25, 2.0], dtype=torch.float64)
    options = {"k": 5, "reduction": "none"} | options
    torch.testing.assert_close(
        *(value_and_grad(lambda z: loss(z, target, **options), make_logits(), upstream) for target in (ours, theirs)),
        rtol=1e-12,
        atol=1e-14,
    )


def lists_of(form):
    """Classes and weights of the rows, without empty places."""
    rows = [
        [(c, w) for c, w in zip(*row, strict=True) if c != -1]
        for row in zip(INDEX[form], make_weight(form).tolist(), strict=True)
    ]
    return [[c for c, _ in row] for row in rows], [[w for _, w in row] for row in rows]


@pytest.mark.parametrize("form", WEIGHTED)
@pytest.mark.parametrize("weighted", [True, False])
@each(EVERY_LOSS)
def test_lists_and_csr(loss, form, weighted):
    if loss.family == "softmax" and not weighted:
        return
    classes, weights = lists_of(form)
    expected = make_target(form, weighted)
    same(loss, fl.Labels.from_lists(classes, weights if weighted else None), expected)
    crow = torch.tensor([0, *(len(row) for row in classes)]).cumsum(0)
    col = torch.tensor([c for row in classes for c in row])
    flat = torch.tensor([w for row in weights for w in row], dtype=torch.float64) if weighted else None
    same(loss, fl.Labels.from_csr(crow, col, flat), expected)
    same(loss, fl.Labels.from_csr(crow.int(), col.int(), flat), expected)


@pytest.mark.parametrize("lam", [0.25, 0.0, 1.0, torch.tensor(0.25), torch.tensor([0.25, 0.5, 1.0, 0.0, 0.75, 0.125])])
@each(EVERY_LOSS)
def test_mixup(loss, lam):
    a, b = torch.tensor([7, 12, 0, 39, 20, 3]), torch.tensor([8, 12, 1, 0, 3, 20])
    weight = torch.as_tensor(lam, dtype=torch.float64).expand(ROWS)
    expected = fl.Labels(torch.stack((a, b), 1), torch.stack((weight, 1 - weight), 1))
    same(loss, fl.Labels.mixup(a, b, lam), expected)
    same(loss, fl.Labels.mixup(a.int(), b.int(), lam), expected)
    same(loss, fl.Labels.mixup(a, b, lam), fl.Labels.mixup(b, a, 1 - lam))


@each(EVERY_LOSS)
def test_a_mixup_of_a_class_with_itself_is_that_class(loss):
    a = torch.tensor([7, 12, 0, 39, 20, 3])
    options = {"label_smoothing": 0.1} if loss in SMOOTHED else {}
    same(loss, fl.Labels.mixup(a, a, 0.3), a, **options)


@each(EVERY_LOSS)
def test_one_label_of_weight_1_is_a_class_index(loss):
    a = torch.tensor([7, 12, 0, 39, 20, 3])
    for options in ({}, {"margin": fl.Margin(0.5, 0.1, SCALE)}, {"k": 39}, {"reduction": "mean"}, {"reduction": "sum"}):
        upstream = None if "reduction" in options else torch.linspace(-1, 2, ROWS)
        options = {"k": 5, "reduction": "none"} | options
        torch.testing.assert_close(
            *(
                value_and_grad(lambda z: loss(z, target, **options), make_logits(), upstream)
                for target in (a, fl.Labels(a[:, None], torch.ones(ROWS, 1)))
            )
        )


@pytest.mark.parametrize("form", WEIGHTED)
@pytest.mark.parametrize("k", [None, 1, 5, 39])
@each(LOGISTIC)
def test_labels_without_weights_are_the_multihot_rows(loss, k, form):
    if k is None and loss.needs_k:
        return
    dense = torch.zeros(ROWS, CLASSES)
    for row, classes in enumerate(lists_of(form)[0]):
        dense[row, classes] = 1
    same(loss, make_target(form, weighted=False), dense, k=k)
    for reduction in ("mean", "sum"):
        ours, theirs = (
            value_and_grad(lambda z: loss(z, target, k=k, reduction=reduction), make_logits())
            for target in (make_target(form, weighted=False), dense)
        )
        torch.testing.assert_close(ours, theirs)


def test_dense_soft_targets():
    logits, weight = make_logits(), torch.tensor([[0.5, 0.25, 0.25]] * ROWS, dtype=torch.float64)
    index = torch.tensor([[7, 30, 9], [12, 0, 5], [0, 39, 20], [39, 38, 37], [20, 21, 22], [3, 2, 1]])
    dense = torch.zeros(ROWS, CLASSES, dtype=torch.float64).scatter(1, index, weight)
    for places in (3, 5, CLASSES):  # zeros are no labels
        same(CE, fl.Labels.from_dense(dense, places), fl.Labels(index, weight), label_smoothing=0.1)
        labels = fl.Labels.from_dense(dense, places)
        value = fl.cross_entropy(logits, labels)
        torch.testing.assert_close(value, F.cross_entropy(logits, dense))
    dense[0, 8] = 2.0  # now the two largest are unique
    dense[1:, 7] = 0.75
    two = dense * (dense >= dense.topk(2).values[:, 1:])
    torch.testing.assert_close(
        fl.cross_entropy(logits, fl.Labels.from_dense(dense, 2), reduction="none"),
        F.cross_entropy(logits, two, reduction="none"),
    )


@pytest.mark.parametrize("form", ["one label", "three labels", "duplicates", "padding"])
@each(EVERY_LOSS)
def test_a_row_alone(loss, form):
    """Labels of (P,) beside logits (C,)."""
    index, weight = torch.tensor(INDEX[form])[0], make_weight(form)[0]
    for target in (fl.Labels(index, weight), *((fl.Labels(index),) if loss.family == "logistic" else ())):
        whole = fl.Labels(index[None], target.weight[None] if target.weight is not None else None)
        for reduction in ("none", "mean", "sum"):
            options = {"k": 5, "reduction": reduction, "margin": fl.Margin(0.25, 0.1, SCALE)}
            logits = make_logits()[0]
            value, grad = value_and_grad(lambda z: loss(z, target, **options), logits)
            of_batch, of_logits = value_and_grad(
                lambda z: loss(z, whole, **(options | {"reduction": "sum"})), logits[None]
            )
            assert value.shape == ()
            torch.testing.assert_close((value, grad), (of_batch, of_logits[0]))


@each(EVERY_LOSS)
def test_rows_without_labels(loss):
    """The softmax family ignores them, whatever their logits are; the logistic family has rows of negatives."""
    labels, logits = make_target("rows without labels"), make_logits()
    if loss.family == "softmax":
        logits[[1, 4]] = torch.nan
    rows, grad = value_and_grad(lambda z: loss(z, labels, k=5, reduction="none"), logits, torch.ones(ROWS))
    mean = loss(logits, labels, k=5)
    total = loss(logits, labels, k=5, reduction="sum")
    counted = 4 if loss.family == "softmax" else ROWS
    torch.testing.assert_close(mean, rows.sum() / counted)
    torch.testing.assert_close(total, rows.sum())
    assert ((rows[[1, 4]] == 0) == (loss.family == "softmax")).all()
    assert ((grad[[1, 4]] == 0).all(1) == (loss.family == "softmax")).all()


@each(EVERY_LOSS)
def test_a_batch_without_any_label(loss):
    labels = fl.Labels(torch.full((ROWS, 2), -1), torch.zeros(ROWS, 2))
    value, grad = value_and_grad(lambda z: loss(z, labels, k=5), make_logits())
    if loss.family == "softmax":
        assert value.isnan() and (grad == 0).all()
    else:
        true, of_logits = value_and_grad(
            lambda z: paper.logistic_rows(z, [{}] * ROWS, 5, **loss.hypers[0]).mean(), make_logits()
        )
        torch.testing.assert_close((value, grad), (true, of_logits))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64], ids=str)
def test_labels_of_any_integer_dtype_and_stride(dtype):
    index, weight = torch.tensor(INDEX["padding"]), make_weight("padding")
    wide = index.to(dtype).repeat_interleave(2, dim=1)[:, ::2]
    same(CE, fl.Labels(wide, weight.t().contiguous().t()), fl.Labels(index, weight))
    same(CE, fl.Labels(index.to(dtype), weight.half()), fl.Labels(index, weight))


def test_labels_are_not_modified():
    index, weight = torch.tensor(INDEX["padding"]), make_weight("padding")
    before = index.clone(), weight.clone()
    versions = index._version, weight._version
    for loss in EVERY_LOSS:
        loss(make_logits().requires_grad_(), fl.Labels(index, weight), k=5).backward()
    assert torch.equal(index, before[0]) and torch.equal(weight, before[1])
    assert (index._version, weight._version) == versions


def test_the_order_of_the_labels_does_not_matter():
    index, weight = torch.tensor(INDEX["three labels"]), make_weight("three labels")
    for loss in EVERY_LOSS:
        same(loss, fl.Labels(index.flip(1), weight.flip(1)), fl.Labels(index, weight))
