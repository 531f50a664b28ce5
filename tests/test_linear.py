"""A linear layer with a loss is the layer followed by the loss from logits: values, gradients, options, errors; and
what is never held in memory."""

import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses as fl
from cases import (
    CRL,
    DTYPES,
    HS_LR,
    LOGISTIC,
    LOSSES,
    LR,
    NLLR,
    SOFTMAX,
    SS_LR,
    assert_as_accurate,
    assert_elementwise,
    compute_dtype,
    each,
    each_form,
    make_index,
    make_target,
)
from fused_losses import linear_autograd, linear_rows

ROWS, FEATURES, CLASSES = 7, 8, 100
WAYS = {"all": None, "picks": 3, "dense": 50}  # how the gradients of 100 classes are computed for k of them
CHUNKS = {"one row": 1, "three rows": 3 * CLASSES * 8, "one chunk": None}

each_way = pytest.mark.parametrize("k", WAYS.values(), ids=WAYS.keys())
each_gradient = pytest.mark.parametrize(
    "k, sparse_grad",
    [(None, False), (3, False), (50, False), (3, True), (50, True)],
    ids=["all", "picks", "dense", "sparse picks", "sparse"],
)
each_chunk = pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS.keys())
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
each_layer = pytest.mark.parametrize("normalize", [False, True], ids=["linear", "cosine"])


def k_of(loss, k, classes=CLASSES):
    return classes - 1 if k is None and loss.needs_k else k


def make_layer(rows=ROWS, features=FEATURES, classes=CLASSES, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """input (rows, features), weight (classes, features), bias (classes,)."""
    generator = torch.Generator().manual_seed(rows + features + classes)
    shapes = (rows, features), (classes, features), (classes,)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)


def make_exact_layer(rows=ROWS, features=FEATURES, classes=CLASSES, dtype=torch.float64):
    """Multiples of 1/4 whose logits no dtype rounds: the picks, ties and all, are the same in every precision."""
    generator = torch.Generator().manual_seed(rows + features + classes)
    shapes = (rows, features), (classes, features), (classes,)
    return tuple((torch.randint(-2, 3, shape, generator=generator) / 2).to(dtype) for shape in shapes)


def make_upstream(rows=ROWS) -> Tensor:
    return torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def cosines(x: Tensor, w: Tensor, scale: float) -> Tensor:
    return scale * F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).t()


def value_and_grads(function, *tensors: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """function(*tensors), and the gradient by each of (upstream * it).sum(), at copies of the tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    upstream = torch.tensor(-1.7) if upstream is None else upstream
    value.backward(upstream.to(value.dtype).expand(value.shape))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerance) -> None:
    for name, ours, theirs in zip(("value", "dinput", "dweight", "dbias"), got, expected, strict=False):
        assert ours.dtype == theirs.dtype, name
        torch.testing.assert_close(ours.to_dense(), theirs, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    assert len(got) == len(expected)


class Watch(TorchDispatchMode):
    """The ops that ran, and the size of the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket.__name__)
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.layout == torch.strided and not func.is_view:
                self.largest = max(self.largest, made.numel())
        return result


@pytest.fixture
def glass_house(monkeypatch):
    """The layer's ops as the plain functions behind them, so that a dispatch mode sees what they do inside."""
    for name in (
        "linear_forward",
        "linear_forward_picks",
        "linear_at_once",
        "linear_backward",
        "linear_backward_picks",
        "linear_backward_sparse",
        "class_norms",
    ):
        monkeypatch.setattr(linear_autograd, name, getattr(linear_rows, f"_{name}"))


# --- the same as linear and the loss from logits ----------------------------------------------------------------------


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


# --- blocks of classes ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[8, 13, 40], ids=lambda least: f"blocks of {least}")
def small_blocks(request, monkeypatch):
    """Over the k hardest of 100 classes, several blocks of them, in chunks of two rows."""
    monkeypatch.setattr(linear_rows, "LEAST_BLOCK", request.param)
    monkeypatch.setattr(linear_rows, "LEAST_BLOCK_PER_PICK", 2)
    return fl.LinearLossOptions(chunk_bytes=2 * request.param * 8)


