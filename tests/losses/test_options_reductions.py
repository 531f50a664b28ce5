"""Margins, smoothing and labels: reductions, class weights, modules, gradients, compiled graphs, autocast."""

import copy
import pickle

import pytest
import torch

import fused_losses as fl
from cases import CE, CRL, HS_LR, LR, SS_LR, each, value_and_grad
from options import (
    CLASSES,
    EVERY_LOSS,
    FORMS,
    INDEX,
    MARGINS,
    ROWS,
    SCALE,
    SMOOTHED,
    Case,
    make_logits,
    make_target,
    make_weight,
    margin_option,
)

LABELLED = ("class indices", "two labels", "padding", "rows without labels")


def full(loss, form="padding", k=5) -> Case:
    return Case(loss, form, "per row", 0.1 if loss in SMOOTHED else 0.0, k)


def from_logits(case: Case, logits, **options):
    return value_and_grad(lambda z: case.loss(z, case.target, **{**case.options, **options}), logits)


# --- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LABELLED)
@each(EVERY_LOSS)
def test_mean_and_sum(loss, form):
    for k in loss.ks(None, 5):
        case, logits = full(loss, form, k), make_logits()
        rows, of_rows = value_and_grad(case.truth, logits, torch.ones(ROWS))
        counted = int(case.counted.sum())
        for reduction, divisor in (("sum", 1), ("mean", counted)):
            value, grad = from_logits(case, logits, reduction=reduction)
            assert value.shape == ()
            torch.testing.assert_close(value, rows.sum() / divisor)
            torch.testing.assert_close(grad, of_rows / divisor)


@pytest.mark.parametrize("margin", [name for name in MARGINS if name != "no margin"])
@each(EVERY_LOSS)
def test_class_weights_with_a_margin(loss, margin):
    logits, weight = make_logits(), torch.arange(CLASSES).mul(0.25).double()
    for k in loss.ks(None, 5):
        case = Case(loss, "class indices", margin, k=k)
        per_row = torch.where(case.counted, weight[case.target.clamp(min=0)], 0)
        rows, of_rows = value_and_grad(lambda z: per_row * case.truth(z), logits, torch.ones(ROWS))
        for reduction, divisor in (("none", 1), ("sum", 1), ("mean", per_row.sum())):
            upstream = torch.ones(ROWS) if reduction == "none" else None
            value, grad = value_and_grad(
                lambda z: loss(z, case.target, weight=weight, reduction=reduction, **case.options), logits, upstream
            )
            torch.testing.assert_close(value, rows if reduction == "none" else rows.sum() / divisor)
            torch.testing.assert_close(grad, of_rows / divisor)


def test_another_ignore_index_than_the_default():
    logits, target = make_logits(), torch.tensor([7, 12, 0, 39, 20, 3])
    options = {"margin": fl.Margin(0.5, 0.1, SCALE), "label_smoothing": 0.1}
    elsewhere = target.masked_fill(target == 12, -100)
    for loss in (CE, CRL, LR):
        torch.testing.assert_close(
            value_and_grad(lambda z: loss(z, target, ignore_index=12, **options), logits),
            value_and_grad(lambda z: loss(z, elsewhere, **options), logits),
        )


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@each(EVERY_LOSS)
def test_modules_are_the_functions(loss, form):
    for reduction in ("none", "mean"):
        case, logits = full(loss, form), make_logits()
        module = loss.module_class()(reduction=reduction, **case.options)
        upstream = torch.linspace(-1, 2, ROWS) if reduction == "none" else None
        torch.testing.assert_close(
            value_and_grad(lambda z: module(z, case.target), logits, upstream),
            value_and_grad(lambda z: case.ours(z, reduction), logits, upstream),
            rtol=0,
            atol=0,
        )


@each(EVERY_LOSS)
def test_options_of_a_module_may_be_assigned(loss):
    case, logits = full(loss, "class indices"), make_logits()
    module = loss.module_class()(k=5)
    module.margin = case.options["margin"]
    if loss in SMOOTHED:
        module.label_smoothing = 0.1
    assert torch.equal(module(logits, case.target), case.ours(logits, "mean"))
    with pytest.raises((TypeError, ValueError)):
        module.margin = 0.5
    with pytest.raises(ValueError):
        module.label_smoothing = 1.5
    module.margin = None
    if loss in SMOOTHED:
        module.label_smoothing = 0.0
    assert torch.equal(module(logits, case.target), loss(logits, case.target, k=5))


def test_modules_show_copy_and_pickle_their_options():
    module = fl.CrossEntropyLoss(k=5, margin=fl.Margin(angle=0.5, scale=SCALE), label_smoothing=0.1)
    logits, target = make_logits(), make_target("class indices")
    for part in ("angle=0.5", "label_smoothing=0.1"):
        assert part in repr(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(logits, target), module(logits, target))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["class indices", "three labels", "padding"])
@each(EVERY_LOSS)
def test_gradcheck(loss, form):
    """Off the edges of selection and off the angles where psi has a corner."""
    case = full(loss, form)
    logits = make_logits().requires_grad_()
    for reduction in ("none", "mean"):
        torch.autograd.gradcheck(lambda z: case.ours(z, reduction), (logits,), fast_mode=True)


