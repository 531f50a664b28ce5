"""A linear layer with a loss: dtypes."""

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CLASSES,
    ROWS,
    assert_same,
    cosines,
    each_reduction,
    each_way,
    k_of,
    make_exact_layer,
    make_layer,
    make_upstream,
    value_and_grads,
)

import fused_losses as fl
from cases import (
    CRL,
    DTYPES,
    assert_as_accurate,
    assert_elementwise,
    compute_dtype,
    each_form,
    make_index,
    make_target,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_reduction
@each_way
@each_form
def test_precision(loss, form, k, reduction, dtype):
    """The tolerance rule: at most twice the error of torch's own linear and loss in the same dtype."""
    target, k = make_target(form, ROWS, CLASSES), k_of(loss, k)
    layer, upstream = make_exact_layer(dtype=dtype), make_upstream() if reduction == "none" else None
    (hyper, *_) = loss.hypers

    def reduced(rows):
        return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]

    for chunk_bytes in (1, None):
        options = fl.LinearLossOptions(chunk_bytes=chunk_bytes)
        got = value_and_grads(
            lambda x, w, b, o=options: loss.linear(x, w, target, linear_bias=b, k=k, reduction=reduction, options=o),
            *layer,
            upstream=upstream,
        )
        eager = value_and_grads(
            lambda x, w, b: reduced(loss.eager(F.linear(x, w, b), target, k, **hyper)), *layer, upstream=upstream
        )
        double = [tensor.double() for tensor in layer]
        true = value_and_grads(
            lambda x, w, b: loss(F.linear(x, w, b), target, k=k, reduction=reduction), *double, upstream=upstream
        )
        assert got[0].dtype == compute_dtype(dtype)
        assert {gradient.dtype for gradient in got[1:]} == {dtype}
        for name, *tensors in zip(("value", "dinput", "dweight", "dbias"), got, eager, true, strict=True):
            assert_as_accurate(*tensors, name)


# Over the k hardest not in 16 bits: rounded cosines may pick other classes than exact ones.
@pytest.mark.parametrize(
    "k, dtype", [*((None, dtype) for dtype in DTYPES), (3, torch.float64), (3, torch.float32)], ids=str
)
def test_precision_of_cosines(k, dtype):
    (x, w, _), target, upstream = make_layer(dtype=dtype), make_index(ROWS, CLASSES), make_upstream()
    (hyper, *_) = CRL.hypers
    options = {"k": k, "normalize": True, "scale": 8.0, "reduction": "none"}
    got = value_and_grads(lambda x, w: CRL.linear(x, w, target, **options), x, w, upstream=upstream)
    eager = value_and_grads(lambda x, w: CRL.eager(cosines(x, w, 8.0), target, k, **hyper), x, w, upstream=upstream)
    double = x.double(), w.double()
    true = value_and_grads(
        lambda x, w: CRL(cosines(x, w, 8.0), target, k=k, reduction="none"), *double, upstream=upstream
    )
    for name, *tensors in zip(("value", "dinput", "dweight"), got, eager, true, strict=True):
        assert_as_accurate(*tensors, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_way
def test_weight_gradients_of_16_bits_are_summed_in_32(k, dtype):
    """500 chunks, each less than a rounding unit of the sum: summed in 16 bits, most would be lost."""
    rows = 500
    x, w, b = torch.ones(rows, 1, dtype=dtype), torch.zeros(CLASSES, 1, dtype=dtype), torch.zeros(CLASSES, dtype=dtype)
    target = torch.full((rows,), 5)
    options = fl.LinearLossOptions(chunk_bytes=1)
    _, _, dweight, dbias = value_and_grads(
        lambda x, w, b: fl.linear_cross_entropy(x, w, target, linear_bias=b, k=k, reduction="sum", options=options),
        *(x, w, b),
    )
    _, _, true_dweight, true_dbias = value_and_grads(
        lambda x, w, b: fl.cross_entropy(F.linear(x, w, b), target, k=k, reduction="sum"),
        *(tensor.double() for tensor in (x, w, b)),
    )
    assert_elementwise(dweight, true_dweight, "dweight")
    assert_elementwise(dbias, true_dbias, "dbias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_reduction
@each_way
def test_autocast(k, dtype, reduction):
    """As if input, weight and bias had been cast, backward inside or outside; but float32 parameters get the gradients
    as they were summed, in float32."""
    layer, target = make_layer(dtype=torch.float32), make_index(ROWS, CLASSES)
    options, upstream = {"k": k, "reduction": reduction}, make_upstream().float()

    def step(x, w, b):
        return CRL.linear(x, w, target, linear_bias=b, **options)

    def inside(*leaves):
        with torch.autocast("cpu", dtype=dtype):
            return step(*leaves)

    upstream = upstream if reduction == "none" else upstream[0]
    outside = value_and_grads(inside, *layer, upstream=upstream)
    with torch.autocast("cpu", dtype=dtype):
        assert_same(value_and_grads(step, *layer, upstream=upstream), outside, rtol=0, atol=0)
    cast = value_and_grads(step, *(tensor.to(dtype) for tensor in layer), upstream=upstream)
    assert torch.equal(outside[0], cast[0])
    for ours, rounded in zip(outside[1:], cast[1:], strict=True):
        assert ours.dtype == torch.float32
        assert_elementwise(rounded, ours, "rounded", atol=torch.finfo(dtype).smallest_normal)
    assert (outside[2].to(dtype).float() != outside[2]).any()


@each_way
def test_autocast_of_cosines(k):
    """Normalised in float32, cast for the product."""
    (x, w, _), target = make_layer(dtype=torch.float32), make_index(ROWS, CLASSES)
    expected = CRL.linear(F.normalize(x) * 8, F.normalize(w), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = CRL.linear(x, w, target, normalize=True, scale=8.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone():
    """As F.linear: float64 is not eligible for autocast."""
    (x, w, b), target = make_layer(), make_index(ROWS, CLASSES)
    expected = CRL.linear(x, w, target, linear_bias=b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CRL.linear(x, w, target, linear_bias=b), expected)
        with pytest.raises(RuntimeError, match=r"one dtype, but got torch\.float64 and torch\.bfloat16"):
            CRL.linear(x, w.float(), target)


@each_way
def test_gradscaler_in_float16(k):
    """Gradients of logits that float16 cannot hold before the scaler's factor reaches them, but holds after."""
    (x, w, _), target = make_exact_layer(dtype=torch.float16), make_index(ROWS, CLASSES)
    small, factor = 2.0**-20, torch.tensor(2.0**20)
    _, dx, dw = value_and_grads(lambda x, w: small * CRL.linear(x, w, target, k=k), x, w, upstream=factor)
    double = x.double(), w.double()
    _, true_dx, true_dw = value_and_grads(lambda x, w: CRL.linear(x, w, target, k=k), *double, upstream=factor / 2**20)
    torch.testing.assert_close(dx.double(), true_dx, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(dw.double(), true_dw, rtol=2e-3, atol=1e-3)
