"""The linear losses inside autograd: checkpoints, hooks, threads, batched and compiled backward passes; zeros that stay
zeros; cosines that float16 does not hold unless they are normalised first."""

import threading

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CLASSES,
    FEATURES,
    ROWS,
    assert_same,
    cosines,
    each_gradient,
    each_layer,
    each_reduction,
    each_way,
    k_of,
    make_exact_layer,
    make_layer,
    make_upstream,
    value_and_grads,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from cases import CRL, HS_LR, LOSSES, LR, SS_LR, each, make_index, make_target
from fused_losses import linear_autograd, linear_rows


def how(sparse_grad: bool) -> fl.LinearLossOptions:
    return fl.LinearLossOptions(sparse_grad=sparse_grad)


# --- what forward has kept --------------------------------------------------------------------------------------------


@each_reduction
@each_gradient
def test_checkpoint(k, sparse_grad, reduction):
    layer, target = make_layer(), make_index(ROWS, CLASSES)
    upstream = make_upstream() if reduction == "none" else None

    def plain(x, w, b):
        return CRL.linear(
            x, w, target, linear_bias=b, k=k, reduction=reduction, options=how(sparse_grad)
        )  # fmt: skip

    expected = [tensor.to_dense() for tensor in value_and_grads(plain, *layer, upstream=upstream)]
    for reentrant in (False, True):
        again = value_and_grads(
            lambda *leaves, r=reentrant: checkpoint(plain, *leaves, use_reentrant=r), *layer, upstream=upstream
        )
        assert_same(again, expected)


@each_reduction
@each_gradient
@each_layer
def test_what_is_packed_is_unpacked_once(k, sparse_grad, reduction, normalize):
    counts = {"packed": 0, "unpacked": 0}

    def count(name):
        def hook(tensor):
            counts[name] += 1
            return tensor

        return hook

    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count("packed"), count("unpacked")):
        value = CRL.linear(
            x, w.requires_grad_(), target, k=k, reduction=reduction, normalize=normalize, options=how(sparse_grad)
        )
        value.sum().backward()
    assert counts["packed"] == counts["unpacked"] > 0


@each_reduction
@each_way
def test_backward_of_an_eager_forward_is_compiled(k, reduction):
    """Compiled autograd, which traces backward: one step after the other, and after a pass that retained the graph."""
    torch._dynamo.reset()
    target = make_index(ROWS, CLASSES)
    for seed in range(3):
        x, w, b = (seed + tensor for tensor in make_layer(dtype=torch.float32))

        def step(*leaves):
            return CRL.linear(*leaves[:2], target, linear_bias=leaves[2], k=k, reduction=reduction).sum()

        expected = value_and_grads(step, x, w, b, upstream=torch.tensor(1.0))
        leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
        value = step(*leaves)
        if seed == 1:
            torch.autograd.grad(value, leaves, retain_graph=True)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            value.backward()
        assert_same([value.detach(), *(leaf.grad for leaf in leaves)], expected)
    torch._dynamo.reset()


def test_a_compiled_forward_leaves_its_gradients_to_the_graph():
    """And an eager one after it, of the same module, its own."""
    torch._dynamo.reset()
    module, target = fl.LinearLoss(FEATURES, CLASSES), make_index(ROWS, CLASSES)
    x = make_layer(dtype=torch.float32)[0]
    expected = torch.autograd.grad(module(x, target), module.weight)
    value = torch.compile(module, fullgraph=True, backend="aot_eager")(x, target)
    torch.testing.assert_close(torch.autograd.grad(module(x, target), module.weight), expected)
    torch.testing.assert_close(torch.autograd.grad(value, module.weight), expected)
    torch._dynamo.reset()