@each(EVERY_LOSS)
def test_upstream_gradients_of_any_kind(loss):
    case, logits = full(loss), make_logits()
    _, unit = value_and_grad(case.ours, logits, torch.ones(ROWS))
    for upstream in (torch.tensor(-3.0).expand(ROWS), torch.linspace(-1, 2, 2 * ROWS)[::2]):
        _, grad = value_and_grad(case.ours, logits, upstream)
        torch.testing.assert_close(grad, upstream.double()[:, None] * unit)
    _, grad = value_and_grad(lambda z: 2.5 * case.ours(z, "sum"), logits)
    torch.testing.assert_close(grad, 2.5 * unit)


def test_labels_and_margins_get_no_gradient_silently():
    logits, index, weight = make_logits(), torch.tensor(INDEX["padding"]), make_weight("padding")
    with pytest.raises((TypeError, ValueError, RuntimeError), match="detach"):
        fl.cross_entropy(logits, fl.Labels(index, weight.requires_grad_()))
    for name in ("angle", "cosine"):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="detach"):
            margin = fl.Margin(**{name: torch.full((ROWS,), 0.1, requires_grad=True)}, scale=SCALE)
            fl.cross_entropy(logits, make_target("class indices"), margin=margin)


# --- compiled, autocast -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["class indices", "padding"])
@each(EVERY_LOSS)
def test_fullgraph_gives_the_same_numbers(loss, form):
    """With the labels made inside of the graph, as a training step does."""
    k = 5 if loss.needs_k or EVERY_LOSS.index(loss) % 2 else None
    case, logits = full(loss, form, k), make_logits(torch.float32)
    target = (case.target,) if form == "class indices" else (torch.tensor(INDEX[form]), make_weight(form))

    def step(z, *target):
        return loss(z * 1.0, fl.Labels(*target) if len(target) == 2 else target[0], **case.options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grad(lambda z: compiled(z, *target), logits), value_and_grad(lambda z: step(z, *target), logits)
    )


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_takes_labels():
    labels, logits = make_target("padding"), make_logits(torch.float32)
    for loss in (CE, HS_LR):
        compiled = torch.compile(lambda z, y: loss(z, y, k=5), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            value_and_grad(lambda z: compiled(z, labels), logits),
            value_and_grad(lambda z: loss(z, labels, k=5), logits),
        )


@pytest.mark.usefixtures("fresh_compiler")
def test_mixup_and_modules_compile():
    a, b = torch.tensor([7, 12, 0, 39, 20, 3]), torch.tensor([8, 12, 1, 0, 3, 20])
    lam, angle = torch.rand(ROWS), torch.rand(ROWS) / 2
    criterion = fl.CrossEntropyLoss(k=5, label_smoothing=0.1)

    def step(z, a, b, lam, angle):
        own = fl.crl_loss(z, fl.Labels.mixup(a, b, lam), margin=fl.Margin(angle=angle, scale=SCALE))
        return own + criterion(z, fl.Labels.mixup(a, b, lam))

    logits = make_logits(torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grad(lambda z: compiled(z, a, b, lam, angle), logits),
        value_and_grad(lambda z: step(z, a, b, lam, angle), logits),
    )


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_serves_other_values_of_the_options():
    """Tensors of a margin and weights of labels are no constants of a graph."""
    compiled = torch.compile(
        lambda z, y, angle: fl.cross_entropy(z, y, margin=fl.Margin(angle=angle, scale=SCALE)),
        fullgraph=True,
        backend="aot_eager",
    )
    logits, target = make_logits(torch.float32), make_target("class indices")
    values = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (0.1, 0.2, 0.4):
            angle = torch.full((ROWS,), size)
            value = compiled(logits, target, angle)
            expected = fl.cross_entropy(logits, target, margin=fl.Margin(angle=angle, scale=SCALE))
            torch.testing.assert_close(value, expected)
            values.add(value.item())
    assert len(values) == 3


@each((CE, CRL, LR, HS_LR, SS_LR))
def test_autocast(loss):
    """The losses are float32 from 16-bit logits, inside of autocast and outside."""
    case = full(loss, "two labels")
    logits = make_logits(torch.bfloat16)
    expected = value_and_grad(lambda z: case.ours(z, "mean"), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_grad(lambda z: case.ours(z, "mean"), logits)
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    assert inside[0].dtype == torch.float32


@each((CE, CRL, LR))
def test_checkpoint(loss):
    case, logits = full(loss, "two labels"), make_logits()
    torch.testing.assert_close(
        value_and_grad(
            lambda z: torch.utils.checkpoint.checkpoint(lambda t: case.ours(t, "mean"), z, use_reentrant=False), logits
        ),
        value_and_grad(lambda z: case.ours(z, "mean"), logits),
    )


def test_half_precision_losses_are_float32():
    for dtype in (torch.float16, torch.bfloat16):
        for name in MARGINS:
            value = fl.cross_entropy(make_logits(dtype), make_target("class indices"), **margin_option(name))
            assert value.dtype == torch.float32
