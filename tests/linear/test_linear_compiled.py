"""A linear layer with a loss: compiled."""

import warnings

import pytest
import torch
from layers import (
    CLASSES,
    FEATURES,
    ROWS,
    assert_same,
    each_reduction,
    each_way,
    k_of,
    make_layer,
    make_upstream,
    value_and_grads,
)
from torch._dynamo.testing import CompileCounterWithBackend

import fused_losses as fl
from cases import (
    CRL,
    HS_LR,
    SS_LR,
    make_index,
    make_target,
)
from fused_losses.losses import LossSpec


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
    layer = x, w, None if normalize else b, norms, target, 3 * CLASSES
    params = {"crl": [1.5, 1.0], "ss_lr": [2.0]}[loss.door]
    picks = "_picks" if k == 3 else ""
    spec = LossSpec(loss.door, params, None, k or 0, -100, 0, CLASSES, bool(picks))

    def opcheck(name, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dispatch test runs backward through an op that has none
            torch.library.opcheck(getattr(ops, name).default, args)

    certified = [True] if picks else []
    opcheck(f"linear_forward{picks}", *layer, *certified, *spec)
    seen = getattr(ops, f"linear_forward{picks}")(*layer, *certified, *spec)
    for wanted in ([True, True, not normalize], [True, False, False], [False, True, False]):
        opcheck(f"linear_backward{picks}", torch.randn(ROWS, 2), *seen, *layer, wanted, *spec)
        if not picks:
            opcheck("linear_at_once", torch.randn(ROWS), None, *layer, wanted, *spec)
