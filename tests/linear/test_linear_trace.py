"""The linear losses traced: by torch.compile, torch.export and make_fx with shapes that change, on devices that hold
nothing; and what FlopCounterMode counts of them."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layers import CLASSES, FEATURES, ROWS, each_layer, each_way, k_of, make_layer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fused_losses as fl
from cases import CRL, HS_LR, SS_LR, make_index, make_target
from fused_losses.losses import LossSpec
from test_import import run

each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])  # at once, and not


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step_of(loss, k, reduction="mean", normalize=False, sparse_grad=False):
    """input, weight, target -> loss and both gradients."""

    def step(x, w, target):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        value = loss.linear(
            x, w, target, k=k_of(loss, k), reduction=reduction, normalize=normalize,
            options=fl.LinearLossOptions(sparse_grad=sparse_grad),
        )  # fmt: skip
        return value.detach(), *torch.autograd.grad(value.sum(), (x, w))

    return step


def arguments(classes=CLASSES):
    x, w, _ = make_layer(dtype=torch.float32)
    return x, w[:classes], make_index(ROWS, 60)


@each_layer
@each_reduction
@pytest.mark.parametrize(
    "k, dynamic", [(None, None), (None, True), (3, None), (50, None)], ids=["all", "dynamic", "picks", "dense"]
)
def test_a_changing_number_of_classes_is_compiled(k, dynamic, reduction, normalize):
    """Of the k hardest, as long as they take the same way."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x, w, target):
        return CRL.linear(x, w, target, k=k, reduction=reduction, normalize=normalize)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    for classes in (100, 90, 80):
        found = []
        for function in (compiled, loss):
            x, w, target = arguments(classes)
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            value = function(*leaves, target)
            found.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
        torch.testing.assert_close(*found)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", [float, int, np.float64], ids=["float", "int", "numpy"])
def test_a_changing_scale_is_compiled(kind):
    x, w, target = arguments()

    def loss(x, w, scale):
        return HS_LR.linear(x, w, target, k=2, normalize=True, scale=scale)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale in (16, 20, 24):
        torch.testing.assert_close(compiled(x, w, kind(scale)), loss(x, w, float(scale)))


@pytest.mark.parametrize("kind", [float, np.float64, np.float32], ids=["float", "double", "single"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_module_with_a_scale_is_compiled(kind, dynamic):
    x, _, target = arguments()
    module = fl.LinearLoss(FEATURES, CLASSES, normalize=True, scale=kind(16))
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), module(x, target))


@each_layer
@each_reduction
@pytest.mark.parametrize("k", [None, 1, 2], ids=["all", "1", "2"])
def test_export_with_dynamic_rows_and_classes(k, reduction, normalize):
    class Head(nn.Module):
        def forward(self, x, w, target):
            return CRL.linear(x, w, target, k=k, reduction=reduction, normalize=normalize)

    rows, classes = torch.export.Dim("rows", min=2), torch.export.Dim("classes", min=60)
    shapes = {0: rows}, {0: classes}, {0: rows}
    program = torch.export.export(Head(), arguments(), dynamic_shapes=shapes).module()
    for number in (100, 70):
        x, w, target = arguments(number)
        torch.testing.assert_close(program(x[:5], w, target[:5]), Head()(x[:5], w, target[:5]))


@each_layer
@each_reduction
@pytest.mark.parametrize("mode", ["real", "symbolic"])
@each_way
def test_make_fx(k, mode, reduction, normalize):
    """Forward and backward in one graph; a symbolic one serves other numbers of classes."""
    step = step_of(CRL, k, reduction, normalize)
    graph = make_fx(step, tracing_mode=mode)(*arguments())
    for classes in (100, 90) if mode == "symbolic" else (100,):
        torch.testing.assert_close(graph(*arguments(classes)), step(*arguments(classes)))


