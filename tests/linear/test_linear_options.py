"""A linear layer with a loss: margins, smoothing, several labels, learned scales, a bias of all cosines."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from layers import Watch, assert_same, cosines, make_layer, value_and_grads
from torch import nn

import fused_losses as fl
import options
import paper
from cases import CE, CRL, HS_LR, LOGISTIC, LR, SOFTMAX, SS_LR, each
from options import EVERY_LOSS, FORMS, INDEX, OWN, ROWS, SMOOTHED, make_target, make_weight

FEATURES, CLASSES = 8, 100
GRADIENTS = {  # k and sparse_grad
    "all": (None, False),
    "picks": (3, False),
    "dense": (50, False),
    "sparse picks": (3, True),
    "sparse": (50, True),
}
each_gradient = pytest.mark.parametrize("way", GRADIENTS)
CHUNKS = (None, 1, 3 * CLASSES * 8)  # one chunk, one row, three rows
REDUCTIONS = ("mean", "none", "sum")
MARGINS = (  # in a cosine layer of scale 6, and in a plain one, whose logits are less than 60
    {"angle": 0.5},
    {"cosine": 0.35},
    {"angle": 0.25, "cosine": -0.125},
    {"angle": options.MARGINS["per row"]["angle"], "cosine": options.MARGINS["per row"]["cosine"]},
)


def way_of(loss, way):
    k, sparse = GRADIENTS[way]
    return CLASSES - 1 if k is None and loss.needs_k else k, fl.LinearLossOptions(sparse_grad=sparse)


def layer(dtype=torch.float64):
    """Row 0 right at its first class, row 1 right opposite of it."""
    x, w, b = make_layer(ROWS, FEATURES, CLASSES, dtype)
    w[7], w[12] = x[0] + 0.25 * w[7], -2 * x[1] + 0.25 * w[12]
    return x, w, b


def upstream_of(reduction):
    return torch.linspace(-1, 2, ROWS, dtype=torch.float64) if reduction == "none" else None


# --- the same as the loss from logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@each_gradient
@each(EVERY_LOSS)
def test_equals_the_loss_of_the_logits(loss, way, form):
    """Values, and the gradients by input, weight and bias; chunks, reductions and margins in turn."""
    (k, how), turn = way_of(loss, way), 7 * list(GRADIENTS).index(way) + FORMS.index(form) + 5 * EVERY_LOSS.index(loss)
    reduction, margin = REDUCTIONS[turn % 3], MARGINS[turn % 4]
    how = fl.LinearLossOptions(CHUNKS[turn // 3 % 3], how.sparse_grad)
    smoothing = {"label_smoothing": 0.1} if loss in SMOOTHED and turn % 3 else {}
    target, shared = make_target(form), {"k": k, "reduction": reduction, **smoothing}
    x, w, b = layer()

    def plain(x, w, b):
        margin_ = fl.Margin(**margin, scale=60.0)
        return loss.linear(x, w, target, linear_bias=b, options=how, margin=margin_, **shared)

    def cosine(x, w):
        return loss.linear(x, w, target, normalize=True, scale=6.0, options=how, margin=fl.Margin(**margin), **shared)

    of = {"upstream": upstream_of(reduction)}
    assert_same(
        value_and_grads(plain, x, w, b, **of),
        value_and_grads(
            lambda x, w, b: loss(F.linear(x, w, b), target, margin=fl.Margin(**margin, scale=60.0), **shared),
            x, w, b, **of,
        ),
    )  # fmt: skip
    got = value_and_grads(cosine, x, w, **of)
    assert_same(
        got,
        value_and_grads(
            lambda x, w: loss(cosines(x, w, 6.0), target, margin=fl.Margin(**margin, scale=6.0), **shared), x, w, **of
        ),
    )
    assert got[2].is_sparse == how.sparse_grad


@pytest.mark.parametrize("form", ["class indices", "two labels", "padding", "rows without labels"])
@each_gradient
@each(EVERY_LOSS)
def test_without_margins(loss, way, form):
    k, how = way_of(loss, way)
    smoothing = {"label_smoothing": 0.1} if loss in SMOOTHED else {}
    target, shared, (x, w, b) = make_target(form), {"k": k, **smoothing}, layer()
    assert_same(
        value_and_grads(lambda x, w, b: loss.linear(x, w, target, linear_bias=b, options=how, **shared), x, w, b),
        value_and_grads(lambda x, w, b: loss(F.linear(x, w, b), target, **shared), x, w, b),
    )


@pytest.mark.parametrize("form", list(INDEX))
@each_gradient
@each(LOGISTIC)
def test_sparse_multihot_rows(loss, way, form):
    """Labels without weights are the dense multi-hot target, sparse_grad and all."""
    k, how = way_of(loss, way)
    (x, w, b), labels, dense = layer(), make_target(form, weighted=False), torch.zeros(ROWS, CLASSES)
    for row, classes in enumerate(INDEX[form]):
        dense[row, [c for c in classes if c != -1]] = 1
    for chunk_bytes in CHUNKS:
        options_ = fl.LinearLossOptions(chunk_bytes, how.sparse_grad)
        assert_same(
            value_and_grads(lambda x, w, b: loss.linear(x, w, labels, linear_bias=b, k=k, options=options_), x, w, b),
            value_and_grads(lambda x, w, b: loss(F.linear(x, w, b), dense, k=k), x, w, b),
        )


@pytest.mark.parametrize("form", ["class indices", "padding", "duplicates"])
@pytest.mark.parametrize("k", [1, 3, 50])
@each(EVERY_LOSS)
def test_sparse_gradients_touch_labels_and_picks(loss, k, form):
    x, w, _ = layer()
    target, judged = make_target(form), options.paper_labels(form)
    how = fl.LinearLossOptions(sparse_grad=True)
    gradient = value_and_grads(lambda x, w: loss.linear(x, w, target, k=k, options=how), x, w)[2]
    logits = F.linear(x, w)
    positive, _ = paper.label_matrix(logits, judged)
    counted = torch.tensor([bool(of_row) for of_row in judged])
    touched = ((positive | paper.negatives(logits, positive, k)) & counted[:, None]).any(0)
    assert torch.equal(gradient._indices()[0], touched.nonzero().squeeze(1))
    torch.sparse_coo_tensor(gradient._indices(), gradient._values(), gradient.shape, check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@each((CE, CRL, LR, HS_LR))
def test_lower_precision(loss, normalize, dtype):
    """No further off than the same layer with the loss of its logits."""
    tensors, target = layer(dtype)[:2], make_target("padding")
    smoothing = {"label_smoothing": 0.1} if loss in SMOOTHED else {}
    for k in loss.ks(None, 50):
        shared = {"k": k, "margin": fl.Margin(0.25, 0.125, 60.0 if not normalize else None), **smoothing}

        def ours(x, w):
            return loss.linear(x, w, target, normalize=normalize, scale=6.0 if normalize else 1.0, **shared)

        got = value_and_grads(ours, *tensors)
        truth = value_and_grads(ours, *(t.double() for t in tensors))
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        for a, b in zip(got, truth, strict=True):
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_one_row_alone():
    x, w, b = layer()
    index, weight = torch.tensor(INDEX["padding"]), make_weight("padding")
    for loss in EVERY_LOSS:
        for k in (3, 50):
            one = loss.linear(x[0], w, fl.Labels(index[0], weight[0]), linear_bias=b, k=k, reduction="sum")
            torch.testing.assert_close(
                one, loss.linear(x[:1], w, fl.Labels(index[:1], weight[:1]), linear_bias=b, k=k, reduction="sum")
            )


@each(SOFTMAX)
def test_class_weights_with_a_margin(loss):
    (x, w, _), target, weight = layer(), make_target("class indices"), torch.linspace(0.1, 3, CLASSES)
    for k in (None, 3, 50):
        for reduction in REDUCTIONS:
            shared = {"k": k, "reduction": reduction, "weight": weight}
            assert_same(
                value_and_grads(
                    lambda x, w: loss.linear(
                        x, w, target, normalize=True, scale=6.0, margin=fl.Margin(angle=0.5), **shared
                    ),
                    x, w, upstream=upstream_of(reduction),
                ),
                value_and_grads(
                    lambda x, w: loss(cosines(x, w, 6.0), target, margin=fl.Margin(angle=0.5, scale=6.0), **shared),
                    x, w, upstream=upstream_of(reduction),
                ),
            )  # fmt: skip


@pytest.mark.parametrize("k", [None, 3, 50])
def test_linear_cross_entropy_takes_the_options(k):
    (x, w, b), labels = layer(), make_target("two labels")
    shared = {"k": k, "label_smoothing": 0.1, "margin": fl.Margin(cosine=0.2, scale=60.0)}
    assert_same(
        value_and_grads(lambda x, w, b: fl.linear_cross_entropy(x, w, labels, linear_bias=b, **shared), x, w, b),
        value_and_grads(lambda x, w, b: fl.cross_entropy(F.linear(x, w, b), labels, **shared), x, w, b),
    )


# --- the module -------------------------------------------------------------------------------------------------------


@each(EVERY_LOSS)
def test_module_is_the_loss_of_its_logits(loss):
    (x, *_), target = layer(), make_target("padding")
    smoothing = {"label_smoothing": 0.1} if loss in SMOOTHED else {}
    for k in loss.ks(None, 3, 50):
        criterion = loss.module_class()(k=k, margin=fl.Margin(0.5, 0.1), **smoothing)
        module = fl.LinearLoss(FEATURES, CLASSES, loss=criterion, normalize=True, scale=6.0, dtype=torch.float64)
        from_logits = loss.module_class()(k=k, margin=fl.Margin(0.5, 0.1, scale=6.0), **smoothing)
        torch.testing.assert_close(module(x, target), from_logits(module.logits(x), target))
        assert "angle=0.5" in repr(module)


def test_logits_and_statistics_are_without_margin():
    (x, *_), target = layer(), make_target("class indices")
    module = fl.LinearLoss(
        FEATURES, CLASSES, loss=fl.CrossEntropyLoss(k=3, margin=fl.Margin(angle=0.5)), normalize=True, scale=6.0,
        dtype=torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(module.logits(x), cosines(x, module.weight, 6.0))
    _, found = module(x, target, return_statistics=True)
    expected = fl.row_statistics(module.logits(x), target, k=3)
    torch.testing.assert_close(found.target_logit, expected.target_logit)
    assert torch.equal(found.correct, expected.correct)


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["arcface_28.6", "arcface_57.3", "cosface_0.2", "cosface_0.35"])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_faces_are_those_of_pytorch_metric_learning(case, chunk_bytes):
    from test_paper import PEERS, peer

    found = {key: float(peer(case, key)) for key in ("angle", "cosine") if f"{case}/{key}" in PEERS}
    weight = peer(case, "weight")
    module = fl.LinearLoss(
        weight.shape[1], weight.shape[0], loss=fl.CrossEntropyLoss(margin=fl.Margin(**found)), normalize=True,
        scale=float(peer(case, "scale")), options=fl.LinearLossOptions(chunk_bytes), dtype=torch.float64,
    )  # fmt: skip
    module.weight = nn.Parameter(weight.clone())
    x = peer(case, "input").clone().requires_grad_()
    value = module(x, peer(case, "target"))
    value.backward()
    torch.testing.assert_close(value.detach(), peer(case, "value"), rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, peer(case, "dinput"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.weight.grad, peer(case, "dweight"), rtol=1e-10, atol=1e-12)


# --- a scale that is learned ------------------------------------------------------------------------------------------


def judged(loss, x, w, scale, form, k, margin, bias=0.0, smoothing=0.0):
    """The mean of the judge's rows of scale (cos + margin) + bias, differentiable by the scale."""
    cos = F.normalize(x, dim=1) @ F.normalize(w, dim=1).t()
    labels = options.paper_labels(form)
    z = scale * paper.with_margin(cos, labels, margin) + bias
    plain = scale * cos + bias
    # selection by the plain logits, with the labels' own out of it: what psi makes of them does not matter there
    of_labels, _ = paper.label_matrix(cos, labels)
    moved = torch.where(of_labels, z, plain)
    if loss.family == "softmax":
        one = lambda z, y: loss.paper(z, y, None, **loss.hypers[0])  # noqa: E731
        rows = paper.softmax_rows(one, moved, labels, k, label_smoothing=smoothing)
        return rows.sum() / sum(map(bool, labels))
    return paper.logistic_rows(moved, labels, k, label_smoothing=smoothing, **loss.hypers[0]).mean()


