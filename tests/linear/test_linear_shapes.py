"""A linear layer with a loss: shapes, layouts, values that are not finite."""

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CLASSES,
    FEATURES,
    ROWS,
    assert_same,
    each_layer,
    each_reduction,
    each_way,
    k_of,
    make_layer,
    value_and_grads,
)

import fused_losses as fl
from cases import (
    CRL,
    LOSSES,
    LR,
    NLLR,
    SOFTMAX,
    SS_LR,
    each,
    each_form,
    make_index,
    make_target,
)


@each_reduction
@each_way
@each_form
def test_no_rows(loss, form, k, reduction):
    layer, k = make_layer(), k_of(loss, k)
    layer, target = (layer[0][:0], *layer[1:]), make_target(form, ROWS, CLASSES)[:0]
    upstream = torch.ones(0 if reduction == "none" else ())
    got = value_and_grads(
        lambda x, w, b: loss.linear(x, w, target, linear_bias=b, k=k, reduction=reduction), *layer, upstream=upstream
    )
    expected = loss(torch.empty(0, CLASSES, dtype=torch.float64), target, k=k, reduction=reduction)
    torch.testing.assert_close(got[0], expected, equal_nan=True)
    assert got[1].shape == (0, FEATURES)
    assert all((grad == 0).all() for grad in got[2:])


def test_no_rows_sparse():
    (x, w, _), options = make_layer(), fl.LinearLossOptions(sparse_grad=True)
    w.requires_grad_()
    CRL.linear(x[:0], w, torch.empty(0, dtype=torch.long), k=3, options=options).backward()
    assert w.grad._nnz() == 0


@each_way
@each(LOSSES)
def test_every_row_ignored(loss, k):
    layer, target = make_layer(), torch.full((ROWS,), -100)
    got = value_and_grads(lambda x, w, b: loss.linear(x, w, target, linear_bias=b, k=k_of(loss, k)), *layer)
    assert got[0].isnan()
    assert all((grad == 0).all() for grad in got[1:])


@each_reduction
@each_way
@each_form
def test_a_single_row_without_a_batch(loss, form, k, reduction):
    (x, w, b), target, k = make_layer(), make_target(form, ROWS, CLASSES)[3], k_of(loss, k)
    upstream = torch.tensor(-1.7)
    got = value_and_grads(
        lambda x, w, b: loss.linear(x, w, target, linear_bias=b, k=k, reduction=reduction),
        x[3],
        w,
        b,
        upstream=upstream,
    )
    assert got[0].shape == ()
    assert got[1].shape == (FEATURES,)
    expected = value_and_grads(
        lambda x, w, b: loss(F.linear(x, w, b), target, k=k, reduction=reduction), x[3], w, b, upstream=upstream
    )
    assert_same(got, expected)


@pytest.mark.parametrize("classes", [1, 2, 3])
@each((*SOFTMAX, LR, SS_LR))
def test_few_classes(loss, classes):
    layer, target = make_layer(classes=classes), make_index(ROWS, classes)
    got = value_and_grads(lambda x, w, b: loss.linear(x, w, target, linear_bias=b, reduction="sum"), *layer)
    if loss is NLLR and classes == 1:  # -inf, and no gradient to speak of
        assert got[0] == -torch.inf
        return
    assert_same(got, value_and_grads(lambda x, w, b: loss(F.linear(x, w, b), target, reduction="sum"), *layer))


@each_way
@each_layer
def test_strides_of_input_and_weight(normalize, k):
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    expected = value_and_grads(lambda x, w: CRL.linear(x, w, target, k=k, normalize=normalize), x, w)

    def apart(tensor):
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0]

    for lay_out in (lambda t: t.t().contiguous().t(), apart, lambda t: torch.cat((t, t), dim=1)[:, FEATURES:]):
        leaves = [lay_out(tensor).requires_grad_() for tensor in (x, w)]
        value = CRL.linear(*leaves, target, k=k, normalize=normalize)
        assert_same([value.detach(), *torch.autograd.grad(-1.7 * value, leaves)], expected)
    expanded = x[:1].expand(ROWS, FEATURES)
    assert_same([CRL.linear(expanded, w, target, k=k)], [CRL.linear(expanded.contiguous(), w, target, k=k)])


@each_way
@each_form
def test_arguments_are_never_modified(loss, form, k):
    x, w, b = (tensor.requires_grad_() for tensor in make_layer())
    target = make_target(form, ROWS, CLASSES)
    tensors = x, w, b, target
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    loss.linear(x, w, target, linear_bias=b, k=k_of(loss, k)).backward()
    for tensor, (kept, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, kept)
        assert tensor._version == version


@each_reduction
@each_way
@each(LOSSES)
def test_a_row_with_nan_is_nan_and_spoils_no_other(loss, k, reduction):
    (x, w, _), target, k = make_layer(), make_index(ROWS, CLASSES), k_of(loss, k)
    _, clean, _ = value_and_grads(lambda x, w: loss.linear(x, w, target, k=k, reduction="none"), x, w)
    x[2] = torch.nan
    value, dx, dw = value_and_grads(lambda x, w: loss.linear(x, w, target, k=k, reduction=reduction), x, w)
    others = torch.arange(ROWS) != 2
    assert dx[2].isnan().all()
    assert dx[others].isfinite().all()
    assert dw[target[2]].isnan().all()
    if reduction == "none":
        assert value[2].isnan()
        assert value[others].isfinite().all()
        torch.testing.assert_close(dx[others], clean[others])
    else:
        assert value.isnan()


@each(LOSSES)
def test_an_ignored_row_gives_literal_zeros_over_the_hardest(loss):
    """Even where its input, or the weight of a class that it might have picked, is not finite."""
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    target[2] = -100
    expected = value_and_grads(lambda x, w: loss.linear(x, w, target, k=3), x, w)
    x[2] = torch.nan
    assert_same(value_and_grads(lambda x, w: loss.linear(x, w, target, k=3), x, w), expected)
    w[0] = -torch.inf
    x[:] = x.abs().clamp(min=0.1)
    target[target == 0] = 1
    _, dx, _ = value_and_grads(lambda x, w: loss.linear(x, w, target, k=3), x, w)
    assert (dx[2] == 0).all()


def test_index_targets_of_any_integer_dtype():
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(CRL.linear(x, w, target.to(dtype), k=3), CRL.linear(x, w, target, k=3))
