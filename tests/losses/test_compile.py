"""torch.compile, autocast and torch.export: whole graphs, few of them, and the same numbers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

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


# --- options and shapes that change -----------------------------------------------------------------------------------


def assert_follows(function, values, dynamic=None) -> int:
    """The compiled function(logits, value) gives what the eager one does, for each value: the number of graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    logits = make_logits(6, CLASSES, torch.float32)
    for number in values:
        expected, expected_grad = value_and_grad(lambda z, v=number: function(z, v), logits)
        value, grad = value_and_grad(lambda z, v=number: compiled(z, v), logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)
    return counter.frame_count


each_dynamic = pytest.mark.parametrize("dynamic", [None, True])


@each_dynamic
@each((CRL, HS_LR, SS_LR))
def test_changing_k_and_ignore_index(loss, dynamic):
    """Not a graph for each: there may be fewer recompilations. (0 and 1 have graphs of their own.)"""
    target = make_index(6, CLASSES)
    assert assert_follows(lambda z, k: loss(z, target, k=k), range(1, 13), dynamic) <= 3
    target = torch.arange(6)
    assert assert_follows(lambda z, i: loss(z, target, k=3, ignore_index=i), range(-2, 10), dynamic) <= 3
    torch._dynamo.reset()
    assert_follows(lambda z, k: loss(z, target, k=k), [2, 60, 98, 99, 1000], dynamic)


@each_dynamic
@each((CRL, HS_LR, SS_LR))
def test_changing_ratio_and_hyper_parameters(loss, dynamic):
    """A graph for each, as for torch's own label_smoothing."""
    target = make_index(6, CLASSES)
    assert_follows(lambda z, ratio: loss(z, target, ratio=ratio), [0.1, 0.2, 0.37, 0.9, 1.0], dynamic)
    for name in loss.hypers[0]:
        torch._dynamo.reset()
        assert_follows(lambda z, a, n=name: loss(z, target, k=3, **{n: a}), [0.1, 0.0, 0.5, 2, 3, 0.7], dynamic)


@each_dynamic
@each((CRL, HS_LR, SS_LR))
def test_arguments_assigned_to_a_compiled_module(loss, dynamic):
    module, target = loss.module_class()(k=3), make_index(6, CLASSES)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    logits = make_logits(6, CLASSES, torch.float32)
    torch.testing.assert_close(compiled(logits, target), loss(logits, target, k=3))
    for name in loss.hypers[0]:
        torch._dynamo.reset()  # a graph for each value, and so many recompilations are allowed
        for value in (0.3, np.float64(0.6), np.float32(0.25), 2):
            setattr(module, name, value)
            torch.testing.assert_close(compiled(logits, target), module(logits, target))
            assert not torch.equal(module(logits, target), loss(logits, target, k=3))
    torch._dynamo.reset()
    for name, value in (("k", np.int64(5)), ("ratio", np.float64(0.2)), ("ignore_index", np.int64(target[0]))):
        before = module(logits, target)
        setattr(module, name, value)
        torch.testing.assert_close(compiled(logits, target), module(logits, target))
        assert not torch.equal(module(logits, target), before)


@each_dynamic
@pytest.mark.parametrize("selection", [{}, {"k": 3}, {"ratio": 0.2}], ids=str)
@each((CRL, HS_LR))
def test_changing_number_of_classes(loss, selection, dynamic):
    if loss.needs_k and not selection:
        return
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda z, y: loss(z, y, **selection), fullgraph=True, backend=counter, dynamic=dynamic)
    for classes in range(40, 60, 2):
        logits, target = make_logits(6, classes, torch.float32), make_index(6, classes)
        expected, expected_grad = value_and_grad(lambda z, y=target: loss(z, y, **selection), logits)
        value, grad = value_and_grad(lambda z, y=target: compiled(z, y), logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("selection", [{}, {"k": 3}, {"k": 40}, {"ratio": 0.1}, {"ratio": 1.0}], ids=str)
@pytest.mark.parametrize("loss, form", [(CRL, "index"), (HS_LR, "index"), (SS_LR, "multihot")], ids=str)
def test_export_with_dynamic_classes(loss, form, selection, strict):
    """The program decides nothing by the number of classes that it was traced with."""
    if loss.needs_k and not selection:
        return

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = loss.module_class()(**selection)

        def forward(self, logits, target):
            return self.criterion(logits, target)

    sizes = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("classes", min=2)}
    dynamic = (sizes, sizes if form == "multihot" else {0: sizes[0]})
    example = make_logits(6, 50, torch.float32), make_target(form, 6, 50)
    program = torch.export.export(Criterion(), example, dynamic_shapes=dynamic, strict=strict).module()
    for classes in (50, 1000, 81, 41, 5, 2):
        logits, target = make_logits(9, classes, torch.float32), make_target(form, 9, classes)
        torch.testing.assert_close(program(logits, target), loss(logits, target, **selection))


@pytest.mark.parametrize("k", [3, 40, None])
@each((CRL, SS_LR))
def test_symbolic_trace_with_its_gradient(loss, k):
    gradient = lambda z, y: torch.autograd.grad(loss(z, y, k=k), z)[0]  # noqa: E731
    logits, target = make_logits(6, 50, torch.float32).requires_grad_(), make_index(6, 50)
    traced = make_fx(gradient, tracing_mode="symbolic")(logits, target)
    for rows, classes in ((6, 50), (9, 80), (3, 60)):
        logits, target = make_logits(rows, classes, torch.float32).requires_grad_(), make_index(rows, classes)
        torch.testing.assert_close(traced(logits, target), gradient(logits, target))


@pytest.mark.parametrize("k", [3, 60, None])
@each_form
def test_fake_and_meta_tensors(loss, form, k):
    def shapes(logits, target):
        logits.requires_grad_()
        value = loss(logits, target, k=k_of(loss, k), reduction="none")
        value.sum().backward()
        assert value.shape == (6,) and value.dtype == torch.float32 and value.device == logits.device
        assert logits.grad.shape == logits.shape and logits.grad.dtype == logits.dtype

    logits, target = make_logits(6, CLASSES, torch.bfloat16), make_target(form, 6, CLASSES)
    shapes(logits.to("meta"), target.to("meta"))
    with FakeTensorMode() as mode:
        shapes(mode.from_tensor(logits), mode.from_tensor(target))
