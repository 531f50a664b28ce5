"""The raw ops: registered as torch wants them, and with fake kernels that tell the truth."""

import itertools
import math
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cases import assert_as_accurate, make_index, make_logits, make_multihot
from doors import CRL, LR, SS_LR, Kept, backward, forward
from fused_losses import ops, reference
from fused_losses.finish import Reduction

OPS = torch.ops.fused_losses
FORMS = [(0, False), (1, True), (3, False), (3, True), (99, False), (99, True)]
each_form = pytest.mark.parametrize(
    "k, compact", FORMS, ids=[f"{k}-{'compact' if c else 'threshold'}" for k, c in FORMS]
)


def inputs(rows: int, layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits (rows, 11) as users bring them."""
    logits = make_logits(rows, 11, dtype)
    return {
        "contiguous": logits,
        "permuted": logits.t().contiguous().t(),
        "expanded": logits[:1].expand(rows, 11),
        "sliced": torch.cat([logits, logits], dim=1)[:, 3:14],
        "requires grad": logits.clone().requires_grad_(),
    }[layout]


CASES = [
    (4, "contiguous"),
    (4, "permuted"),
    (4, "expanded"),
    (4, "sliced"),
    (4, "requires grad"),
    (0, "contiguous"),
    (1, "contiguous"),
    (1, "permuted"),
    (0, "requires grad"),
]
each_input = pytest.mark.parametrize("rows, layout", CASES)


def opcheck(op, *args):
    with warnings.catch_warnings():
        # its dispatch test runs backward through an op that has none: "an autograd kernel was not registered"
        warnings.simplefilter("ignore")
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("k, compact", [(0, False), (3, False), (3, True)])
@each_input
@pytest.mark.parametrize("formula, form", [(CRL, "index"), (SS_LR, "index"), (SS_LR, "multihot")], ids=str)
def test_opcheck(formula, form, rows, layout, k, compact):
    logits = inputs(rows, layout)
    target = make_multihot(4, 11)[:rows] if form == "multihot" else make_index(rows, 11)
    weight = torch.linspace(0.5, 2, 11) if form == "index" else None
    mean = "mean" if rows > 0 else "sum"  # a mean over nothing is NaN, which opcheck takes for unequal
    reduction, spec = mean if compact else "none", formula.spec(11, k, compact)
    opcheck(OPS.forward.default, logits, target, weight, reduction, *spec)

    loss, coefficients, statistics, *picks = OPS.forward(logits.detach(), target, weight, reduction, *spec)
    opcheck(OPS.finish.default, statistics, target, weight, reduction, *spec)
    grad = torch.ones_like(loss)
    if layout == "expanded":
        grad = torch.ones(()).expand(grad.shape)
    if layout == "requires grad":
        grad.requires_grad_()
    withheld = None if compact and form == "index" else logits
    opcheck(OPS.backward.default, grad, coefficients, withheld, target, statistics, *picks, 11, *spec)
    if layout in ("contiguous", "sliced"):
        opcheck(OPS.backward_.default, grad, coefficients, logits, target, statistics, *picks, *spec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_form
@each_input
@pytest.mark.parametrize("formula, form", [(CRL, "index"), (LR, "index"), (LR, "multihot")], ids=str)
def test_fake_kernels_give_the_shapes_dtypes_and_strides_of_the_real_ones(
    formula, form, rows, layout, k, compact, dtype
):
    logits = inputs(rows, layout, dtype)
    target = make_multihot(4, 11)[:rows] if form == "multihot" else make_index(rows, 11)
    reduction = "sum" if compact else "none"
    kept = forward(OPS, formula, logits, target, k, compact, reduction=reduction)
    grad = torch.ones_like(kept.loss)
    dlogits = backward(OPS, formula, grad, logits, target, kept, k, compact)
    mode = FakeTensorMode()
    fake = mode.from_tensor
    with mode:
        fake_kept = forward(OPS, formula, fake(logits), fake(target), k, compact, reduction=reduction)
        fake_real_kept = Kept(*map(fake, kept))
        fake_dlogits = backward(OPS, formula, fake(grad), fake(logits), fake(target), fake_real_kept, k, compact)
    for name, real, faked in zip((*Kept._fields, "dlogits"), (*kept, dlogits), (*fake_kept, fake_dlogits), strict=True):
        assert faked.shape == real.shape, name
        assert faked.dtype == real.dtype, name
        assert faked.stride() == real.stride(), name


def test_ops_on_meta_tensors():
    for formula, (k, compact) in itertools.product((CRL, SS_LR), FORMS):
        logits, target = torch.empty(5, 11, device="meta"), torch.empty(5, dtype=torch.long, device="meta")
        kept = forward(OPS, formula, logits, target, k, compact)
        assert {t.device.type for t in kept} == {"meta"}
        assert kept.pick_index.shape == (5, k if compact else min(k, 1))


def test_raw_ops_record_no_graph():
    """They stand below autograd: what they compute inside must not become a second, accidental way to a gradient."""
    for formula in (CRL, SS_LR):
        logits = make_logits(3, 11).requires_grad_()
        kept = forward(OPS, formula, logits, make_index(3, 11), 3, False)
        for output in (kept.loss, kept.coefficients, kept.statistics, kept.pick_logit):
            if output.requires_grad:  # torch's own placeholder, which raises or warns, and nothing of ours
                assert "NotImplemented" in output.grad_fn.name()


def test_schemas_are_the_published_ones():
    """Backends in other languages register against these."""
    spec = (
        "str loss, float[] params, float? alpha, SymInt k, SymInt? ignore_index, SymInt first_class, "
        "SymInt all_classes, bool compact, bool labels=False, float label_smoothing=0., float[] margin=[]"
    )
    assert str(OPS.forward.default._schema) == (
        f"fused_losses::forward(Tensor logits, Tensor target, Tensor? weight, str reduction, {spec}) "
        "-> (Tensor loss, Tensor coefficients, Tensor statistics, Tensor pick_index, Tensor pick_logit)"
    )
    assert str(OPS.finish.default._schema) == (
        f"fused_losses::finish(Tensor statistics, Tensor target, Tensor? weight, str reduction, {spec}) "
        "-> (Tensor loss, Tensor coefficients)"
    )
    assert str(OPS.backward.default._schema) == (
        "fused_losses::backward(Tensor grad, Tensor coefficients, Tensor? logits, Tensor target, Tensor statistics, "
        f"Tensor pick_index, Tensor pick_logit, SymInt num_classes, {spec}) -> Tensor"
    )
    assert str(OPS.backward_.default._schema) == (
        "fused_losses::backward_(Tensor grad, Tensor coefficients, Tensor(a!) logits, Tensor target, "
        f"Tensor statistics, Tensor pick_index, Tensor pick_logit, {spec}) -> ()"
    )


# --- the gradient written over the logits -----------------------------------------------------------------------------


def seen(logits: torch.Tensor, target: torch.Tensor, spec) -> tuple[torch.Tensor, ...]:
    """What both backward doors take but the logits: grad and coefficients, then the others. One row is ignored, one NaN
    if there are several."""
    loss, coefficients, *others = OPS.forward(logits, target, None, "none", *spec)
    grad = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype)
    grad[2:3] = math.nan
    return (grad, coefficients), (target, *others)


@pytest.mark.parametrize("backend", [OPS, reference], ids=["op", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 11, 5003])
@pytest.mark.parametrize("rows", [0, 1, 5])  # one row is split among the threads, five are not
@pytest.mark.parametrize("form", ["index", "multihot", "labels"])
def test_a_gradient_over_the_logits_is_the_same(form, rows, classes, dtype, backend):
    """Bit for bit, also between other numbers, which stay as they are."""
    if form == "multihot":
        target = make_multihot(5, classes)[:rows]
    else:
        target = make_index(rows, classes)
        target[1:2] = -1 if form == "labels" else -100
    if form == "labels":
        target = torch.stack((target, torch.where(target == 0, classes - 1, -1)), 1) if classes > 1 else target[:, None]
    labels = {"labels": True, "label_smoothing": 0.1, "ignore_index": -1} if form == "labels" else {}
    for formula, (k, compact) in itertools.product((CRL, LR, SS_LR), FORMS):
        if formula is CRL and form == "multihot":
            continue
        spec = formula.spec(classes, k, compact, **labels)
        wide = make_logits(rows, classes + 3, dtype)
        expected, place = wide.clone(), slice(2, 2 + classes)
        first, behind = seen(wide[:, place], target, spec)
        expected[:, place] = OPS.backward(*first, wide[:, place], *behind, classes, *spec)
        if backend is reference:
            expected[:, place] = reference.backward(*first, wide[:, place], *behind, classes, *spec)
        assert backend.backward_(*first, wide[:, place], *behind, *spec) is None
        torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [OPS, reference], ids=["op", "reference"])
@pytest.mark.parametrize("layout", ["permuted", "expanded"])
def test_logits_that_cannot_be_overwritten_are_refused(layout, backend):
    logits, target, spec = inputs(4, layout), make_index(4, 11), CRL.spec(11)
    before = logits.clone()
    first, behind = seen(logits, target, spec)
    with pytest.raises(ValueError, match=r"contiguous within rows that share no memory.*logits.contiguous\(\)"):
        backend.backward_(*first, logits, *behind, *spec)
    assert torch.equal(logits, before)


def test_a_graph_that_saved_the_logits_notices():
    logits, target, spec = inputs(4, "contiguous"), make_index(4, 11), CRL.spec(11)
    squares = logits.clone().requires_grad_().exp()
    first, behind = seen(squares.detach(), target, spec)
    total = squares.sum()
    OPS.backward_(*first, squares.detach(), *behind, *spec)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_compiled_gradient_over_the_logits():
    logits, target, spec = inputs(4, "contiguous"), make_index(4, 11), CRL.spec(11)
    first, behind = seen(logits, target, spec)

    def twice(z):
        z = z.exp().log()
        OPS.backward_(*first, z, *behind, *spec)
        return 2 * z

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), twice(logits), equal_nan=True)


# --- who serves CUDA: decided without one -----------------------------------------------------------------------------


class Backend:
    """Stands in for the Triton backend."""

    def __init__(self, reason):
        self.reason = reason

    def unserved(self, device, dtype, num_classes):
        return self.reason


@pytest.fixture
def fresh_decisions():
    for cached in (ops._decided, ops._say_once):
        cached.cache_clear()
    yield
    for cached in (ops._decided, ops._say_once):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh_decisions")
def test_triton_serves_cuda_where_it_can(monkeypatch, recwarn):
    backend = Backend(None)
    monkeypatch.setattr(ops, "_import_triton_backend", lambda: (backend, ""))
    assert ops._triton_backend(torch.device("cuda:0"), torch.bfloat16, 1000) is backend
    assert ops._triton_backend(torch.device("cpu"), torch.bfloat16, 1000) is None
    assert not recwarn.list


@pytest.mark.usefixtures("fresh_decisions")
@pytest.mark.parametrize(
    ("imported", "reason"),
    [((None, "Triton is not usable (no module)"), "not usable"), ((Backend("no kernels for float64"), ""), "float64")],
)
def test_the_reference_serves_cuda_otherwise_and_says_so_once(monkeypatch, imported, reason):
    monkeypatch.setattr(ops, "_import_triton_backend", lambda: imported)
    with pytest.warns(UserWarning, match=reason) as said:
        for num_classes in (10, 20, 30):
            assert ops._triton_backend(torch.device("cuda:0"), torch.float64, num_classes) is None
    assert len(said) == 1


def test_cuda_doors_pass_their_arguments_on():
    """On CPU tensors no Triton backend is chosen, so what is called is the reference."""
    logits, target, spec = torch.randn(3, 7), torch.tensor([0, 3, 6]), CRL.spec(7, 2, True)
    loss, *kept = ops._forward_on_cuda(logits, target, None, "mean", *spec)
    torch.testing.assert_close(loss, ops.forward(logits, target, None, "mean", *spec)[0])
    coefficients, statistics, *picks = kept
    for ours, theirs in zip(
        ops._finish_on_cuda(statistics, target, None, "mean", *spec), (loss, coefficients), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    arguments = torch.tensor(0.7), coefficients, None, target, statistics, *picks, 7, *spec
    torch.testing.assert_close(ops._backward_on_cuda(*arguments), ops.backward(*arguments))
    over = logits.clone()
    ops._backward__on_cuda(torch.tensor(0.7), coefficients, over, target, statistics, *picks, *spec)
    torch.testing.assert_close(over, ops.backward(*arguments))


# --- sums over rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_equal_rows(dtype, reduction, weighted):
    """A plain sum of them rounds every time in the same direction."""
    rows = 1_000_003
    logits, target = torch.zeros(1, 2, dtype=dtype).expand(rows, 2), torch.zeros(rows, dtype=torch.int64)
    weight = torch.full((2,), 0.7, dtype=dtype) if weighted else None
    ours, *_ = forward(OPS, LR, logits, target, weight=weight, reduction=reduction)
    values = torch.full((rows,), 2 * math.log(2), dtype=dtype)
    plain = Reduction.of(target, weight, reduction, LR.spec(2), values).loss(values)
    truth = 2 * math.log(2) * (1 if reduction == "mean" else rows * (weight[0].item() if weighted else 1))
    assert_as_accurate(ours, plain, torch.tensor(truth, dtype=torch.float64), reduction)


# --- without the dispatcher -------------------------------------------------------------------------------------------


def test_whoever_is_to_see_an_op_sees_it():
    """Compilers, modes, tracers and transforms: for these a call of the package is a call of the op."""
    found = []

    def note(x):
        found.append(ops.is_seen())
        return x * 1

    x = torch.randn(2)
    note(x)
    with FlopCounterMode(display=False):
        note(x)
    torch.jit.trace(note, (x,), check_trace=False)
    torch.func.vmap(note)(x)
    note(x)
    assert found == [False, True, True, True, False]
    assert (
        torch.compile(lambda x: x + int(ops.is_seen()), backend="eager", fullgraph=True)(x).sub(x).round().eq(1).all()
    )


def test_no_tensor_of_the_cpu_is_taken_past_the_dispatcher():
    assert ops._unseen_triton(torch.randn(2, 3), 3) is None
