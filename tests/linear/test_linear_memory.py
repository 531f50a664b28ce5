"""A linear layer with a loss: what asks for no gradient costs none; memory."""

import itertools

import pytest
import torch
from layers import (
    CLASSES,
    ROWS,
    Watch,
    each_gradient,
    each_layer,
    each_reduction,
    each_way,
    k_of,
    make_layer,
    make_upstream,
)

import fused_losses as fl
from cases import (
    CRL,
    HS_LR,
    LOGISTIC,
    LOSSES,
    LR,
    each,
    make_index,
    make_target,
)
from fused_losses import linear_rows


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


class Buffers(Watch):
    """What has memory of its own for at least so many elements, held so that no other gets the same."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.found = least, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.numel() >= self.least and not func.is_view:
            self.found[result.untyped_storage().data_ptr()] = result
        return result


@pytest.mark.parametrize("reduction, passes", [("mean", 1), ("none", 2)])  # at once, again
@pytest.mark.parametrize("k", [None, 1000])
@pytest.mark.parametrize("loss, form", [(CRL, "index"), (LR, "index"), (LR, "multihot")], ids=str)
@each_layer
def test_a_gradient_is_written_over_its_logits(glass_house, normalize, loss, form, k, reduction, passes):
    rows, classes, features = 64, 2048, 4
    x, w, _ = make_layer(rows, features, classes, torch.float32)
    target = make_target(form, rows, classes)
    options = fl.LinearLossOptions(chunk_bytes=5 * classes * 4)
    w.requires_grad_()
    with Buffers(4 * classes + 1) as buffers:
        value = loss.linear(x, w, target, k=k, reduction=reduction, normalize=normalize, options=options)
        value.sum().backward()
    assert len(buffers.found) == passes