@each_reduction
@each_layer
@pytest.mark.parametrize("k", [1, 3, 4])
@each(LOSSES)
def test_blocks_of_classes_change_nothing(small_blocks, loss, k, normalize, reduction):
    """Ignored rows, whose index is a class in some block, among them."""
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    target[[1, 4]] = 9
    target[2] = 0
    target[3] = CLASSES - 1
    upstream = make_upstream() if reduction == "none" else None
    options = {"k": k, "reduction": reduction, "ignore_index": 9, "weight": torch.linspace(0.1, 3, CLASSES)}
    got = value_and_grads(
        lambda x, w: loss.linear(x, w, target, normalize=normalize, options=small_blocks, **options),
        *(x, w),
        upstream=upstream,
    )
    expected = value_and_grads(
        lambda x, w: loss(cosines(x, w, 1.0) if normalize else F.linear(x, w), target, **options),
        *(x, w),
        upstream=upstream,
    )
    assert_same(got, expected)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("values", [1, 2, 5], ids=lambda values: f"{values} values")
@each(LOSSES)
def test_blocks_of_classes_pick_the_lowest_class_among_equals(small_blocks, loss, k, values):
    """Ties within a block and from block to block; the weight's gradient tells which classes were picked."""
    x = torch.ones(ROWS, 1, dtype=torch.float64)
    w = torch.randint(values, (CLASSES, 1), generator=torch.Generator().manual_seed(k)).double()
    target = make_index(ROWS, CLASSES)
    upstream = make_upstream()
    shared = {"k": k, "reduction": "none"}
    got = value_and_grads(
        lambda x, w: loss.linear(x, w, target, options=small_blocks, **shared), x, w, upstream=upstream
    )
    assert_same(got, value_and_grads(lambda x, w: loss(F.linear(x, w), target, **shared), x, w, upstream=upstream))


NOT_FINITE = {
    "a masked class": [(50, -torch.inf)],
    "a block of masked classes": [(column, -torch.inf) for column in range(16, 56)],
    "every other class masked": [(column, -torch.inf) for column in range(CLASSES) if column != 9],
    "a certain negative": [(7, torch.inf)],
    "a lost target": [(9, -torch.inf)],
    "a certain target": [(9, torch.inf)],
    "a NaN that may not be picked": [(7, torch.nan)],
}