@pytest.mark.parametrize("margin", [{}, {"angle": 0.5}, {"cosine": 0.35}, {"angle": 0.25, "cosine": 0.125}], ids=str)
@pytest.mark.parametrize("way", ["all", "picks", "dense", "sparse picks"])
@each((CE, CRL, OWN, LR, HS_LR, SS_LR))
def test_the_gradient_by_the_scale(loss, way, margin):
    (x, w, _), (k, how) = layer(), way_of(loss, way)
    judge = paper.Margin(**margin) if margin else None
    given = {"margin": fl.Margin(**margin)} if margin else {}
    for form, smoothing in (("padding", 0.0), *((("two labels", 0.1),) if loss in SMOOTHED else ())):
        target, smoothed = make_target(form), {"label_smoothing": smoothing} if smoothing else {}
        assert_same(
            value_and_grads(
                lambda x, w, s: loss.linear(
                    x, w, target, k=k, normalize=True, scale=s, options=how, **given, **smoothed
                ),
                x, w, torch.tensor(6.0, dtype=torch.float64),
            ),
            value_and_grads(
                lambda x, w, s: judged(loss, x, w, s, form, k, judge, smoothing=smoothing),
                x, w, torch.tensor(6.0, dtype=torch.float64),
            ),
        )  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("k", [None, 3, 50])
