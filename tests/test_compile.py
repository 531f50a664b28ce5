"""torch.compile, autocast and torch.export: whole graphs, few of them, and the same numbers."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_losses as fl
from cases import (
    CE,
    CRL,
    HS_LR,
    LOSSES,
    LR,
    SS_LR,
    each,
    each_form,
    make_index,
    make_logits,
    make_target,
    value_and_grad,
)

CLASSES = 100
each_k = pytest.mark.parametrize("k", [None, 2, 50], ids=["all", "compact", "threshold"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def k_of(loss, k):
    return 99 if k is None and loss.needs_k else k


@each_k
@each_form
def test_fullgraph_gives_the_same_numbers(loss, form, k):
    logits, target = make_logits(6, CLASSES, torch.float32), make_target(form, 6, CLASSES)
    function = lambda z: loss(z * 2, target, k=k_of(loss, k))  # noqa: E731
    expected, expected_grad = value_and_grad(function, logits)
    value, grad = value_and_grad(torch.compile(function, fullgraph=True, backend="aot_eager"), logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each(LOSSES)
def test_fullgraph_with_every_option(loss, reduction):
    logits, target = make_logits(6, CLASSES, torch.float32), make_index(6, CLASSES).int()
    target[3] = 7
    options = {"ratio": 0.02, "weight": torch.rand(CLASSES), "ignore_index": 7, "reduction": reduction}
    function = lambda z, y: loss(z, y, check_targets=True, **options)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, expected_grad = value_and_grad(lambda z: function(z, target), logits)
    value, grad = value_and_grad(lambda z: compiled(z, target), logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


# One loss of each family stands for it: what the batch size touches is the same for the others.
@pytest.mark.parametrize(
    "loss, form, k",
    [(CRL, "index", None), (CRL, "index", 2), (HS_LR, "index", 50), (SS_LR, "multihot", None), (SS_LR, "multihot", 2)],
    ids=str,
)
def test_at_most_two_graphs_over_changing_batch_sizes(loss, form, k):
    """One for the first size, one with a dynamic batch; N = 0 and N = 1 may add one each."""
    counter = CompileCounterWithBackend("aot_eager")
    function = lambda z, y: loss(z, y, k=k)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=counter)

    def check(rows):
        logits, target = make_logits(rows, CLASSES, torch.float32), make_target(form, max(rows, 3), CLASSES)[:rows]
        expected, expected_grad = value_and_grad(lambda z: function(z, target), logits)
        value, grad = value_and_grad(lambda z: compiled(z, target), logits)
        torch.testing.assert_close(value, expected, equal_nan=True)
        torch.testing.assert_close(grad, expected_grad)

    for rows in (8, 16, 5, 33, 7):
        check(rows)
    assert counter.frame_count <= 2
    for rows in (0, 1, 9, 0, 1):
        check(rows)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("loss, k", [(CRL, None), (SS_LR, 4)], ids=str)
def test_inductor(loss, k):
    """A head and its loss through the default backend, forward and backward in one graph each."""
    features, target = make_logits(6, 8, torch.float32), make_index(6, 200)
    torch.manual_seed(0)
    head = nn.Linear(8, 200)

    def step(x):
        return loss(head(x), target, k=k)

    expected = torch.autograd.grad(step(features), list(head.parameters()))
    compiled = torch.compile(step, fullgraph=True)
    grads = torch.autograd.grad(compiled(features), list(head.parameters()))
    torch.testing.assert_close(compiled(features), step(features))
    torch.testing.assert_close(grads, expected)


@each(LOSSES)
def test_compiled_module(loss):
    module = loss.module_class()(k=3, weight=torch.rand(CLASSES))
    logits, target = make_logits(6, CLASSES, torch.float32), make_index(6, CLASSES)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), module(logits, target))


def test_compact_form_keeps_no_logits_when_compiled():
    """The partitioner must find nothing of the logits to save."""
    saved = []
    leaf, target = make_logits(64, 1000, torch.float32).requires_grad_(), make_index(64, 1000)
    compiled = torch.compile(lambda z: fl.crl_loss(z + 1, target, k=3), fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = compiled(leaf)
    value.backward()
    assert sum(saved) < leaf.numel() / 4
    _, expected = value_and_grad(lambda z: fl.crl_loss(z + 1, target, k=3), leaf)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("loss, k", [(CRL, 2), (LR, None)], ids=str)
def test_second_derivative_of_a_compiled_loss_raises(loss, k):
    logits, target = make_logits(6, CLASSES).requires_grad_(), make_index(6, CLASSES)
    compiled = torch.compile(lambda z: loss(z, target, k=k), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(compiled(logits), logits, create_graph=True)
        torch.autograd.grad(grad.pow(2).sum(), logits)


@each_k
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(loss, form, k, dtype):
    """A head under autocast gives half-precision logits; the loss is float32, as if called outside on them."""
    torch.manual_seed(0)
    head = nn.Linear(8, CLASSES)
    features, target = make_logits(6, 8, torch.float32), make_target(form, 6, CLASSES)
    with torch.autocast("cpu", dtype=dtype):
        logits = head(features)
        value = loss(logits, target, k=k_of(loss, k))
    assert logits.dtype == dtype
    assert value.dtype == torch.float32
    outside, grad = value_and_grad(lambda z: loss(z, target, k=k_of(loss, k)), logits)
    torch.testing.assert_close(value, outside)
    value.backward()
    assert head.bias.grad.dtype == torch.float32
    torch.testing.assert_close(head.bias.grad, grad.float().sum(0), rtol=2e-2, atol=1e-3)


def test_autocast_inside_a_compiled_graph():
    torch.manual_seed(0)
    head, features, target = nn.Linear(8, CLASSES), make_logits(6, 8, torch.float32), make_index(6, CLASSES)

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fl.hs_lr_loss(head(x), target, k=2)

    value = torch.compile(step, fullgraph=True, backend="aot_eager")(features)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, step(features))


class Head(nn.Module):
    """What one exports: a classifier with its loss."""

    def __init__(self, criterion):
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)
        self.criterion = criterion

    def forward(self, features, target):
        return self.criterion(self.linear(features), target)


@pytest.mark.parametrize("form", ["index", "multihot"])
@pytest.mark.parametrize("k", [2, 50])
def test_export_with_a_dynamic_batch(form, k):
    for loss in (CE, HS_LR, SS_LR) if form == "index" else (HS_LR, SS_LR):
        head = Head(loss.module_class()(k=k))
        batch = torch.export.Dim("batch", min=2, max=4096)
        example = (make_logits(6, 8, torch.float32), make_target(form, 6, CLASSES))
        program = torch.export.export(head, example, dynamic_shapes=({0: batch}, {0: batch}))
        for rows in (6, 9, 2):
            features, target = make_logits(rows, 8, torch.float32), make_target(form, rows, CLASSES)
            torch.testing.assert_close(program.module()(features, target), head(features, target))