@each_way
def test_threads_may_share_a_graph(k, monkeypatch):
    """Each gets a gradient of its own, however they meet: here, all ask before one has taken."""
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    _, _, expected = value_and_grads(lambda x, w: CRL.linear(x, w, target, k=k), x, w, upstream=torch.tensor(1.0))
    threads, meeting, taken = 4, threading.Barrier(4), []
    take = linear_autograd._Prepared.take

    def together(prepared):
        meeting.wait(timeout=60)
        taken.append(take(prepared))
        return taken[-1]

    monkeypatch.setattr(linear_autograd._Prepared, "take", together)
    w.requires_grad_()
    value = CRL.linear(x, w, target, k=k)
    found = [None] * threads

    def pull(number):
        upstream = torch.tensor(float(number + 1), dtype=torch.float64)
        (found[number],) = torch.autograd.grad(value, w, upstream, retain_graph=True)

    workers = [threading.Thread(target=pull, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(gradients is not None for gradients in taken) == (0 if k == 3 else 1)
    for number, gradient in enumerate(found):
        torch.testing.assert_close(gradient, (number + 1) * expected)
    assert len({gradient.data_ptr() for gradient in found}) == threads


@pytest.mark.parametrize("normalize", [False, True])
@each_reduction
@each_way
@each(LOSSES)
def test_batched_upstream_gradients(loss, k, reduction, normalize):
    """``is_grads_batched=True``, first and after another pass."""
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    leaves = x.requires_grad_(), w.requires_grad_()
    value = loss.linear(*leaves, target, k=k_of(loss, k), reduction=reduction, normalize=normalize)
    upstream = torch.randn(3, *value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batched = [torch.autograd.grad(value, leaves, upstream, is_grads_batched=True, retain_graph=True) for _ in range(2)]
    for number, row in enumerate(upstream):
        single = torch.autograd.grad(value, leaves, row, retain_graph=True)
        for found in batched:
            torch.testing.assert_close([gradient[number] for gradient in found], list(single))


@each_reduction
@each_way
def test_autocast_around_backward_alone_changes_nothing(k, reduction):
    layer, target = make_layer(dtype=torch.float32)[:2], make_index(ROWS, CLASSES)

    def grads(cast):
        leaves = [tensor.clone().requires_grad_() for tensor in layer]
        value = CRL.linear(*leaves, target, k=k, reduction=reduction, normalize=True).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return [
                *torch.autograd.grad(value, leaves, retain_graph=True),
                *torch.autograd.grad(value, leaves),
            ]

    assert all(map(torch.equal, grads(True), grads(False)))


# --- zeros ------------------------------------------------------------------------------------------------------------

UPSTREAM = {"finite": -1.7, "inf": torch.inf, "-inf": -torch.inf, "nan": torch.nan}
each_upstream = pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM.keys())


def with_ignored(layer, target):
    """Rows 1 and 4 are ignored, and hold what would spoil a sum."""
    x, w, b = layer
    x[1], x[4, 0] = torch.nan, torch.inf
    target[[1, 4]] = -100
    return (x, w, b), target


@each_upstream
@each_reduction
@each_gradient
@each_layer
def test_ignored_rows_are_literal_zeros(k, sparse_grad, reduction, normalize, upstream):
    """In the loss, in their own gradient and in the weight's, whatever they hold and whatever comes from above."""
    (x, w, b), target = with_ignored(make_layer(), make_index(ROWS, CLASSES))
    kept = target != -100
    layer = (x, w) if normalize else (x, w, b)

    def step(x, w, b=None, target=target):
        return CRL.linear(
            x, w, target, linear_bias=b, k=k, reduction=reduction, normalize=normalize, options=how(sparse_grad)
        )

    up = torch.tensor(upstream, dtype=torch.float64)
    value, dx, *others = value_and_grads(step, *layer, upstream=up)
    assert (dx[~kept] == 0).all()
    if reduction == "none":
        assert (value[~kept] == 0).all()
    if upstream == UPSTREAM["finite"]:
        alone = value_and_grads(lambda x, *rest: step(x, *rest, target=target[kept]), x[kept], *layer[1:], upstream=up)
        expected = [tensor.to_dense() for tensor in alone]
        assert_same([value[kept] if reduction == "none" else value, dx[kept], *others], expected)


@each_upstream
@each_reduction
@each_gradient
@each_layer
def test_a_batch_in_which_nothing_counts_gives_literal_zeros(k, sparse_grad, reduction, normalize, upstream):
    """As F.cross_entropy of a batch of ignored rows, in both passes."""
    (x, w, b), target = make_layer(), torch.full((ROWS,), -100)
    x[2] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in ((x, w) if normalize else (x, w, b))]
    bias = None if normalize else b
    value = CRL.linear(
        x, w, target, linear_bias=bias, k=k, reduction=reduction, normalize=normalize, options=how(sparse_grad)
    )
    assert value.isnan() if reduction == "mean" else (value == 0).all()
    for _ in range(2):
        up = torch.full(value.shape, upstream, dtype=torch.float64)
        for gradient in torch.autograd.grad(value, leaves, up, retain_graph=True):
            assert (gradient.to_dense() == 0).all()


@each_upstream
@each_way
@each((CRL, SS_LR))
def test_no_rows_give_literal_zeros_whatever_comes_from_above(loss, k, upstream):
    for form in ("index",) if loss is CRL else ("index", "multihot"):
        x, w, b = make_layer()
        target = make_target(form, ROWS, CLASSES)[:0]
        for reduction in ("mean", "sum"):
            _, _, dw, db = value_and_grads(
                lambda x, w, b, y=target, r=reduction: loss.linear(x, w, y, linear_bias=b, k=k, reduction=r),
                *(x[:0], w, b),
                upstream=torch.tensor(upstream),
            )
            assert (dw == 0).all() and (db == 0).all()


@each_reduction
@each_way
def test_an_ignored_row_meets_a_weight_that_is_not_finite(k, reduction):
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    w[50] = -torch.inf
    target[1] = -100
    _, dx, _ = value_and_grads(lambda x, w: CRL.linear(x, w, target, k=k, reduction=reduction), x, w)
    assert (dx[1] == 0).all()


# --- range ------------------------------------------------------------------------------------------------------------


def wide_classes(dtype):
    """Class vectors from the shortest to the longest that float16 holds, or float32 under autocast."""
    (x, w, _), size = make_layer(dtype=torch.float64), torch.ones(CLASSES, 1, dtype=torch.float64)
    sizes = (1e4, 1e3, 1.0, 1e-3, 1e-5) if dtype == torch.float16 else (1e10, 1e5, 1.0, 1e-5, 1e-10)
    for number, factor in enumerate(sizes):
        size[number :: len(sizes)] = factor
    return x, w * size, size


@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast"])
@each_reduction
@each_way
@each((CRL, HS_LR))
def test_cosines_of_short_and_long_classes_in_float16(loss, k, reduction, autocast):
    """As accurate as of classes of length one, forward and backward: only the direction of a class counts. Gradients by
    a class are compared as if it had length one, for they go as 1 / length."""
    dtype = torch.float32 if autocast else torch.float16
    x, w, size = wide_classes(dtype)
    x, w = x.to(dtype), w.to(dtype)
    k, target = k_of(loss, k), make_index(ROWS, CLASSES)
    up = make_upstream() if reduction == "none" else None

    def step(x, w):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return loss.linear(x, w, target, k=k, reduction=reduction, normalize=True, scale=16.0)

    value, dx, dw = value_and_grads(step, x, w, upstream=up)
    true_value, true_dx, true_dw = value_and_grads(
        lambda x, w: loss(cosines(x, w, 16.0), target, k=k, reduction=reduction), x.double(), w.double(), upstream=up
    )
    torch.testing.assert_close(value.double(), true_value, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(dx.double(), true_dx, rtol=2e-2, atol=2e-2 * true_dx.abs().max().item())
    fits = ((size <= 1e3) & (size >= 1e-3)).squeeze(1) if not autocast else torch.ones(CLASSES, dtype=torch.bool)
    ours, theirs = ((gradient.double() * size)[fits] for gradient in (dw, true_dw))  # elsewhere float16 has no such
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


@each_way
def test_small_gradients_through_long_classes_in_float16(k):
    """gradient / |w| is below what float16 holds, (gradient / |w|) * w is not."""
    (x, w, _), target = make_layer(dtype=torch.float16), make_index(ROWS, CLASSES)
    w *= 1e4
    up = torch.tensor(2.0**-6)

    def grad(function, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(up * function(x), x)[0].double()

    ours = grad(lambda x: CRL.linear(x, w, target, k=k, normalize=True), x)
    true = grad(lambda x: fl.crl_loss(cosines(x, w.double(), 1.0), target, k=k), x.double())
    torch.testing.assert_close(ours, true, rtol=1e-2, atol=1e-2 * true.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast"])
def test_logits_of_short_and_long_classes_in_float16(autocast):
    dtype = torch.float32 if autocast else torch.float16
    x, w, _ = (tensor.to(dtype) for tensor in wide_classes(dtype))
    module = fl.LinearLoss(FEATURES, CLASSES, normalize=True, scale=16.0, dtype=dtype)
    module.weight = nn.Parameter(w)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        logits = module.logits(x)
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.double(), cosines(x.double(), w.double(), 16.0), rtol=1e-2, atol=2e-2)


def test_the_length_of_a_class_that_is_not_normalised_counts():
    """Below 1e-12 a class is divided by 1e-12, as F.normalize does, and its length moves its logit."""
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    w[target[0]] *= 1e-13
    for k in (None, 3, 50):
        got = value_and_grads(lambda x, w, k=k: CRL.linear(x, w, target, k=k, normalize=True), x, w)
        assert_same(got, value_and_grads(lambda x, w, k=k: fl.crl_loss(cosines(x, w, 1.0), target, k=k), x, w))


@pytest.mark.parametrize("k", [None, 3, 50], ids=["all", "picks", "dense"])
def test_classes_are_normalised_in_pieces(k, monkeypatch):
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)

    def step(x, w):
        return CRL.linear(x, w, target, k=k, normalize=True, scale=8.0)

    expected = value_and_grads(step, x, w)
    monkeypatch.setattr(linear_rows, "MIB", 9 * FEATURES)
    assert_same(value_and_grads(step, x, w), expected)


@each_reduction
@each_way
@pytest.mark.parametrize("factor", [2.0**16, 2.0**20])
def test_gradients_that_float16_holds_only_when_they_are_scaled(k, reduction, factor):
    """What GradScaler is for: exp(-18) for every class but one, of which float16 makes 0."""
    x, target = torch.ones(ROWS, 1, dtype=torch.float16), torch.zeros(ROWS, dtype=torch.long)
    w = torch.zeros(CLASSES, 1, dtype=torch.float16)
    w[0] = 18.0 + 4.6
    up = torch.tensor(factor)
    _, dx, dw = value_and_grads(
        lambda x, w: fl.linear_cross_entropy(x, w, target, k=k, reduction=reduction), x, w, upstream=up
    )
    _, true_dx, true_dw = value_and_grads(
        lambda x, w: fl.cross_entropy(F.linear(x, w), target, k=k, reduction=reduction), x.double(), w.double(),
        upstream=up,
    )  # fmt: skip
    assert true_dw[1:].abs().max() > 1e-5
    torch.testing.assert_close(dw.double(), true_dw, rtol=1e-2, atol=0)
    torch.testing.assert_close(dx.double(), true_dx, rtol=1e-2, atol=0)


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@each_way
def test_bfloat16_rows_of_a_transposed_input(k, chunk_bytes):
    """Whose product torch 2.10 gets wrong, unless they are made contiguous."""
    x, w, _ = make_exact_layer(dtype=torch.bfloat16)
    target, options = make_index(ROWS, CLASSES), fl.LinearLossOptions(chunk_bytes=chunk_bytes)
    turned = x.t().contiguous().t()

    def step(x, w):
        return LR.linear(x, w, target, k=k, options=options)

    leaves = [tensor.requires_grad_() for tensor in (turned, w.clone())]
    value = step(*leaves)
    expected = value_and_grads(step, x, w, upstream=torch.tensor(1.0))
    assert_same([value.detach(), *torch.autograd.grad(value, leaves)], expected)