def test_a_tensor_as_scale(k, chunk_bytes):
    """With a gradient of its own and without, alone or with those of input and weight, for every reduction."""
    (x, w, _), target, how = layer(), make_target("class indices"), fl.LinearLossOptions(chunk_bytes)
    for reduction in REDUCTIONS:
        shared = {"k": k, "reduction": reduction}
        number = fl.linear_cross_entropy(x, w, target, normalize=True, scale=6.0, options=how, **shared)
        scale = torch.tensor(6.0, dtype=torch.float64)
        fixed = fl.linear_cross_entropy(x, w, target, normalize=True, scale=scale, options=how, **shared)
        assert not fixed.requires_grad
        torch.testing.assert_close(fixed, number)
        scale.requires_grad_()
        value = fl.linear_cross_entropy(x, w, target, normalize=True, scale=scale, options=how, **shared)
        (alone,) = torch.autograd.grad(value.sum(), scale)
        of_all = value_and_grads(
            lambda x, w, s: fl.linear_cross_entropy(x, w, target, normalize=True, scale=s, options=how, **shared).sum(),
            x, w, scale, upstream=torch.tensor(1.0),
        )  # fmt: skip
        torch.testing.assert_close(alone, of_all[3])
        expected = value_and_grads(
            lambda x, w, s: fl.cross_entropy(s * cosines(x, w, 1.0), target, **shared).sum(),
            x, w, scale, upstream=torch.tensor(1.0),
        )  # fmt: skip
        assert_same(of_all, expected)


