"""The raw ops: registered as torch wants them, and with fake kernels that tell the truth."""

import itertools
import math
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import assert_as_accurate, make_index, make_logits, make_multihot
from doors import CRL, LR, SS_LR, Kept, backward, forward, grad_like
from fused_losses import finish, ops, reductions

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
    forward_op = getattr(OPS, f"{formula.family}_forward").default
    backward_op = getattr(OPS, f"{formula.family}_backward").default
    opcheck(forward_op, logits, target, formula.loss, formula.params, k, -100, compact)

    kept = forward(OPS, formula, logits.detach(), target, k, compact)
    grad = grad_like(formula, logits)
    if layout == "expanded":
        grad = torch.ones((), dtype=grad.dtype).expand(grad.shape)
    if layout == "requires grad":
        grad.requires_grad_()
    withheld = compact and form == "index"
    opcheck(
        backward_op,
        grad,
        None if withheld else logits,
        target,
        *kept[1:],
        formula.loss,
        formula.params,
        k,
        -100,
        11,
        compact,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_form
@each_input
@pytest.mark.parametrize("formula, form", [(CRL, "index"), (LR, "index"), (LR, "multihot")], ids=str)
def test_fake_kernels_give_the_shapes_dtypes_and_strides_of_the_real_ones(
    formula, form, rows, layout, k, compact, dtype
):
    logits = inputs(rows, layout, dtype)
    target = make_multihot(4, 11)[:rows] if form == "multihot" else make_index(rows, 11)
    kept = forward(OPS, formula, logits, target, k, compact)
    grad = grad_like(formula, logits)
    dlogits = backward(OPS, formula, grad, logits, target, kept, k, compact)
    mode = FakeTensorMode()
    fake = mode.from_tensor
    with mode:
        fake_kept = forward(OPS, formula, fake(logits), fake(target), k, compact)
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
        for output in (kept.rows, kept.state, kept.pick_logit):
            if output.requires_grad:  # torch's own placeholder, which raises or warns, and nothing of ours
                assert "NotImplemented" in output.grad_fn.name()


def test_schemas_are_the_published_ones():
    """Wings in other languages register against these."""
    for family, rows in (("softmax", "value"), ("logistic", "sums")):
        forward_schema = str(getattr(OPS, f"{family}_forward").default._schema)
        backward_schema = str(getattr(OPS, f"{family}_backward").default._schema)
        common = "str loss, float[] params, int k, int ignore_index"
        part = "int first_class=0, int? all_classes=None"
        assert forward_schema == (
            f"fused_losses::{family}_forward(Tensor logits, Tensor target, {common}, bool compact, {part}) "
            f"-> (Tensor {rows}, Tensor state, Tensor pick_index, Tensor pick_logit)"
        )
        assert backward_schema == (
            f"fused_losses::{family}_backward(Tensor grad, Tensor? logits, Tensor target, Tensor state, "
            f"Tensor pick_index, Tensor pick_logit, {common}, int num_classes, bool compact, {part}) -> Tensor"
        )


# --- who serves CUDA: decided without one -----------------------------------------------------------------------------


class Wing:
    """Stands in for the Triton wing."""

    def __init__(self, reason):
        self.reason = reason

    def unserved(self, device, dtype, num_classes):
        return self.reason


@pytest.fixture
def fresh_decisions():
    for cached in (ops._triton_wing, ops._say_once):
        cached.cache_clear()
    yield
    for cached in (ops._triton_wing, ops._say_once):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh_decisions")
def test_triton_serves_cuda_where_it_can(monkeypatch, recwarn):
    wing = Wing(None)
    monkeypatch.setattr(ops, "_import_triton_wing", lambda: (wing, ""))
    assert ops._triton_wing(torch.device("cuda:0"), torch.bfloat16, 1000) is wing
    assert ops._triton_wing(torch.device("cpu"), torch.bfloat16, 1000) is None
    assert not recwarn.list


@pytest.mark.usefixtures("fresh_decisions")
@pytest.mark.parametrize(
    ("imported", "reason"),
    [((None, "Triton is not usable (no module)"), "not usable"), ((Wing("no kernels for float64"), ""), "float64")],
)
def test_the_reference_serves_cuda_otherwise_and_says_so_once(monkeypatch, imported, reason):
    monkeypatch.setattr(ops, "_import_triton_wing", lambda: imported)
    with pytest.warns(UserWarning, match=reason) as said:
        for num_classes in (10, 20, 30):
            assert ops._triton_wing(torch.device("cuda:0"), torch.float64, num_classes) is None
    assert len(said) == 1


def test_cuda_doors_pass_their_arguments_on():
    """On CPU tensors no Triton wing is chosen, so what is called is the reference."""
    logits, target = torch.randn(3, 7), torch.tensor([0, 3, 6])
    forward = ops._forward_on_cuda("softmax_forward")
    backward = ops._backward_on_cuda("softmax_backward")
    arguments = ("crl", [1.5, 1.0], 2, -100)
    value, *saved = forward(logits, target, *arguments, True)
    torch.testing.assert_close(value, ops.softmax_forward(logits, target, *arguments, True)[0])
    grad = torch.rand(3)
    torch.testing.assert_close(
        backward(grad, None, target, *saved, *arguments, 7, True),
        ops.softmax_backward(grad, None, target, *saved, *arguments, 7, True),
    )


# --- whole losses -----------------------------------------------------------------------------------------------------


def whole_loss_inputs(formula, dtype: torch.dtype, form: str, weighted: bool):
    """logits, target, weight of 7 rows over 11 classes; the rows 2 and 5 are ignored where rows can be."""
    logits = make_logits(7, 11, dtype)
    if form == "multihot":
        return logits, make_multihot(7, 11), None
    target = make_index(7, 11)
    target[[2, 5]] = -100
    return logits, target, torch.linspace(0.5, 2, 11, dtype=dtype) if weighted else None


WHOLE = [
    (CRL, "index", False, None),
    (CRL, "index", True, None),
    (LR, "index", False, None),
    (SS_LR, "index", False, 1.5),
    (SS_LR, "index", True, 1.5),
    (SS_LR, "multihot", False, None),
    (SS_LR, "multihot", False, 1.5),
]
each_whole = pytest.mark.parametrize("formula, form, weighted, alpha", WHOLE, ids=str)
each_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@each_reduction
@pytest.mark.parametrize("k, compact", [(0, False), (3, True), (3, False), (11, True)])
@each_whole
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_whole_loss_is_a_door_and_the_reduction(dtype, formula, form, weighted, alpha, k, compact, reduction):
    """Values, slopes that are their derivative by the rows' terms, and the gradient that these give."""
    logits, target, weight = whole_loss_inputs(formula, dtype, form, weighted)
    options = formula.loss, formula.params
    value, slopes, *kept = OPS.loss_forward(
        logits, target, weight, formula.family, *options, alpha, k, -100, reduction, compact
    )
    terms, *expected_kept = door = forward(OPS, formula, logits, target, k, compact)
    for ours, expected in zip(kept, expected_kept, strict=True):
        assert torch.equal(ours, expected)

    exact = terms.double().requires_grad_()
    positives = kept[0][:, 1].double() if form == "multihot" else None
    expected, expected_slopes = reductions.reduce_terms(
        exact, target, None if weight is None else weight.double(), positives, alpha, 11, k, -100, reduction
    )
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(value, expected.to(dtype), **close)
    (derivative,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(expected_slopes, derivative)
    if slopes.shape == (0,):
        assert torch.equal(value, terms)
    else:
        torch.testing.assert_close(slopes, expected_slopes.to(dtype), **close)

    grad = torch.rand_like(value)
    ours = OPS.loss_backward(grad, slopes, logits, target, *kept, formula.family, *options, k, -100, 11, compact)
    of_terms = reductions.grad_of_terms(grad, expected_slopes.to(dtype))
    expected = backward(OPS, formula, of_terms, logits, target, door, k, compact)
    torch.testing.assert_close(ours, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_equal_rows(dtype, reduction, weighted):
    """A plain sum of them rounds every time in the same direction."""
    rows = 1_000_003
    logits, target = torch.zeros(1, 2, dtype=dtype).expand(rows, 2), torch.zeros(rows, dtype=torch.int64)
    weight = torch.full((2,), 0.7, dtype=dtype) if weighted else None
    ours, *_ = OPS.forward(logits, target, weight, reduction, *LR.spec(2))
    values = torch.full((rows,), 2 * math.log(2), dtype=dtype)
    plain = finish.Reduction.of(target, weight, reduction, -100, values).loss(values)
    truth = 2 * math.log(2) * (1 if reduction == "mean" else rows * (weight[0].item() if weighted else 1))
    assert_as_accurate(ours, plain, torch.tensor(truth, dtype=torch.float64), reduction)


@each_reduction
@pytest.mark.parametrize("formula, alpha", [(CRL, None), (SS_LR, 1.5)], ids=str)
def test_a_whole_loss_with_nothing_to_reduce(formula, alpha, reduction):
    for rows in 3, 0:
        logits, target = make_logits(rows, 5, torch.float32), torch.full((rows,), -100)
        value, *_ = OPS.loss_forward(
            logits, target, None, formula.family, formula.loss, formula.params, alpha, 0, -100, reduction, False
        )
        shape = (rows,) if reduction == "none" else ()
        expected = torch.full(shape, torch.nan if reduction == "mean" else 0.0)
        torch.testing.assert_close(value, expected, equal_nan=True)


@each_reduction
@each_whole
def test_opcheck_of_a_whole_loss(formula, form, weighted, alpha, reduction):
    logits, target, weight = whole_loss_inputs(formula, torch.float32, form, weighted)
    options = formula.family, formula.loss, formula.params
    arguments = target, weight, *options, alpha, 3, -100, reduction, True
    opcheck(OPS.loss_forward.default, logits, *arguments)
    opcheck(OPS.loss_forward.default, logits.clone().requires_grad_(), *arguments)
    value, slopes, *kept = OPS.loss_forward(logits, *arguments)
    withheld = None if form == "index" else logits
    opcheck(
        OPS.loss_backward.default, torch.ones_like(value), slopes, withheld, target, *kept, *options, 3, -100, 11, True
    )
