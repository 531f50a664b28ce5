"""A linear layer with a loss: the same as linear and the loss from logits."""

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CLASSES,
    ROWS,
    assert_same,
    cosines,
    each_chunk,
    each_reduction,
    each_way,
    k_of,
    make_layer,
    make_upstream,
    value_and_grads,
)

import fused_losses as fl
from cases import (
    CRL,
    LOSSES,
    SS_LR,
    assert_as_accurate,
    each,
    each_form,
    make_index,
    make_target,
)


@each_chunk
@each_reduction
@each_way
@each_form
def test_equals_the_loss_from_logits(loss, form, k, reduction, chunk_bytes):
    """Values, dX, dW and dbias, under an upstream gradient that differs from row to row."""
    target, k = make_target(form, ROWS, CLASSES), k_of(loss, k)
    options = fl.LinearLossOptions(chunk_bytes=chunk_bytes)

    def ours(x, w, b):
        return loss.linear(x, w, target, linear_bias=b, k=k, reduction=reduction, options=options)

    def theirs(x, w, b):
        return loss(F.linear(x, w, b), target, k=k, reduction=reduction)

    layer, upstream = make_layer(), make_upstream() if reduction == "none" else None
    assert_same(value_and_grads(ours, *layer, upstream=upstream), value_and_grads(theirs, *layer, upstream=upstream))
    assert_same(
        value_and_grads(lambda x, w: ours(x, w, None), *layer[:2], upstream=upstream),
        value_and_grads(lambda x, w: theirs(x, w, None), *layer[:2], upstream=upstream),
    )


@each_chunk
@each_reduction
@each_way
@each_form
def test_cosine_logits(loss, form, k, reduction, chunk_bytes):
    """normalize=True, scale=s: as if input and weight had been normalised; gradients by what they were before."""
    target, k = make_target(form, ROWS, CLASSES), k_of(loss, k)
    options = fl.LinearLossOptions(chunk_bytes=chunk_bytes)
    shared = {"k": k, "reduction": reduction}
    layer, upstream = make_layer()[:2], make_upstream() if reduction == "none" else None
    layer[1][5] *= 1e3
    layer[1][6] *= 1e-3
    got = value_and_grads(
        lambda x, w: loss.linear(x, w, target, normalize=True, scale=16.0, options=options, **shared),
        *layer,
        upstream=upstream,
    )
    expected = value_and_grads(lambda x, w: loss(cosines(x, w, 16.0), target, **shared), *layer, upstream=upstream)
    assert_same(got, expected)


@each_way
def test_cosine_of_nothing_is_nothing(k):
    """All-zero rows of input and of weight, as F.normalize has them."""
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    x[2] = 0
    w[4] = w[target[1]] = 0
    got = value_and_grads(lambda x, w: CRL.linear(x, w, target, k=k, normalize=True, scale=16.0), x, w)
    assert_same(got, value_and_grads(lambda x, w: fl.crl_loss(cosines(x, w, 16.0), target, k=k), x, w))


@each_way
@each(LOSSES)
def test_hyper_parameters(loss, k):
    layer, target, k = make_layer(), make_index(ROWS, CLASSES), k_of(loss, k)
    for hyper in loss.hypers:
        got = value_and_grads(lambda x, w, b, h=hyper: loss.linear(x, w, target, linear_bias=b, k=k, **h), *layer)
        assert_same(got, value_and_grads(lambda x, w, b, h=hyper: loss(F.linear(x, w, b), target, k=k, **h), *layer))


@each_chunk
@each_reduction
@each_way
@each(LOSSES)
def test_class_weight_and_ignored_rows(loss, k, reduction, chunk_bytes):
    layer, target = make_layer(), make_index(ROWS, CLASSES)
    target[[1, 4]] = 9
    options = {"k": k_of(loss, k), "reduction": reduction, "ignore_index": 9, "weight": torch.linspace(0.1, 3, CLASSES)}
    how = fl.LinearLossOptions(chunk_bytes=chunk_bytes)
    upstream = make_upstream() if reduction == "none" else None
    got = value_and_grads(
        lambda x, w, b: loss.linear(x, w, target, linear_bias=b, options=how, **options), *layer, upstream=upstream
    )
    expected = value_and_grads(lambda x, w, b: loss(F.linear(x, w, b), target, **options), *layer, upstream=upstream)
    assert_same(got, expected)
    assert (got[1][[1, 4]] == 0).all()


@each(LOSSES)
def test_ratio_is_a_share_of_all_classes(loss):
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    assert torch.equal(loss.linear(x, w, target, ratio=0.05), loss.linear(x, w, target, k=5))


@pytest.mark.parametrize("k", [None, 7, 5000, 9998], ids=str)
@pytest.mark.parametrize("loss", [CRL, SS_LR], ids=str)
def test_many_classes_in_float32(loss, k):
    layer, target = make_layer(classes=9999, dtype=torch.float32), make_index(ROWS, 9999)
    target[3] = target[0]
    (hyper, *_), upstream = loss.hypers, make_upstream()
    got = value_and_grads(
        lambda x, w, b: loss.linear(x, w, target, linear_bias=b, k=k, reduction="none"), *layer, upstream=upstream
    )
    eager = value_and_grads(
        lambda x, w, b: loss.eager(F.linear(x, w, b), target, k, **hyper), *layer, upstream=upstream
    )
    double = [tensor.double() for tensor in layer]
    true = value_and_grads(
        lambda x, w, b: loss(F.linear(x, w, b), target, k=k, reduction="none"), *double, upstream=upstream
    )
    for name, *tensors in zip(("value", "dinput", "dweight", "dbias"), got, eager, true, strict=True):
        assert_as_accurate(*tensors, name)