def learned(**options_) -> fl.LinearLoss:
    return fl.LinearLoss(FEATURES, CLASSES, normalize=True, scale="learned", dtype=torch.float64, **options_)


def test_a_learned_scale_is_a_parameter_that_learns():
    torch.manual_seed(0)
    (x, *_), target = layer(), make_target("two labels")
    module = learned(loss=fl.CrossEntropyLoss(k=50, margin=fl.Margin(angle=0.25)))
    others = [p for name, p in module.named_parameters() if name != "weight"]
    assert [p.numel() for p in others] == [1]
    step = torch.optim.SGD(module.parameters(), lr=0.1)
    before, seen = others[0].detach().clone(), []
    for _ in range(5):
        loss = module(x, target)
        step.zero_grad()
        loss.backward()
        assert others[0].grad.isfinite().all() and others[0].grad != 0
        step.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0] and others[0] != before
    twin = learned()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.logits(x), module.logits(x))
    assert torch.equal(copy.deepcopy(module)(x, target), module(x, target))


def test_the_scale_of_logits_of_a_learned_scale_has_a_gradient_too():
    (x, *_), module = layer(), learned()
    (scale,) = (p for name, p in module.named_parameters() if name != "weight")
    module.logits(x).square().sum().backward()
    assert scale.grad is not None and scale.grad != 0


