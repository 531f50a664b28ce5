"""The functions inside autograd: upstream gradients, several passes, what is kept alive, second derivatives."""

import warnings

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fused_losses as fl
from cases import (
    CE,
    CRL,
    DTYPES,
    LOGISTIC,
    LOSSES,
    LR,
    SS_LR,
    each,
    each_form,
    make_index,
    make_logits,
    make_multihot,
    make_target,
    value_and_grad,
)

CLASSES = 100
FORMS = {"all": None, "compact": 2, "threshold": 50}  # which form serves k of 100 classes

each_k = pytest.mark.parametrize("k", FORMS.values(), ids=FORMS.keys())


def k_of(loss, k):
    return 99 if k is None and loss.needs_k else k


# --- gradcheck --------------------------------------------------------------------------------------------------------


def assert_gradcheck(loss, logits, target, **options):
    logits = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, target, **options), (logits,), fast_mode=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each(LOSSES)
def test_gradcheck(loss, reduction):
    logits, target = make_logits(4, 40), make_index(4, 40)
    target[2] = -100
    for k in (1, 7, k_of(loss, None)):  # compact, threshold, all
        for hyper in loss.hypers:
            assert_gradcheck(loss, logits, target, k=k, reduction=reduction, **hyper)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each(LOSSES)
def test_gradcheck_weighted(loss, reduction):
    weight = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    for k in (1, 7, k_of(loss, None)):
        assert_gradcheck(loss, make_logits(4, 40), make_index(4, 40), k=k, reduction=reduction, weight=weight)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each(LOGISTIC)
def test_gradcheck_multihot(loss, reduction):
    for k in (1, 7, k_of(loss, None)):
        for hyper in loss.hypers:
            assert_gradcheck(loss, make_logits(4, 15), make_multihot(4, 15), k=k, reduction=reduction, **hyper)


# --- upstream gradients -----------------------------------------------------------------------------------------------


