"""A linear layer with a loss: sparse gradients."""

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CLASSES,
    ROWS,
    assert_same,
    cosines,
    each_layer,
    each_reduction,
    make_layer,
    make_upstream,
    picked_classes,
    value_and_grads,
)
from torch import nn

import fused_losses as fl
from cases import (
    CRL,
    HS_LR,
    LOSSES,
    SS_LR,
    each,
    make_index,
    make_target,
)


@each_reduction
@each_layer
@pytest.mark.parametrize("k", [1, 3, 50, 98])
@each(LOSSES)
def test_sparse_gradient_equals_the_dense_one(loss, k, normalize, reduction):
    (x, w, b), target = make_layer(), make_index(ROWS, CLASSES)
    target[2] = -100
    target[3] = target[0]
    layer = (x, w) if normalize else (x, w, b)
    upstream = make_upstream() if reduction == "none" else None

    def ours(x, w, b=None, sparse_grad=True):
        options = fl.LinearLossOptions(sparse_grad=sparse_grad)
        return loss.linear(x, w, target, linear_bias=b, k=k, reduction=reduction, normalize=normalize, options=options)

    sparse = value_and_grads(ours, *layer, upstream=upstream)
    dense = value_and_grads(lambda *tensors: ours(*tensors, sparse_grad=False), *layer, upstream=upstream)
    assert_same(sparse, dense)
    kept = target != -100
    logits = cosines(x, w, 1.0) if normalize else F.linear(x, w, b)
    for gradient in sparse[2:]:
        assert gradient.is_sparse
        assert torch.equal(gradient._indices()[0], picked_classes(logits[kept], target[kept], k))
        torch.sparse_coo_tensor(gradient._indices(), gradient._values(), gradient.shape, check_invariants=True)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SparseAdam(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)],
    ids=["SparseAdam", "SGD"],
)
@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_optimizers_take_sparse_gradients_and_touch_picked_rows_alone(optimizer, normalize, dtype):
    (x, w, b), target = make_layer(dtype=dtype), make_index(ROWS, CLASSES)
    parameters = [nn.Parameter(w)] if normalize else [nn.Parameter(w), nn.Parameter(b)]
    before = [parameter.detach().clone() for parameter in parameters]
    step = optimizer(parameters)
    bias = None if normalize else parameters[1]
    logits = cosines(x, w, 1.0) if normalize else F.linear(x, w, b)
    picked = picked_classes(logits, target, 3)
    losses = []
    for _ in range(3):
        value = HS_LR.linear(
            x,
            parameters[0],
            target,
            linear_bias=bias,
            k=3,
            normalize=normalize,
            options=fl.LinearLossOptions(sparse_grad=True),
        )
        step.zero_grad()
        value.backward()
        step.step()
        losses.append(value.item())
        if len(losses) == 1:
            for parameter, old in zip(parameters, before, strict=True):
                moved = (parameter.detach() != old).reshape(CLASSES, -1).any(1)
                assert torch.equal(moved.nonzero().squeeze(1), picked)
    assert losses[2] < losses[0]


def test_sparse_gradient_comes_coalesced():
    """Sorted, each class once. (AccumulateGrad forgets that it is so when it makes the gradient .grad.)"""
    (x, w, b), target = make_layer(), torch.full((ROWS,), 4)
    leaves = [w.requires_grad_(), b.requires_grad_()]
    value = CRL.linear(x, w, target, linear_bias=b, k=3, options=fl.LinearLossOptions(sparse_grad=True))
    for gradient in torch.autograd.grad(value, leaves):
        assert gradient.is_coalesced()
        classes = gradient.indices()[0]
        assert torch.equal(classes, classes.unique())


def test_sparse_gradients_accumulate():
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    w.requires_grad_()
    for rows in (slice(0, 4), slice(4, 7)):
        CRL.linear(
            x[rows], w, target[rows], k=3, reduction="sum", options=fl.LinearLossOptions(sparse_grad=True)
        ).backward()
    _, _, expected = value_and_grads(
        lambda x, w: CRL.linear(x, w, target, k=3, reduction="sum"), x, w.detach(), upstream=torch.tensor(1.0)
    )
    torch.testing.assert_close(w.grad.to_dense(), expected)


def test_sparse_gradients_under_autocast():
    (x, w, b), target = make_layer(dtype=torch.float32), make_index(ROWS, CLASSES)
    for leaf in (w, b):
        leaf.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = CRL.linear(x, w, target, linear_bias=b, k=3, options=fl.LinearLossOptions(sparse_grad=True))
    value.backward()
    for leaf in (w, b):
        assert leaf.grad.is_sparse
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad._nnz() <= ROWS * 4


@pytest.mark.parametrize(
    "options, target, got",
    [
        ({}, make_index(ROWS, CLASSES), "all 99 negatives"),
        ({"k": 99}, make_index(ROWS, CLASSES), "all 99 negatives"),
        ({"ratio": 1.0}, make_index(ROWS, CLASSES), "all 99 negatives"),
        ({"k": 3}, make_target("multihot", ROWS, CLASSES), "multi-hot targets"),
    ],
    ids=["all", "k", "ratio", "multihot"],
)
def test_sparse_grad_where_the_gradient_is_dense(options, target, got):
    x, w, _ = make_layer()
    with pytest.raises(ValueError, match=f"sparse_grad needs class indices or Labels, .* got {got}"):
        SS_LR.linear(x, w, target, options=fl.LinearLossOptions(sparse_grad=True), **options)