def test_a_grown_head_keeps_scale_and_bias():
    (x, *_), module = layer(), learned(logit_bias=True, loss=fl.LRLoss())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "weight":
                parameter.add_(0.125)
    grown = module.grown(CLASSES + 5)
    torch.testing.assert_close(grown.logits(x)[:, :CLASSES], module.logits(x))
    assert set(grown.state_dict()) == set(module.state_dict())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, "learn", torch.ones(3), torch.tensor(1)], ids=str)
def test_scales_that_are_none(scale):
    (x, w, _), target = layer(), make_target("class indices")
    with pytest.raises((TypeError, ValueError), match="scale"):
        fl.linear_cross_entropy(x, w, target, normalize=True, scale=scale)
    with pytest.raises((TypeError, ValueError), match="scale"):
        fl.LinearLoss(FEATURES, CLASSES, normalize=True, scale=scale)


def test_the_scale_of_a_margin_is_the_layers():
    (x, w, _), target = layer(), make_target("class indices")
    with pytest.raises(ValueError, match="scale"):
        fl.linear_cross_entropy(x, w, target, normalize=True, scale=6.0, margin=fl.Margin(0.5, scale=7.0))


def test_a_learned_scale_needs_cosines():
    for given in ({"scale": "learned"}, {"logit_bias": True}):
        with pytest.raises(ValueError, match="normalize"):
            fl.LinearLoss(FEATURES, CLASSES, **given)


# --- a bias that all classes share ------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [{}, {"angle": 0.5}, {"cosine": 0.35}], ids=str)
@pytest.mark.parametrize("way", ["all", "picks", "dense", "sparse picks"])
@each((CE, LR, HS_LR, SS_LR))
def test_one_bias_for_all_cosines(loss, way, margin):
    """The margin is one of the cosine: scale (cos(theta + angle) - cosine) + bias. Gradients by all four."""
    (x, w, _), (k, how) = layer(), way_of(loss, way)
    given = {"margin": fl.Margin(**margin)} if margin else {}
    module = learned(loss=loss.module_class()(k=k, **given), logit_bias=True, options=how)
    module.weight = nn.Parameter(w.clone())
    with torch.no_grad():
        module.bias.fill_(-1.5)
    cosine = F.normalize(x, dim=1) @ F.normalize(w, dim=1).t()
    scale = ((module.logits(x) - module.bias) / cosine).mean().detach().requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    target = make_target("padding")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = module(ours, target)
    value.backward()
    w = w.clone().requires_grad_()
    judge = paper.Margin(**margin) if margin else None
    expected = judged(loss, theirs, w, scale, "padding", k, judge, bias)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(module.weight.grad.to_dense(), w.grad)
    torch.testing.assert_close(module.bias.grad.reshape(()), bias.grad.reshape(()), atol=1e-12, rtol=1e-7)


def test_lr_starts_at_the_prior():
    """At cosine 0 every class has probability 1 / C."""
    module = fl.LinearLoss(FEATURES, CLASSES, loss=fl.LRLoss(), normalize=True, scale=1e-6, logit_bias=True)
    assert module.bias.numel() == 1
    probability = torch.sigmoid(module.logits(torch.randn(3, FEATURES)))
    torch.testing.assert_close(probability, torch.full_like(probability, 1 / CLASSES), rtol=1e-3, atol=0)
    start = module(torch.randn(64, FEATURES), torch.randint(CLASSES, (64,))).item()
    assert start == pytest.approx(math.log(CLASSES) + (CLASSES - 1) * -math.log1p(-1 / CLASSES), rel=1e-3)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["class indices", "two labels", "padding"])
