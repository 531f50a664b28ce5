"""A linear layer with a loss: several passes, second derivatives; the same bits."""

import pytest
import torch
from layers import (
    CLASSES,
    ROWS,
    each_gradient,
    each_layer,
    each_reduction,
    each_way,
    make_exact_layer,
    make_layer,
    value_and_grads,
)

import fused_losses as fl
from cases import (
    CRL,
    make_index,
)


@each_reduction
@each_gradient
def test_retain_graph_and_gradients_that_are_the_callers_own(k, reduction, sparse_grad):
    x, w, b = (tensor.requires_grad_() for tensor in make_layer())
    options = fl.LinearLossOptions(sparse_grad=sparse_grad)
    value = CRL.linear(x, w, make_index(ROWS, CLASSES), linear_bias=b, k=k, reduction=reduction, options=options)
    value = value.sum()
    first = torch.autograd.grad(value, (x, w, b), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for factor in (3.0, 1.0):
        again = torch.autograd.grad(value * factor, (x, w, b), retain_graph=True)
        for grad, expected in zip(again, kept, strict=True):
            torch.testing.assert_close(grad.to_dense(), factor * expected.to_dense())
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@each_way
def test_a_weight_changed_between_forward_and_backward_is_noticed(k):
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    w.requires_grad_()
    value = CRL.linear(x, w, target, k=k)
    with torch.no_grad():
        w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@each_reduction
@each_gradient
@each_layer
def test_second_derivative_raises(k, normalize, reduction, sparse_grad):
    target, options = make_index(ROWS, CLASSES), fl.LinearLossOptions(sparse_grad=sparse_grad)
    for wanted in ((0,), (1,), (0, 1)):
        leaves = [tensor.requires_grad_(i in wanted) for i, tensor in enumerate(make_layer()[:2])]
        loss = CRL.linear(*leaves, target, k=k, reduction=reduction, normalize=normalize, options=options).sum()
        asked = [leaves[i] for i in wanted]
        grads = torch.autograd.grad(loss, asked, create_graph=True)
        for grad, plain in zip(grads, torch.autograd.grad(loss, asked, retain_graph=True), strict=True):
            torch.testing.assert_close(grad.detach().to_dense(), plain.to_dense())
        penalty = sum(grad.to_dense().pow(2).sum() for grad in grads)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss + penalty, asked)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@each_layer
def test_weight_gradient_has_the_same_bits_in_every_run_and_on_any_number_of_threads(normalize, sparse_grad):
    """Over the k hardest. Many rows share their classes, so that the order of the sums matters."""
    rows = 2000
    x, w, _ = make_exact_layer(rows, dtype=torch.float32)  # exact logits, inexact sums
    target = make_index(rows, CLASSES)
    options = fl.LinearLossOptions(sparse_grad=sparse_grad)
    threads = torch.get_num_threads()

    def grads():
        found = value_and_grads(lambda x, w: CRL.linear(x, w, target, k=5, normalize=normalize, options=options), x, w)
        return [tensor.to_dense() for tensor in found[1:]]

    expected = grads()
    try:
        for count in (1, 2, 3, threads, threads):
            torch.set_num_threads(count)
            for grad, other in zip(grads(), expected, strict=True):
                assert torch.equal(grad, other)
    finally:
        torch.set_num_threads(threads)