@pytest.mark.parametrize("entries", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@each(LOSSES)
def test_blocks_of_classes_with_logits_that_are_not_finite(small_blocks, loss, entries):
    w, target = make_layer()[1][:, :1].clone(), torch.tensor([9])
    for column, value in entries:
        w[column] = value
    x = torch.ones(1, 1, dtype=torch.float64)  # the logits are the weight
    ours = loss.linear(x, w, target, k=3, reduction="none", options=small_blocks)
    torch.testing.assert_close(ours, loss(w.t(), target, k=3, reduction="none"), equal_nan=True)


@each_layer
def test_blocks_of_classes_keep_to_their_budget(glass_house, small_blocks, normalize):
    x, w, _ = make_layer(64)
    with Watch() as watch, torch.no_grad():
        CRL.linear(x, w, make_index(64, CLASSES), k=2, normalize=normalize, options=small_blocks)
    candidates = 2 * (1 + 2 * -(-CLASSES // (small_blocks.chunk_bytes // 16)))
    assert watch.largest <= max(small_blocks.chunk_bytes // 8, candidates, 64 * FEATURES, CLASSES * FEATURES)
    assert watch.ops.count("mm") >= 64 // 2 * 3


# --- dtypes -----------------------------------------------------------------------------------------------------------


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


# --- what asks for no gradient costs none -----------------------------------------------------------------------------


@each_reduction
@each_way
@each(LOSSES)
def test_only_what_asks_for_a_gradient_gets_one(loss, k, reduction):
    layer, target, k = make_layer(), make_index(ROWS, CLASSES), k_of(loss, k)
    upstream = make_upstream() if reduction == "none" else torch.tensor(1.0, dtype=torch.float64)

    def grads(wanted):
        x, w, b = (tensor.clone().requires_grad_(want) for tensor, want in zip(layer, wanted, strict=True))
        loss.linear(x, w, target, linear_bias=b, k=k, reduction=reduction).backward(upstream)
        return x.grad, w.grad, b.grad

    full = grads((True, True, True))
    for wanted in itertools.product((True, False), repeat=3):
        if any(wanted):
            for grad, want, expected in zip(grads(wanted), wanted, full, strict=True):
                if want:
                    torch.testing.assert_close(grad, expected)
                else:
                    assert grad is None


@each_way
def test_a_gradient_nobody_wants_is_not_computed(glass_house, k):
    layer, target = make_layer(), make_index(ROWS, CLASSES)
    for frozen, spared in ((1, "addmm_"), (0, "mm")):
        x, w = (tensor.clone().requires_grad_(i != frozen) for i, tensor in enumerate(layer[:2]))
        with Watch() as watch:
            CRL.linear(x, w, target, k=k).backward()
        forward = [op for op in watch.ops if op == "mm"]
        assert len(forward) <= (1 if frozen == 0 else 2)
        if spared == "addmm_":
            assert spared not in watch.ops


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_way
@each(LOSSES)
def test_evaluation_computes_no_gradient(glass_house, loss, k, mode):
    (x, w, _), target, k = make_layer(), make_index(ROWS, CLASSES), k_of(loss, k)
    w.requires_grad_()
    with mode(), Watch() as watch:
        value = loss.linear(x, w, target, k=k)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.linear(x, w, target, k=k).detach())
    assert watch.ops.count("mm") == 1
    assert not {"addmm_", "softmax_backward", "logistic_backward", "_embedding_bag"} & set(watch.ops)


# --- memory -----------------------------------------------------------------------------------------------------------


@each_reduction
@each_gradient
@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each((CRL, HS_LR))
def test_nothing_of_the_size_of_all_logits_is_made(glass_house, loss, normalize, k, sparse_grad, reduction, dtype):
    """Nothing larger than a chunk of logits or, where it is dense, the gradient of the weight."""
    check_sizes(loss, "index", normalize, k_of(loss, k, 1000), sparse_grad, reduction, dtype)


@each_reduction
@each_way
@each_layer
@each(LOGISTIC)
def test_nothing_of_the_size_of_multihot_targets_is_made(glass_house, loss, normalize, k, reduction):
    check_sizes(loss, "multihot", normalize, k_of(loss, k, 1000), False, reduction, torch.float32)


def check_sizes(loss, form, normalize, k, sparse_grad, reduction, dtype):
    rows, classes, features = 64, 2048, 4  # of which no row needs padding
    x, w, _ = make_layer(rows, features, classes, dtype)
    target = make_target(form, rows, classes)
    chunk = 5 * classes
    options = fl.LinearLossOptions(chunk_bytes=chunk * dtype.itemsize, sparse_grad=sparse_grad)
    x.requires_grad_()
    w.requires_grad_()
    with Watch() as watch:
        value = loss.linear(x, w, target, k=k, reduction=reduction, normalize=normalize, options=options)
        value.sum().backward()
    largest = max(chunk, (classes + 1) * features)
    assert watch.largest <= largest < rows * classes / 12
    if sparse_grad:
        picks = rows * (k + 1)
        assert watch.largest <= max(chunk, min(picks, classes) * features, picks)
        assert w.grad._nnz() <= picks


@pytest.mark.parametrize("normalize", [False, True])
def test_a_sparse_gradient_makes_none_of_the_size_of_the_weight(glass_house, normalize):
    rows, classes, features, k = 4, 5000, 16, 3
    x, w, _ = make_layer(rows, features, classes)
    w.requires_grad_()
    options = fl.LinearLossOptions(sparse_grad=True)
    value = CRL.linear(x, w, make_index(rows, classes), k=k, normalize=normalize, options=options)
    with Watch() as watch:
        value.backward()
    assert watch.largest <= rows * (k + 1) * features


@pytest.mark.parametrize("elements, most_rows", [(1, 1), (2 * CLASSES - 1, 1), (2 * CLASSES, 2), (10**9, 7)])
def test_chunks_of_rows_keep_to_their_budget(elements, most_rows):
    x, w, _ = make_layer()
    chunks = [(rows, len(z)) for rows, _, z in linear_rows._Layer(w, None, None).chunks(x, elements)]
    assert max(length for _, length in chunks) == most_rows
    assert [row for rows, _ in chunks for row in range(ROWS)[rows]] == list(range(ROWS))
    assert len(chunks) == -(-ROWS // most_rows)


@each_way
def test_the_graph_holds_nothing_of_the_size_of_all_logits(k):
    rows, classes = 64, 2000
    x, w, _ = make_layer(rows, 4, classes)
    value = CRL.linear(x.requires_grad_(), w.requires_grad_(), make_index(rows, classes), k=k)
    held = [tensor for tensor in value.grad_fn.saved_tensors if tensor is not None]
    assert max(tensor.numel() for tensor in held) < rows * classes / 12


# --- sparse gradients -------------------------------------------------------------------------------------------------


def picked_classes(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """The targets and the k hardest of each row, sorted."""
    hardest = logits.scatter(1, target[:, None], -torch.inf).topk(k).indices
    return torch.cat((hardest.flatten(), target)).unique()


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
    with pytest.raises(ValueError, match=f"sparse_grad needs class-index targets .* got {got}"):
        SS_LR.linear(x, w, target, options=fl.LinearLossOptions(sparse_grad=True), **options)


# --- several passes, second derivatives -------------------------------------------------------------------------------


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


# --- the same bits ----------------------------------------------------------------------------------------------------


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


# --- shapes, layouts, values that are not finite ----------------------------------------------------------------------


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


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_reduction
@each_way
@pytest.mark.parametrize("loss, form", [(CRL, "index"), (HS_LR, "index"), (SS_LR, "multihot")], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_fullgraph_gives_the_same_numbers(loss, form, k, reduction):
    layer, target, k = make_layer(dtype=torch.float32), make_target(form, ROWS, CLASSES), k_of(loss, k)
    upstream = make_upstream() if reduction == "none" else None
    criterion = loss.module_class()(k=k, reduction=reduction)

    def step(x, w, b):
        return fl.linear_loss(2 * x, w, target, loss=criterion, linear_bias=b)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(value_and_grads(compiled, *layer, upstream=upstream), value_and_grads(step, *layer, upstream=upstream))


@pytest.mark.parametrize(
    "loss, k, normalize", [(CRL, None, True), (CRL, 2, True), (HS_LR, 2, False), (SS_LR, 50, False)]
)
@pytest.mark.usefixtures("fresh_compiler")
def test_at_most_two_graphs_over_changing_batch_sizes(loss, k, normalize):
    """One for the first size, one with a dynamic batch; N = 0 and N = 1 may add one each. Chunks of three rows."""
    counter = CompileCounterWithBackend("aot_eager")
    module = fl.LinearLoss(
        FEATURES,
        CLASSES,
        loss=loss.module_class()(k=k),
        normalize=normalize,
        options=fl.LinearLossOptions(chunk_bytes=3 * CLASSES * 4),
    )
    compiled = torch.compile(module, fullgraph=True, backend=counter)

    def check(rows):
        (x, *_), target = make_layer(rows, dtype=torch.float32), make_index(rows, CLASSES)
        for run in (compiled, module):
            module.zero_grad()
            value = run(x, target)
            value.backward()
            if run is compiled:
                expected = value.detach(), module.weight.grad
        torch.testing.assert_close(value.detach(), expected[0], equal_nan=True)
        torch.testing.assert_close(module.weight.grad, expected[1])

    for rows in (8, 16, 5, 33, 7, 2):
        check(rows)
    assert counter.frame_count <= 2
    for rows in (0, 1, 9, 0, 1):
        check(rows)
    assert counter.frame_count <= 4


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor():
    (x, w, _), target = make_layer(dtype=torch.float32), make_index(ROWS, CLASSES)

    def step(x, w):
        options = {"normalize": True, "scale": 8.0}
        return HS_LR.linear(x, w, target, k=3, **options) + CRL.linear(x, w, target, **options)

    assert_same(value_and_grads(torch.compile(step, fullgraph=True), x, w), value_and_grads(step, x, w))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_autocast():
    module = fl.LinearLoss(FEATURES, CLASSES, loss=fl.CRLLoss(k=3), bias=True)
    (x, *_), target = make_layer(dtype=torch.float32), make_index(ROWS, CLASSES)

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x, target)

    assert_same(value_and_grads(torch.compile(step, fullgraph=True, backend="aot_eager"), x), value_and_grads(step, x))


@pytest.mark.parametrize(
    "loss, form, k, normalize",
    [
        (CRL, "index", None, False),
        (CRL, "index", 3, True),
        (SS_LR, "index", 3, False),
        (SS_LR, "index", 50, True),
        (SS_LR, "multihot", 50, False),
    ],
    ids=str,
)
def test_opcheck(loss, form, k, normalize):
    """The raw ops are registered as torch wants them, with fake kernels that tell the truth."""
    ops = torch.ops.fused_losses
    (x, w, b), target = make_layer(dtype=torch.float32), make_target(form, ROWS, CLASSES)
    norms = w.norm(dim=1) if normalize else None
    params = {"crl": [1.5, 1.0], "ss_lr": [2.0]}[loss.door]
    layer = x, w, None if normalize else b, norms, target
    arguments = 3 * CLASSES, loss.family, loss.door, params, k or 0, -100
    picks = "_picks" if k == 3 else ""
    grad = torch.randn((ROWS,) if loss.family == "softmax" else (ROWS, 2))

    def opcheck(name, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dispatch test runs backward through an op that has none
            torch.library.opcheck(getattr(ops, name).default, args)

    opcheck(f"linear_forward{picks}", *layer, *arguments)
    _, *saved = getattr(ops, f"linear_forward{picks}")(*layer, *arguments)
    for wanted in ([True, True, not normalize], [True, False, False], [False, True, False]):
        opcheck(f"linear_backward{picks}", grad, *saved, *layer, *arguments, wanted)
        if not picks:
            opcheck("linear_at_once", grad, *layer, *arguments, wanted)


# --- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_of_nn_linear_and_linear_loss_are_interchangeable(bias):
    theirs = nn.Linear(FEATURES, CLASSES, bias=bias)
    ours = fl.LinearLoss(FEATURES, CLASSES, bias=bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, _, _ = make_layer(dtype=torch.float32)
    assert not torch.equal(ours.logits(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.logits(x), theirs(x))
    fresh = nn.Linear(FEATURES, CLASSES, bias=bias)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(x), theirs(x))


@pytest.mark.parametrize("bias", [False, True])
def test_initialisation_is_that_of_nn_linear(bias):
    torch.manual_seed(3)
    theirs = nn.Linear(FEATURES, CLASSES, bias=bias)
    torch.manual_seed(3)
    ours = fl.LinearLoss(FEATURES, CLASSES, bias=bias)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(getattr(ours, name), parameter)
    before = ours.weight.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.weight, before)


def test_logits_of_cosines_are_differentiable_and_copy_no_weight(monkeypatch):
    monkeypatch.setattr("fused_losses.linear.MIB", 100 * 300)
    x, w, _ = make_layer(3, 300, 500)
    module = fl.LinearLoss(300, 500, normalize=True, scale=16.0, dtype=torch.float64)
    module.weight = nn.Parameter(w)
    with torch.no_grad(), Watch() as watch:
        module.logits(x)
    assert watch.largest < w.numel()
    expected = value_and_grads(lambda x, w: cosines(x, w, 16.0).square().sum(), x, w)
    value = module.logits(x.requires_grad_()).square().sum()
    assert_same([value.detach(), *torch.autograd.grad(-1.7 * value, (x, module.weight))], expected)


@each_layer
@each(LOSSES)
def test_module_is_the_function_with_the_options_of_its_loss(loss, normalize):
    (x, *_), target = make_layer(), make_index(ROWS, CLASSES)
    target[0] = 9
    arguments = {
        **loss.hypers[1 % len(loss.hypers)],
        "k": 3,
        "weight": torch.rand(CLASSES),
        "ignore_index": 9,
        "reduction": "sum",
    }
    layer = {"normalize": True, "scale": 8.0} if normalize else {}
    module = fl.LinearLoss(
        FEATURES, CLASSES, loss=loss.module_class()(**arguments), bias=not normalize, dtype=torch.float64, **layer
    )
    value = module(x, target)
    expected = loss.linear(x, module.weight, target, linear_bias=module.bias, **arguments, **layer)
    assert torch.equal(value, expected)
    torch.testing.assert_close(value, loss(module.logits(x), target, **arguments))
    assert set(module.state_dict()) == {"weight", "loss.weight"} | ({"bias"} if not normalize else set())


def test_module_defaults_to_cross_entropy_and_shows_its_settings():
    (x, *_), target = make_layer(dtype=torch.float32), make_index(ROWS, CLASSES)
    module = fl.LinearLoss(FEATURES, CLASSES)
    torch.testing.assert_close(module(x, target), F.cross_entropy(module.logits(x), target))
    assert "in_features=8, num_classes=100, bias=False" in repr(module)
    shown = repr(
        fl.LinearLoss(
            FEATURES,
            CLASSES,
            loss=fl.HSLRLoss(k=3),
            normalize=True,
            scale=8.0,
            options=fl.LinearLossOptions(sparse_grad=True),
        )
    )
    for part in ("normalize=True, scale=8.0", "sparse_grad=True", "HSLRLoss", "k=3"):
        assert part in shown


def test_a_training_step_of_the_module_is_that_of_nn_linear_and_the_loss():
    (x, *_), target = make_layer(), make_index(ROWS, CLASSES)
    theirs, loss = nn.Linear(FEATURES, CLASSES, dtype=torch.float64), fl.HSLRLoss(k=3)
    ours = fl.LinearLoss(FEATURES, CLASSES, loss=loss, bias=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    for model, value in ((ours, lambda: ours(x, target)), (theirs, lambda: loss(theirs(x), target))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


# --- arguments --------------------------------------------------------------------------------------------------------


def test_signatures():
    """Those of F.linear_cross_entropy in front, those of the loss from logits with their defaults behind."""
    ours = inspect.signature(fl.linear_cross_entropy).parameters
    theirs = inspect.signature(fl.cross_entropy).parameters
    layer = {"input", "linear_weight", "target", "linear_bias", "normalize", "scale", "gather_input", "options"}
    assert set(ours) == layer | (set(theirs) - {"logits"})
    for name in set(theirs) - {"logits", "target"}:
        assert ours[name].default == theirs[name].default
    of_any = inspect.signature(fl.linear_loss).parameters
    assert set(of_any) == layer | {"loss", "shard", "return_statistics"}
    for parameters in (ours, of_any):
        assert [p for p in parameters if parameters[p].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == [
            "input", "linear_weight", "target",
        ]  # fmt: skip
    for name in layer & set(of_any):
        assert of_any[name].default == ours[name].default


@each_chunk
@each_way
@each(LOSSES)
def test_a_class_out_of_range_is_named_with_its_row_in_the_batch(loss, k, chunk_bytes):
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    target[5] = CLASSES
    w.requires_grad_()
    with pytest.raises(IndexError, match=r"Target 100 is out of bounds.*row 5"):
        loss.linear(x, w, target, k=k_of(loss, k), options=fl.LinearLossOptions(chunk_bytes=chunk_bytes))


@each_chunk
@each(LOGISTIC)
def test_multihot_entries_other_than_0_and_1(loss, chunk_bytes):
    (x, w, _), target = make_layer(), make_target("multihot", ROWS, CLASSES).float()
    target[5, 7] = 0.5
    with pytest.raises(ValueError, match="multi-hot targets must be 0 or 1"):
        loss.linear(x, w, target, k=3, options=fl.LinearLossOptions(chunk_bytes=chunk_bytes))


X, W, B = make_layer()
Y = make_index(ROWS, CLASSES)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "input must be a Tensor, got list", lambda: CRL.linear([1.0], W, Y)),
        (TypeError, "linear_weight must be a Tensor, got NoneType", lambda: CRL.linear(X, None, Y)),
        (TypeError, "linear_bias must be a Tensor, got float", lambda: CRL.linear(X, W, Y, linear_bias=1.0)),
        (TypeError, "floating-point input, got torch.int64", lambda: CRL.linear(X.long(), W, Y)),
        (TypeError, "floating-point linear_weight, got torch.complex128", lambda: CRL.linear(X, W + 0j, Y)),
        (RuntimeError, "input and linear_weight of one dtype", lambda: CRL.linear(X, W.float(), Y)),
        (RuntimeError, "input and linear_bias of one dtype", lambda: CRL.linear(X, W, Y, linear_bias=B.half())),
        (RuntimeError, "linear_weight on meta", lambda: CRL.linear(X, W.to("meta"), Y)),
        (RuntimeError, "target on meta", lambda: CRL.linear(X, W, Y.to("meta"))),
        (ValueError, r"got \(7, 8\) and \(100, 7\)", lambda: CRL.linear(X, W[:, :7], Y)),
        (ValueError, r"got \(1, 7, 8\) and \(100, 8\)", lambda: CRL.linear(X[None], W, Y)),
        (ValueError, r"got \(7, 8\) and \(8,\)", lambda: CRL.linear(X, W[0], Y)),
        (ValueError, r"got \(\) and \(100, 8\)", lambda: CRL.linear(X[0, 0], W, Y)),
        (ValueError, "at least one class", lambda: CRL.linear(X, W[:0], Y)),
        (
            ValueError,
            r"linear_bias of shape \(100,\), got \(99,\)",
            lambda: CRL.linear(X, W, Y, linear_bias=B[1:]),
        ),
        (ValueError, r"batch_size \(7\) to match target batch_size \(6\)", lambda: CRL.linear(X, W, Y[1:])),
        (ValueError, "multi-target not supported", lambda: CRL.linear(X, W, Y[:, None])),
        (ValueError, "multi-hot target size", lambda: LR.linear(X, W, X)),
        (TypeError, "integer dtype, got torch.float32", lambda: CRL.linear(X, W, Y.float())),
        (ValueError, "no linear_bias", lambda: CRL.linear(X, W, Y, linear_bias=B, normalize=True)),
        (ValueError, "no linear_bias", lambda: fl.LinearLoss(8, 100, bias=True, normalize=True)),
        (ValueError, "pass normalize=True", lambda: CRL.linear(X, W, Y, scale=2.0)),
        (
            ValueError,
            "scale must be finite and > 0, got 0",
            lambda: CRL.linear(X, W, Y, normalize=True, scale=0),
        ),
        (ValueError, "scale must be finite", lambda: fl.LinearLoss(8, 100, normalize=True, scale=torch.inf)),
        (TypeError, "scale must be a number, got str", lambda: fl.LinearLoss(8, 100, normalize=True, scale="64")),
        (TypeError, "options must be LinearLossOptions, got dict", lambda: CRL.linear(X, W, Y, options={})),
        (TypeError, "options must be LinearLossOptions, got dict", lambda: fl.LinearLoss(8, 100, options={})),
        (ValueError, "chunk_bytes must be at least 1, got 0", lambda: fl.LinearLossOptions(chunk_bytes=0)),
        (TypeError, "dense Tensor.*give input.to_dense", lambda: CRL.linear(X.to_sparse(), W, Y)),
        (TypeError, "dense Tensor.*give linear_weight.to_", lambda: CRL.linear(X, W.to_sparse_csr(), Y)),
        (TypeError, "scale must be a number, got Tensor", lambda: CRL.linear(X, W, Y, scale=torch.ones(()))),
        (TypeError, "chunk_bytes must be an integer, got float", lambda: fl.LinearLossOptions(chunk_bytes=1e6)),
        (
            TypeError,
            "loss module of fused_losses, got CrossEntropyLoss",
            lambda: fl.LinearLoss(8, 100, loss=nn.CrossEntropyLoss()),
        ),
        (ValueError, "hs_lr_loss needs k or ratio", lambda: HS_LR.linear(X, W, Y)),
        (ValueError, "k must be at least 1, got 0", lambda: CRL.linear(X, W, Y, k=0)),
        (
            ValueError,
            "median is not a valid value for reduction",
            lambda: CRL.linear(X, W, Y, reduction="median"),
        ),
        (ValueError, "alpha must be finite and >= 0", lambda: CRL.linear(X, W, Y, alpha=-1)),
        (TypeError, "label_smoothing", lambda: fl.linear_cross_entropy(X, W, Y, label_smoothing=0.1)),
    ],
    ids=itertools.count(),
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("kind", [int, np.int64, np.int32])
def test_chunk_bytes_of_any_integer_type(kind):
    options = fl.LinearLossOptions(chunk_bytes=kind(800))
    assert type(options.chunk_bytes) is int
    assert options == fl.LinearLossOptions(chunk_bytes=800)
    assert torch.equal(
        CRL.linear(X, W, Y, options=options),
        CRL.linear(X, W, Y, options=fl.LinearLossOptions(chunk_bytes=800)),
    )


@pytest.mark.parametrize("check_targets", [False, True])
def test_check_targets_changes_no_value(check_targets):
    assert torch.equal(CRL.linear(X, W, Y, check_targets=check_targets), CRL.linear(X, W, Y))


def test_a_million_classes():
    """A step with sparse gradients makes nothing that grows with the number of classes but a chunk of logits."""
    classes = 1_000_000
    module = fl.LinearLoss(
        4,
        classes,
        loss=fl.CrossEntropyLoss(k=10),
        normalize=True,
        scale=16.0,
        options=fl.LinearLossOptions(sparse_grad=True),
    )
    (x, *_), target = make_layer(4, 4, 4, torch.float32), torch.tensor([0, 7, 999_999, 7])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module.weight.detach().clone()
    module(x, target).backward()
    optimizer.step()
    moved = (module.weight.detach() != before).any(1).nonzero().squeeze(1)
    assert torch.equal(moved, picked_classes(cosines(x, before, 16.0), target, 10))