@each_gradient
@each((CE, CRL, LR, HS_LR))
def test_nothing_of_the_size_of_all_logits_is_made(glass_house, loss, way, form):
    rows, classes, features = 66, 2048, 4
    sparse = GRADIENTS[way][1]
    k = {"all": None, "picks": 3, "dense": 1000, "sparse picks": 3, "sparse": 1000}[way]
    k = classes - 1 if k is None and loss.needs_k else k
    x, w, _ = make_layer(rows, features, classes, torch.float32)
    if form == "class indices":
        target = torch.arange(rows)
    else:
        target = fl.Labels(
            torch.tensor(INDEX[form] * (rows // ROWS)), make_weight(form).float().repeat(rows // ROWS, 1)
        )
    chunk = 5 * classes
    how = fl.LinearLossOptions(chunk * 4, sparse)
    shared = {"k": k, "options": how, "normalize": True, "scale": 6.0, "margin": fl.Margin(0.25, 0.1)}
    if loss in SMOOTHED:
        shared["label_smoothing"] = 0.1
    x.requires_grad_()
    w.requires_grad_()
    for reduction in ("mean", "none"):
        with Watch() as watch:
            loss.linear(x, w, target, reduction=reduction, **shared).sum().backward()
        picks = rows * ((k or 0) + 4)
        most = max(chunk, min(picks, classes) * features, picks) if sparse else max(chunk, (classes + 1) * features)
        if not sparse and k and k < classes / 24:
            most = max(most, picks * features)
        assert watch.largest <= most < rows * classes
        assert (w.grad._nnz() <= picks) if sparse else True
        w.grad = None


# --- compiled, autocast -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "loss, way", [(CE, "all"), (CE, "picks"), (OWN, "dense"), (LR, "all"), (HS_LR, "picks")], ids=str
)
def test_fullgraph_gives_the_same_numbers(loss, way):
    (x, w, _), (k, _) = layer(torch.float32), way_of(loss, way)
    smoothing = {"label_smoothing": 0.1} if loss in SMOOTHED else {}
    criterion = loss.module_class()(k=k, margin=fl.Margin(0.25, 0.125), **smoothing)
    index, weight = torch.tensor(INDEX["padding"]), make_weight("padding").float()

    def step(x, w, scale):
        return fl.linear_loss(x * 1.0, w, fl.Labels(index, weight), loss=criterion, normalize=True, scale=scale)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tensors = x, w, torch.tensor(6.0)
    assert_same(value_and_grads(compiled, *tensors), value_and_grads(step, *tensors))


@each((CE, LR, HS_LR))
def test_autocast(loss):
    (x, w, _), labels = layer(torch.float32), make_target("two labels")
    shared = {"k": 3, "normalize": True, "scale": 6.0, "margin": fl.Margin(0.25, 0.125)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, of_x, of_w = value_and_grads(lambda x, w: loss.linear(x, w, labels, **shared), x, w)
    true = value_and_grads(lambda x, w: loss.linear(x, w, labels, **shared), x, w)
    assert value.dtype == of_x.dtype == of_w.dtype == torch.float32
    torch.testing.assert_close(value, true[0], rtol=3e-2, atol=3e-2)
    assert (of_w - true[2]).abs().max() <= 0.1 * true[2].abs().max()


@each((CE, HS_LR))
def test_checkpoint(loss):
    (x, w, _), labels = layer(), make_target("padding")
    step = lambda x, w: loss.linear(  # noqa: E731
        x, w, labels, k=3, normalize=True, scale=6.0, margin=fl.Margin(0.25, 0.125)
    )
    assert_same(
        value_and_grads(lambda x, w: torch.utils.checkpoint.checkpoint(step, x, w, use_reentrant=False), x, w),
        value_and_grads(step, x, w),
    )