@each_layer
@each_reduction
@each_way
@pytest.mark.parametrize("loss, form", [(CRL, "index"), (SS_LR, "index"), (SS_LR, "multihot")], ids=str)
def test_devices_that_hold_nothing(loss, form, k, reduction, normalize):
    x, w, _ = arguments()
    tensors = x, w, make_target(form, ROWS, CLASSES)
    step = step_of(loss, k, reduction, normalize)
    expected = [(tensor.shape, tensor.dtype) for tensor in step(*tensors)]
    assert [(tensor.shape, tensor.dtype) for tensor in step(*(t.to("meta") for t in tensors))] == expected
    with FakeTensorMode() as mode:
        fake = step(*map(mode.from_tensor, tensors))
    assert [(tensor.shape, tensor.dtype) for tensor in fake] == expected


def test_opcheck_of_the_ops_of_normalised_classes_and_sparse_gradients():
    ops, (x, w, target) = torch.ops.fused_losses, arguments()
    torch.library.opcheck(ops.class_norms.default, (w,))
    layer = x, w, None, ops.class_norms(w), target, 0
    spec = LossSpec("crl", [1.5, 1.0], None, 3, -100, 0, CLASSES, True)
    seen = ops.linear_forward_picks(*layer, None, *spec)
    for wanted in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        torch.library.opcheck(
            ops.linear_backward_sparse.default, (torch.randn(ROWS, 2), *seen, *layer, wanted, *spec),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


# --- flops ------------------------------------------------------------------------------------------------------------


def flops(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


PRODUCT = 2 * ROWS * FEATURES * CLASSES
PICKED = 2 * ROWS * FEATURES * (1 + 3)


@each_layer
@pytest.mark.parametrize(
    "k, reduction, sparse_grad, forward, backward",
    [
        (None, "mean", False, 3 * PRODUCT, 0),
        (50, "sum", False, 3 * PRODUCT, 0),
        (None, "none", False, PRODUCT, 3 * PRODUCT),
        (50, "none", False, PRODUCT, 3 * PRODUCT),
        (3, "mean", False, PRODUCT, 2 * PICKED),
        (3, "mean", True, PRODUCT, 2 * PICKED),
    ],
    ids=["at once", "at once, hardest", "again", "again, hardest", "picks", "sparse picks"],
)
def test_flops(k, reduction, sparse_grad, forward, backward, normalize):
    """At once they are those of a linear layer and cross-entropy; the other ways report what they do."""
    x, w, target = arguments()
    x.requires_grad_()
    w = w.clone().requires_grad_()
    options, values = fl.LinearLossOptions(sparse_grad=sparse_grad), []

    def loss(x=x, w=w):
        value = CRL.linear(x, w, target, k=k, reduction=reduction, normalize=normalize, options=options)
        values.append(value.sum())

    assert flops(loss) == forward
    assert flops(values[0].backward) == backward
    theirs = flops(lambda: F.cross_entropy(F.linear(x, w), target).backward())
    assert theirs == 3 * PRODUCT
    frozen = w.detach()
    with torch.no_grad():
        assert flops(lambda: loss(x, frozen)) == PRODUCT
    only_input = flops(lambda: (loss(x, frozen), values[-1].backward()))
    assert only_input == forward + backward - (PICKED if k == 3 else PRODUCT)


@pytest.mark.parametrize("first", ["fused_losses", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(first):
    """And the package does not pay for the import of the counter."""
    code = (
        f"import sys, torch, {first}\n"
        f"assert ('torch.utils.flop_counter' in sys.modules) == ({first!r} != 'fused_losses')\n"
        "import fused_losses\nfrom torch.utils.flop_counter import FlopCounterMode, flop_registry\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    fused_losses.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]))\n"
        "assert counter.get_total_flops() == 60, counter.get_total_flops()\n"
        "assert not any('_AfterImport' in str(finder) for finder in sys.meta_path)\n"
    )
    assert run(code).stderr == ""


def test_every_op_with_a_matmul_has_a_formula():
    from fused_losses import flops

    names = {name for name in vars(torch.ops.fused_losses) if name.startswith("linear_")}
    assert set(flops.FORMULAS) == names
    assert "torch.utils.flop_counter" in sys.modules