@each_k
@each_form
def test_upstream_gradient_of_any_layout(loss, form, k):
    """Per row, expanded (stride 0), strided, and whatever .sum().backward() makes."""
    logits, target = make_logits(5, CLASSES), make_target(form, 5, CLASSES)
    k = k_of(loss, k)

    def grad_for(upstream):
        z = logits.clone().requires_grad_()
        loss(z, target, k=k, reduction="none").backward(upstream)
        return z.grad

    basis = [grad_for(row) for row in torch.eye(5, dtype=torch.float64)]  # one row's loss at a time
    upstream = torch.tensor([0.3, -2.0, 0.0, 1e3, 1e-3], dtype=torch.float64)
    expected = sum(u * g for u, g in zip(upstream, basis, strict=True))
    torch.testing.assert_close(grad_for(upstream), expected)
    strided = torch.stack([upstream, torch.full_like(upstream, torch.nan)], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(grad_for(strided), grad_for(upstream))
    expanded = torch.tensor(0.7, dtype=torch.float64).expand(5)
    assert expanded.stride() == (0,)
    torch.testing.assert_close(grad_for(expanded), 0.7 * sum(basis))
    _, by_sum = value_and_grad(lambda z: loss(z, target, k=k, reduction="none").sum(), logits)
    torch.testing.assert_close(by_sum, sum(basis))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each_k
@each_form
def test_scalar_upstream_gradient(loss, form, k, reduction):
    logits, target = make_logits(5, CLASSES), make_target(form, 5, CLASSES)
    options = {"k": k_of(loss, k), "reduction": reduction}
    value, grad = value_and_grad(lambda z: loss(z, target, **options), logits)
    _, scaled = value_and_grad(lambda z: loss(z, target, **options) * -3.5, logits)
    torch.testing.assert_close(scaled, -3.5 * grad)
    _, squared = value_and_grad(lambda z: loss(z, target, **options) ** 2, logits)
    torch.testing.assert_close(squared, 2 * value * grad)


@each_k
@each(LOSSES)
def test_squared_rows(loss, k):
    logits, target = make_logits(5, CLASSES), make_index(5, CLASSES)
    k = k_of(loss, k)
    _, grad = value_and_grad(lambda z: (loss(z, target, k=k, reduction="none") ** 2).sum(), logits)
    _, expected = value_and_grad(lambda z: (loss.paper(z, target, k, **loss.hypers[0]) ** 2).sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_zero_upstream_gradient_is_zero():
    logits, target = make_logits(5, CLASSES), make_index(5, CLASSES)
    for loss in LOSSES:
        _, grad = value_and_grad(lambda z, f=loss: f(z, target, k=3) * 0, logits)
        assert (grad == 0).all()


# --- several passes ---------------------------------------------------------------------------------------------------


@each_k
@each_form
def test_two_losses_on_the_same_logits(loss, form, k):
    logits, target = make_logits(5, CLASSES), make_index(5, CLASSES)
    _, first = value_and_grad(lambda z: loss(z, make_target(form, 5, CLASSES), k=k_of(loss, k)), logits)
    _, second = value_and_grad(lambda z: fl.cross_entropy(z, target), logits)
    _, both = value_and_grad(
        lambda z: loss(z, make_target(form, 5, CLASSES), k=k_of(loss, k)) + 2 * fl.cross_entropy(z, target), logits
    )
    torch.testing.assert_close(both, first + 2 * second)


@each_k
@each_form
def test_retain_graph(loss, form, k):
    logits = make_logits(5, CLASSES).requires_grad_()
    value = loss(logits, make_target(form, 5, CLASSES), k=k_of(loss, k))
    value.backward(retain_graph=True)
    once = logits.grad.clone()
    value.backward(retain_graph=True)
    assert torch.equal(logits.grad, 2 * once)
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@each(LOSSES)
def test_no_graph_where_none_is_wanted(loss):
    logits, target = make_logits(5, CLASSES), make_index(5, CLASSES)
    assert not loss(logits, target, k=3).requires_grad
    with torch.no_grad():
        assert not loss(logits.clone().requires_grad_(), target, k=3).requires_grad
    with torch.inference_mode():
        assert loss(logits.clone(), target, k=3).isfinite()


@each(LOSSES)
def test_only_what_asks_for_a_gradient_gets_one(loss):
    """A frozen trunk under a trained head, and the other way round."""
    features, target = make_logits(5, 8), make_index(5, CLASSES)
    head = make_logits(8, CLASSES, seed=1)
    for frozen in ("features", "head"):
        x, w = features.clone().requires_grad_(frozen != "features"), head.clone().requires_grad_(frozen != "head")
        loss(x @ w, target, k=3).backward()
        _, dlogits = value_and_grad(lambda z: loss(z, target, k=3), features @ head)
        if frozen == "features":
            assert x.grad is None
            torch.testing.assert_close(w.grad, features.t() @ dlogits)
        else:
            assert w.grad is None
            torch.testing.assert_close(x.grad, dlogits @ head.t())


@each_k
@each_form
def test_gradient_is_the_callers_own(loss, form, k):
    """Written into in place (as clipping does), it spoils no later pass."""
    logits = make_logits(5, CLASSES).requires_grad_()
    value = loss(logits, make_target(form, 5, CLASSES), k=k_of(loss, k))
    (first,) = torch.autograd.grad(value, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(value, logits)
    assert torch.equal(second, kept)


@each_k
@each_form
def test_the_loss_may_be_changed_in_place(loss, form, k):
    """Training loops do: loss /= accumulation_steps."""
    logits, target = make_logits(5, CLASSES), make_target(form, 5, CLASSES)
    for reduction in ("none", "mean"):
        options = {"k": k_of(loss, k), "reduction": reduction}
        _, expected = value_and_grad(lambda z, o=options: loss(z, target, **o) / 4, logits)
        _, grad = value_and_grad(lambda z, o=options: loss(z, target, **o).div_(4), logits)
        torch.testing.assert_close(grad, expected)


# --- what is kept between forward and backward ------------------------------------------------------------------------


def made_in_a_graph(leaf):
    """Logits that nothing but the loss could keep alive: adding saves neither operand."""
    return leaf + 1


@pytest.mark.parametrize("reduction", ["none", "mean"])
@each(LOSSES)
def test_compact_form_keeps_no_reference_to_the_logits(loss, reduction):
    leaf, target = make_logits(5, 1000).requires_grad_(), make_index(5, 1000)
    _, expected = value_and_grad(lambda z: loss(z + 1, target, k=3, reduction=reduction).sum(), leaf)
    logits = made_in_a_graph(leaf)
    storage, size = StorageWeakRef(logits.untyped_storage()), logits.untyped_storage().nbytes()
    value = loss(logits, target, k=3, reduction=reduction)
    del logits
    assert storage.expired()
    # nor a copy of them: all that the graph holds together is smaller than one matrix
    held = [t for t in saved_tensors(value.grad_fn) if t is not None]
    assert sum(t.untyped_storage().nbytes() for t in held) < size / 4
    value.sum().backward()
    assert torch.equal(leaf.grad, expected)


def saved_tensors(node):
    """The tensors that a custom function's node holds, saved or as attributes."""
    held = list(node.saved_tensors)
    for attribute in vars(node).values():
        parts = attribute if isinstance(attribute, tuple) else (attribute,)
        held += [part for part in parts if isinstance(part, torch.Tensor)]
    return held


@pytest.mark.parametrize(
    "dtype, most", [(torch.float16, 333), (torch.bfloat16, 333), (torch.float32, 166), (torch.float64, 250)], ids=str
)
def test_how_large_a_k_keeps_no_logits(dtype, most):
    """A third of the classes, a sixth, a quarter: up to about where it measured faster."""
    logits, target = make_logits(2, 1000, dtype).requires_grad_(), make_index(2, 1000)
    for k, keeps_logits in ((most, False), (most + 1, True)):
        held = saved_tensors(fl.cross_entropy(logits, target, k=k).grad_fn)
        assert any(t is not None and t.shape == logits.shape for t in held) == keeps_logits, k


@pytest.mark.parametrize("k", [None, 600])
@each((CE, CRL, LR, SS_LR))
def test_the_other_forms_keep_the_logits_themselves_and_no_copy(loss, k):
    leaf, target = make_logits(5, 1000).requires_grad_(), make_index(5, 1000)
    logits = made_in_a_graph(leaf)
    storage, size = StorageWeakRef(logits.untyped_storage()), logits.untyped_storage().nbytes()
    pointer = logits.untyped_storage().data_ptr()
    value = loss(logits, target, k=k)
    del logits
    assert not storage.expired()
    others = [t for t in saved_tensors(value.grad_fn) if t is not None and t.untyped_storage().data_ptr() != pointer]
    assert sum(t.untyped_storage().nbytes() for t in others) < size / 4
    value.backward()
    del value
    assert storage.expired()


def test_logits_changed_between_forward_and_backward():
    """The compact form does not care; the others must notice, as every torch function does."""
    leaf, target = make_logits(5, 1000).requires_grad_(), make_index(5, 1000)
    _, expected = value_and_grad(lambda z: fl.crl_loss(z + 1, target, k=3), leaf)
    logits = made_in_a_graph(leaf)
    value = fl.crl_loss(logits, target, k=3)
    logits.detach().zero_()
    value.backward()
    assert torch.equal(leaf.grad, expected)
    for k in (None, 600):
        logits = made_in_a_graph(leaf)
        value = fl.crl_loss(logits, target, k=k)
        logits.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


# --- second derivatives -----------------------------------------------------------------------------------------------


@each_k
@each_form
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_derivative_is_right_or_raises(loss, form, reduction, k):
    """A gradient penalty, and the same with a loss that is not linear in ours; never a silent zero or None."""
    target, k = make_target(form, 5, CLASSES), k_of(loss, k)
    for outer in (torch.sum, lambda value: (value**2).sum()):
        logits = make_logits(5, CLASSES).requires_grad_()
        objective = outer(loss(logits, target, k=k, reduction=reduction))
        (grad,) = torch.autograd.grad(objective, logits, create_graph=True)
        penalty = grad.pow(2).sum()
        try:
            (second,) = torch.autograd.grad(penalty, logits)
        except RuntimeError as error:
            assert "second derivative" in str(error)
            continue
        z = logits.detach().clone().requires_grad_()
        rows = loss.paper(z, target, k, **loss.hypers[0])
        reduced = {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]
        (true_grad,) = torch.autograd.grad(outer(reduced), z, create_graph=True)
        (true_second,) = torch.autograd.grad(true_grad.pow(2).sum(), z)
        torch.testing.assert_close(second, true_second)


@each_k
@each_form
def test_second_derivative_is_not_skipped(loss, form, k):
    """The ways in which the engine could pass over it without a word."""
    target, k = make_target(form, 5, CLASSES), k_of(loss, k)
    leaf = make_logits(5, CLASSES).requires_grad_()
    logits = made_in_a_graph(leaf)
    value = loss(logits, target, k=k)
    (grad,) = torch.autograd.grad(value, logits, create_graph=True)
    penalty = grad.pow(2).sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(value + penalty, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(penalty, leaf, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        penalty.backward()
    # by the upstream gradient: the double-backward trick for Jacobian-vector products
    upstream = torch.ones((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(leaf, target, k=k), leaf, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(grad.sum(), upstream, allow_unused=True)


def test_second_derivative_of_something_else_still_works():
    """create_graph=True on a sum of ours and theirs: the first gradient is right; only passing through ours raises."""
    logits, target = make_logits(5, CLASSES).requires_grad_(), make_index(5, CLASSES)
    (grad,) = torch.autograd.grad(fl.crl_loss(logits, target) + logits.pow(3).sum(), logits, create_graph=True)
    _, ours = value_and_grad(lambda z: fl.crl_loss(z, target), logits)
    torch.testing.assert_close(grad.detach(), ours + 3 * logits.detach() ** 2)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


# --- mixed precision --------------------------------------------------------------------------------------------------


@each_k
@each_form
def test_gradscaler_in_float16(loss, form, k):
    """A step with scaled float16 gradients is the plain step; one that overflows is skipped and lowers the scale."""
    target, k = make_target(form, 5, CLASSES), k_of(loss, k)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    parameter = torch.nn.Parameter(make_logits(5, CLASSES, torch.float16).float())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    before = parameter.detach().clone()

    def step(factor):
        optimizer.zero_grad()
        value = loss(parameter.half(), target, k=k)
        assert value.dtype == torch.float32
        scaler.scale(value * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1)
    _, truth = value_and_grad(lambda z: loss.paper(z, target, k, **loss.hypers[0]).mean(), before.double())
    torch.testing.assert_close(before - parameter.detach(), truth.float(), rtol=1e-3, atol=1e-6)
    assert scaler.get_scale() == 2.0**12
    after = parameter.detach().clone()
    step(2.0**20)
    assert torch.equal(parameter.detach(), after)
    assert scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(LOSSES)
def test_gradient_has_the_logits_dtype(loss, dtype):
    logits, target = make_logits(5, CLASSES, dtype), make_index(5, CLASSES)
    for k in FORMS.values():
        _, grad = value_and_grad(lambda z, k=k: loss(z, target, k=k_of(loss, k)), logits)
        assert grad.dtype == dtype


@each(LOSSES)
def test_anomaly_mode_finds_nothing(loss):
    logits, target = make_logits(5, CLASSES).requires_grad_(), make_index(5, CLASSES)
    logits.data[:, 60:] = -torch.inf
    target %= 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            for k in FORMS.values():
                loss(logits, target, k=k_of(loss, k)).backward()
    assert logits.grad.isfinite().all()


@each(LOSSES)
def test_other_kinds_of_differentiation_refuse(loss):
    """torch.func and forward mode: an error that says the way out, not a wrong number."""
    logits, target = make_logits(5, CLASSES), make_index(5, CLASSES)
    function = lambda z: loss(z, target, k=3)  # noqa: E731
    linear = lambda x: loss.linear(x, logits, target % 5, k=3)  # noqa: E731
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.vmap):
        for transformed in (function, linear):
            with pytest.raises(RuntimeError, match=r"not by torch\.func.*is_grads_batched=True"):
                transform(transformed)(logits[None] if transform is torch.func.vmap else logits)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        with pytest.raises(NotImplementedError, match="forward mode"):
            function(dual)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_k
@each_form
def test_gradients_of_single_rows(loss, form, k):
    """The way out that the error names."""
    logits, target = make_logits(5, CLASSES).requires_grad_(), make_target(form, 5, CLASSES)
    rows = loss(logits, target, k=k_of(loss, k), reduction="none")
    one_at_a_time = torch.eye(5, dtype=rows.dtype)
    (together,) = torch.autograd.grad(rows, logits, one_at_a_time, is_grads_batched=True, retain_graph=True)
    for number in range(5):
        (alone,) = torch.autograd.grad(rows, logits, one_at_a_time[number], retain_graph=True)
        torch.testing.assert_close(together[number], alone)
