"""The raw ops: registered as torch wants them, and with fake kernels that tell the truth."""

import itertools
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import make_index, make_logits, make_multihot
from doors import CRL, LR, SS_LR, Kept, backward, forward, grad_like
from fused_losses import ops, reductions

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
        assert forward_schema == (
            f"fused_losses::{family}_forward(Tensor logits, Tensor target, {common}, bool compact) "
            f"-> (Tensor {rows}, Tensor state, Tensor pick_index, Tensor pick_logit)"
        )
        assert backward_schema == (
            f"fused_losses::{family}_backward(Tensor grad, Tensor? logits, Tensor target, Tensor state, "
            f"Tensor pick_index, Tensor pick_logit, {common}, int num_classes, bool compact) -> Tensor"
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


# --- the reduction ----------------------------------------------------------------------------------------------------


def reduction_inputs(columns: int, dtype: torch.dtype, form: str, weighted: bool):
    """terms, target, weight, positives of 7 rows over 11 classes; the rows 2 and 5 are ignored where rows can be."""
    torch.manual_seed(3)
    terms = torch.rand(7, columns, dtype=dtype).squeeze(1) + 0.5
    if form == "multihot":
        target = make_multihot(7, 11)
        return terms, target, None, torch.stack([target.sum(1).to(dtype)] * 2, 1)[:, 1]
    target = make_index(7, 11)
    target[[2, 5]] = -100
    terms[[2, 5]] = 0
    return terms, target, torch.rand(11, dtype=dtype) if weighted else None, None


REDUCED = [(1, "index", None), (2, "index", None), (2, "index", 1.5), (2, "multihot", None), (2, "multihot", 1.5)]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("k", [0, 3, 11])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns, form, alpha", REDUCED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reduction_op_is_the_plain_one(dtype, columns, form, alpha, weighted, k, reduction):
    """The loss, and slopes that are its derivative."""
    terms, *rest = reduction_inputs(columns, dtype, form, weighted)
    loss, slopes = OPS.reduce_terms(terms, *rest, alpha, 11, k, -100, reduction)
    exact = terms.double().requires_grad_()
    doubled = [t.double() if t is not None and t.is_floating_point() else t for t in rest]
    expected, expected_slopes = reductions.reduce_terms(exact, *doubled, alpha, 11, k, -100, reduction)
    torch.testing.assert_close(loss, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(slopes, expected_slopes.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    (derivative,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(expected_slopes, derivative)


def test_reduction_op_with_nothing_to_reduce():
    terms, target = torch.zeros(3), torch.full((3,), -100)
    assert OPS.reduce_terms(terms, target, None, None, None, 5, 0, -100, "mean")[0].isnan()
    assert OPS.reduce_terms(terms[:0], target[:0], None, None, None, 5, 0, -100, "mean")[0].isnan()
    assert OPS.reduce_terms(terms[:0], target[:0], None, None, None, 5, 0, -100, "sum")[0] == 0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("columns, form, alpha", REDUCED)
def test_opcheck_of_the_reduction(columns, form, alpha, reduction):
    terms, *rest = reduction_inputs(columns, torch.float32, form, form == "index")
    opcheck(OPS.reduce_terms.default, terms, *rest, alpha, 11, 3, -100, reduction)
    opcheck(OPS.reduce_terms.default, terms.requires_grad_(), *rest, alpha, 11, 3, -100, reduction)
