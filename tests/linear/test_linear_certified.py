"""Certified selection: the k hardest by products in bfloat16, exactly those of float64 logits rounded to float32."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from layers import Watch, assert_same, each_layer, make_exact_layer, make_layer, make_upstream, value_and_grads
from torch import Tensor

import fused_losses as fl
from cases import CE, CRL, LOSSES, SS_LR, each, make_index
from fused_losses import linear_certified, ops, reference
from fused_losses.linear_certified import by_kernel, by_matmul, in_float64
from fused_losses.linear_rows import LEAST_NORM, class_norms
from fused_losses.losses import LossSpec

needs_kernel = pytest.mark.skipif(not ops.has_candidates(), reason="no AVX-512 BF16, or no C++ extension")


def by_bfloat16(rows):
    """What CUDA tensors are given first."""
    return by_matmul(rows, torch.bfloat16)


def by_float32(rows):
    return by_matmul(rows, torch.float32)


SEARCHES = (*([by_kernel] if ops.has_candidates() else []), by_bfloat16, by_float32, in_float64)
each_search = pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.__name__)


# --- layers -----------------------------------------------------------------------------------------------------------


def gaussian(rows, features, classes):
    return torch.randn(rows, features), torch.randn(classes, features) * features**-0.5


def near_ties(rows, features, classes):
    """Groups of classes that bfloat16 does not tell apart."""
    x, w = gaussian(rows, features, classes)
    return x, w[torch.arange(classes) // 9] * (1 + 1e-5 * torch.randn(classes, features))


def duplicates(rows, features, classes):
    x, w = gaussian(rows, features, classes)
    return x, w[torch.randint(max(1, classes // 4), (classes,))]


def all_equal(rows, features, classes):
    x, w = gaussian(rows, features, classes)
    return x, w[:1].expand(classes, features).contiguous()


def zeros(rows, features, classes):
    """Rows and classes of zeros, and most of the classes."""
    x, w = gaussian(rows, features, classes)
    x[::3] = 0
    w[torch.rand(classes) < 0.9] = 0
    return x, w


def any_norms(rows, features, classes):
    x, w = gaussian(rows, features, classes)
    spread = random.choice((1, 5, 30))
    return (part * 10 ** (spread * (2 * torch.rand(len(part), 1) - 1)) for part in (x, w))


def one_long_class(rows, features, classes):
    x, w = gaussian(rows, features, classes)
    w[torch.randint(classes, ())] *= 10 ** random.uniform(0, 30)
    return x, w


def cancellation(rows, features, classes):
    """Logits near 0 of large vectors. Integers: float64 sums them exactly, in whatever order."""
    x = torch.randint(-2000, 2001, (rows, 2 * features)).float()
    w = torch.randint(-2000, 2001, (classes, 2 * features)).float()
    x[:, features:] = x[:, :features]
    w[:, features:] = -w[:, :features] + torch.randint(-1, 2, (classes, features))
    return x, w


def clustered(rows, features, classes):
    """Classes closer to each other than bfloat16 resolves."""
    x, w = gaussian(rows, features, classes)
    return x, w[torch.randint(min(2, classes), (classes,))] + 1e-4 * w


def common_offset(rows, features, classes):
    return (part + 100 for part in gaussian(rows, features, classes))


def subnormal(rows, features, classes):
    """Elements, and whole vectors, below what float32 holds with all its digits."""
    x, w = gaussian(rows, features, classes)
    x[torch.rand(x.shape) < 0.2] *= 1e-40
    w[torch.rand(w.shape) < 0.5] *= 1e-41
    w[torch.rand(classes) < 0.2] *= 1e-39
    return x, w


def not_finite(rows, features, classes):
    """A row or a class with infinities or NaN."""
    x, w = gaussian(rows, features, classes)
    part = random.choice((x, w))
    part[torch.randint(len(part), ()), torch.randint(features, ())] = random.choice((math.inf, -math.inf, math.nan))
    return x, w


def half_way(rows, features, classes):
    """Elements that lie between two numbers of bfloat16, all to one side: the bound is sharp."""
    signs = torch.randint(2, (rows, features)) * 2 - 1
    up, down = 1 + 2**-8 * 1.01, 1 + 2**-8 * 0.99
    w = torch.where(torch.rand(classes, 1) < 0.5, up, down) * signs[torch.randint(rows, (classes,))]
    return signs * torch.where(torch.rand(rows, 1) < 0.5, up, down), w + 1e-4 * torch.rand(classes, features)


LAYERS = (
    gaussian, near_ties, duplicates, all_equal, zeros, any_norms, one_long_class, cancellation, clustered,
    common_offset, subnormal, not_finite, half_way,
)  # fmt: skip
FEATURES = (1, 2, 3, 5, 16, 31, 32, 33, 64, 100, 257, 1024)


def bias_of(classes: int) -> Tensor | None:
    kind = random.choice(("none", "none", "normal", "large", "masks", "not finite"))
    if kind == "none":
        return None
    bias = torch.randn(classes) * (1e4 if kind == "large" else 1)
    if kind == "masks":
        bias[torch.rand(classes) < random.choice((0.1, 0.99))] = -math.inf
    if kind == "not finite":
        bias[torch.randint(classes, ())] = random.choice((math.inf, math.nan))
    return bias


def case_of(number: int, features: int | None = None) -> linear_certified._Rows:
    """Everything follows from the number."""
    random.seed(number)
    torch.manual_seed(number)
    rows, classes = random.choice((1, 3, 17, 40)), random.choice((1, 2, 10, 100, 1000, 3000))
    features = random.choice(FEATURES) if features is None else features
    x, w = (part.float() for part in LAYERS[number % len(LAYERS)](rows, features, classes))
    cosine = random.random() < 0.3
    bias = bias_of(classes)
    if cosine:
        x = F.normalize(x, dim=1) * 16
        bias = None if bias is None else bias[0]
    first = random.choice((0, 0, 7))
    all_classes = classes + 2 * first
    k = random.choice((1, 2, 5, 40, 200))
    labels = random.random() < 0.3
    if labels:
        target = torch.full((rows, 3), -1)
        for row in target:
            some = sorted(random.sample(range(all_classes), random.randint(0, min(3, all_classes))))
            row[: len(some)] = torch.tensor(some, dtype=torch.int64)
    else:
        target = torch.randint(all_classes, (rows,))
        target[torch.rand(rows) < 0.1] = -100
    loss, params = random.choice((("log_odds", []), ("lr", []), ("ss_lr", [2.0])))
    spec = LossSpec(loss, params, None, k, -1 if labels else -100, first, all_classes, True, labels)
    masked = bias is not None and bias.isinf().any()
    if labels and loss == "log_odds" and not masked and random.random() < 0.5:
        spec = spec._replace(label_smoothing=0.1)
    norms = class_norms(w) if cosine else None
    return linear_certified._Rows(x, w, bias, norms, target, random.choice((0, 1, 4000)), spec)


# --- what is right ----------------------------------------------------------------------------------------------------


def true_logits(rows: linear_certified._Rows) -> Tensor:
    w = rows.weight.double()
    z = rows.x.double() @ w.t()
    if rows.norms is not None:
        z /= w.norm(dim=1).clamp(min=LEAST_NORM)
    return (z if rows.bias is None else z + rows.bias).float()


def wrong_rows(rows: linear_certified._Rows, seen, certain: Tensor) -> list[int]:
    """Of the rows that are certain, those with another logit or another class than they should have."""
    expected = reference.statistics(true_logits(rows), rows.target, *rows.spec)
    wrong = []
    for row in certain.nonzero().flatten().tolist():
        (statistics, *picks), (true_statistics, *true_picks) = ([part[row] for part in s] for s in (seen, expected))
        if true_statistics.isnan().any():  # the loss of the row is NaN, whatever it picks
            same = bool(statistics.isnan().any())
        else:
            same = torch.allclose(statistics, true_statistics, rtol=2e-6, atol=2e-6)
            same &= taken(*picks) == taken(*true_picks)
        if not same:
            wrong.append(row)
    return wrong


def taken(index: Tensor, logit: Tensor) -> list[tuple[int, float]]:
    """Classes and their logits. A masked class counts as much as an empty slot: nothing."""
    return sorted((j, z) for j, z in zip(index.tolist(), logit.tolist(), strict=True) if z != -math.inf)


# --- the searches -----------------------------------------------------------------------------------------------------

FEW, ALL = 130, 2000


def check(search, cases) -> dict[str, list[int]]:
    """How many rows of which layers are certain, and of how many."""
    certain_of: dict[str, list[int]] = {}
    for number in cases:
        rows = case_of(number)
        certain, seen = search(rows)
        assert wrong_rows(rows, seen, certain) == [], f"case {number}"
        counts = certain_of.setdefault(LAYERS[number % len(LAYERS)].__name__, [0, 0])
        counts[0] += int(certain.sum())
        counts[1] += len(certain)
    return certain_of


@each_search
def test_what_is_certain_is_right(search):
    check(search, range(FEW))


@pytest.mark.slow
@each_search
def test_what_is_certain_is_right_of_many(search):
    print(search.__name__, check(search, range(FEW, ALL)))


@each_search
@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=[layer.__name__ for layer in LAYERS])
def test_many_features(search, layer):
    rows = case_of(100 * len(LAYERS) + layer, features=4096)
    certain, seen = search(rows)
    assert wrong_rows(rows, seen, certain) == []


def picks(rows: linear_certified._Rows, certified=True):
    *layer, spec = rows
    return linear_certified.linear_forward_picks(*layer[:4], rows.target, rows.chunk_bytes, certified, *spec)


def check_all(cases):
    for number in cases:
        rows = case_of(number)
        everybody = torch.ones(len(rows.x), dtype=torch.bool)
        assert wrong_rows(rows, picks(rows), everybody) == [], f"case {number}"


def test_every_row_is_right():
    check_all(range(FEW))


@pytest.mark.slow
def test_every_row_is_right_of_many():
    check_all(range(FEW, ALL))


# --- the bound --------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor, w: Tensor, bias: Tensor | None = None, k: int = 1) -> linear_certified._Rows:
    spec = LossSpec("log_odds", [], None, k, -100, 0, len(w), True)
    return linear_certified._Rows(x, w, bias, None, torch.ones(len(x)).long(), 0, spec)


def deceived(classes=60) -> linear_certified._Rows:
    """bfloat16 holds all classes but the last one, which is the hardest, and which it rounds down as far as it can."""
    w = torch.ones(classes, 32)
    w[0, :12] = 1 + 2**-7
    w[-1] = 1 + 0.99 * 2**-8
    return rows_of(torch.ones(16, 32), w)


def deceived_by_the_input(classes=60) -> linear_certified._Rows:
    """Of the input it rounds one half down and the other one up; the last class is the hardest, and has the first."""
    x, w = torch.full((16, 32), 1 + 0.99 * 2**-8), torch.zeros(classes, 32)
    x[:, 16:] = 1 + 1.01 * 2**-8
    w[:, 16:] = 1
    w[:, 31] = 1 - 2**-8
    w[-1] = torch.arange(32) < 16
    return rows_of(x, w)


def deceived_by_sums(classes=60) -> linear_certified._Rows:
    """It holds everything, but 2^24 + 1 - 2^24 is 0 in float32."""
    x, w = torch.tensor([2.0**12, 1, 2.0**12]).expand(16, 3).contiguous(), torch.zeros(classes, 3)
    w[:, 1] = 0.5
    w[0, 1] = 0.75
    w[-1] = torch.tensor([2.0**12, 1, -(2.0**12)])
    return rows_of(x, w)


def deceived_by_a_bias(classes=60) -> linear_certified._Rows:
    """Next to a large bias float32 holds neither what rounding to bfloat16 lost nor the end of the bias: only both."""
    x, w, bias = torch.ones(16, 32), torch.ones(classes, 32), torch.full((classes,), 2.0**20)
    w[-1] = 1 + 0.49 * 2**-8
    x[:, 31], w[:, 31] = 1 / 128, 0.0
    w[-1, 31] = 7.96875
    return rows_of(x, w, bias)


@each_search
@pytest.mark.parametrize("classes", [60, 200], ids=["all are candidates", "more classes than candidates"])
@pytest.mark.parametrize("layer", [deceived, deceived_by_the_input, deceived_by_sums, deceived_by_a_bias])
def test_nobody_is_deceived(search, layer, classes):
    rows = layer(classes)
    assert (true_logits(rows).argmax(1) == len(rows.weight) - 1).all()
    certain, seen = search(rows)
    assert wrong_rows(rows, seen, certain) == []


@each_search
@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-15, 1e15, 1e25])
def test_rows_out_of_range(search, scale):
    torch.manual_seed(0)
    x, w = gaussian(20, 16, 1000)
    odd = w.clone()
    odd[::2] *= scale
    cosine = rows_of(x, odd, k=5)._replace(norms=class_norms(odd))
    for rows in (rows_of(x * scale, w, k=5), rows_of(x, w * scale, k=5), rows_of(x, odd, k=5), cosine):
        certain, seen = search(rows)
        assert wrong_rows(rows, seen, certain) == []


@each_search
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("classes", [2, 300])
def test_biases_that_are_not_finite(search, classes, value):
    x, w = gaussian(5, 16, classes)
    bias = torch.zeros(classes)
    bias[0] = value
    for rows in (rows_of(x, w, bias), rows_of(x, w, bias)._replace(spec=rows_of(x, w).spec._replace(loss="lr"))):
        certain, seen = search(rows)
        assert wrong_rows(rows, seen, certain) == []


@needs_kernel
def test_a_quarter_of_the_bound_is_too_little_for_the_kernel():
    """And the cases above would see a bound that is wrong."""
    rows = deceived()
    certain, seen = by_kernel(rows)
    assert certain.all() and wrong_rows(rows, seen, certain) == []
    certain, seen = by_kernel(rows, share_of_bound=0.25)
    assert certain.all() and wrong_rows(rows, seen, certain) == list(range(len(rows.x)))
    with pytest.raises(AssertionError, match="case"):
        check(lambda rows: by_kernel(rows, share_of_bound=0.25), range(FEW))


def test_a_quarter_of_the_bound_is_too_little_for_a_matmul(monkeypatch):
    bound, rows = linear_certified._Products.bound, deceived(200)
    certain, seen = by_bfloat16(rows)
    assert not certain.any()
    monkeypatch.setattr(linear_certified._Products, "bound", lambda self, x: bound(self, x) / 4)
    certain, seen = by_bfloat16(rows)
    assert certain.all() and wrong_rows(rows, seen, certain) == list(range(len(rows.x)))


@pytest.mark.parametrize("layer", [gaussian, near_ties, clustered, common_offset, half_way])
@pytest.mark.parametrize("features", [1, 16, 300, 2048])
def test_the_bound_holds(layer, features):
    """Class by class: of float32 sums of rounded products, in two orders."""
    torch.manual_seed(features)
    x, w = (part.float() for part in layer(20, features, 100))
    true = x.double() @ w.double().t()
    rounded = x.bfloat16().float(), w.bfloat16().float()
    one_after_another = torch.zeros(20, 100)
    for of_rows, of_classes in zip(*(part.t() for part in rounded), strict=True):
        one_after_another += of_rows[:, None] * of_classes
    for z in (rounded[0] @ rounded[1].t(), one_after_another):
        for j in range(0, 100, 9):
            products = linear_certified._Products(w[j : j + 1], None, None, torch.bfloat16)
            products.of(slice(0, 1)).logits(x, torch.empty(20, 1))
            assert ((z[:, j].double() - true[:, j]).abs() <= products.bound(x)).all()


# --- what is certain --------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("features", [1, 16, 33, 512])
def test_the_kernel_is_certain_of_usual_layers(features):
    torch.manual_seed(features)
    x, w = gaussian(37, features, 20_000)
    rows = linear_certified._Rows(
        x, w, None, None, torch.arange(37), 0, LossSpec("lr", [], None, 100, None, 0, 20_000, True)
    )
    masks = torch.where(torch.rand(20_000) < 0.9, -math.inf, 0.0)
    for some in (rows, rows._replace(bias=masks), rows._replace(x=0 * x), rows._replace(weight=0 * w)):
        certain, seen = by_kernel(some)
        assert certain.all() and wrong_rows(some, seen, certain) == []
    all_zero = rows_of(x, 0 * w)
    assert by_kernel(all_zero)[0].all()  # whatever the number of threads, each of which keeps its own
    unusual = w.clone()
    unusual[100::1000] = 1e30
    unusual[7] = 0
    some = rows._replace(weight=unusual, x=x.abs())
    certain, seen = by_kernel(some)
    assert certain.all() and wrong_rows(some, seen, certain) == []


@needs_kernel
def test_the_kernel_leaves_rows_with_too_many_candidates():
    torch.manual_seed(0)
    x, w = gaussian(5, 16, 20_000)
    w[1:5000] = w[0] * (1 + 1e-7 * torch.rand(4999, 1))
    x[2] = w[0]
    spec = LossSpec("lr", [], None, 100, None, 0, 20_000, True)
    rows = linear_certified._Rows(x, w, None, None, torch.full((5,), 6000), 0, spec)
    certain, _ = by_kernel(rows)
    assert not certain[2]
    assert wrong_rows(rows, picks(rows), torch.ones(5, dtype=torch.bool)) == []


def test_ignored_rows_are_zeros_whatever_they_hold():
    """Also where no search is certain of anything."""
    x, w = gaussian(6, 16, 3000)
    x[::2] = math.nan
    rows = rows_of(x, w, torch.tensor(math.nan))._replace(norms=class_norms(w))
    rows.target[:3] = -100
    seen = picks(rows)
    assert (seen[0][:3] == 0).all() and seen[0][4].isnan().all()
    assert wrong_rows(rows, seen, torch.ones(6, dtype=torch.bool)) == []


@needs_kernel
def test_threads_change_nothing():
    before = torch.get_num_threads()
    x, w = gaussian(70, 48, 30_000)
    target = torch.arange(70) * 400
    spec = LossSpec("log_odds", [], None, 50, -100, 0, 30_000, True)
    rows = linear_certified._Rows(x, w, None, None, target, 0, spec)
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(by_kernel(rows)[1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- the losses -------------------------------------------------------------------------------------------------------

CLASSES = 1000
CERTIFIED, PLAIN = (fl.LinearLossOptions(certified=certified) for certified in (True, False))
SPARSE, PLAIN_SPARSE = (fl.LinearLossOptions(sparse_grad=True, certified=certified) for certified in (True, False))
each_gradient = pytest.mark.parametrize("how", [(CERTIFIED, PLAIN), (SPARSE, PLAIN_SPARSE)], ids=["dense", "sparse"])


@pytest.fixture
def searched(monkeypatch) -> list[str]:
    """The searches that were made, by name."""
    made = []
    for name in ("by_kernel", "by_matmul", "in_float64"):
        search = getattr(linear_certified, name)
        monkeypatch.setattr(
            linear_certified,
            name,
            lambda *args, name=name, search=search, **kw: made.append(name) or search(*args, **kw),
        )
    return made


@each_gradient
@pytest.mark.parametrize("k", [1, 40])
@each(LOSSES)
def test_losses_and_gradients(searched, loss, k, how):
    """Logits that float32 holds exactly, ties and all; an ignored row, a bias."""
    layer, target = make_exact_layer(classes=CLASSES, dtype=torch.float32), make_index(7, CLASSES)
    target[2] = -100
    options = {"k": k, "reduction": "none", "weight": torch.linspace(0.1, 3, CLASSES)}
    got, expected = (
        value_and_grads(
            lambda x, w, b: loss.linear(x, w, target, linear_bias=b, options=of, **options),
            *layer,
            upstream=make_upstream(),
        )
        for of in how
    )
    assert_same([part.to_dense() for part in got], [part.to_dense() for part in expected])
    assert searched


@each_gradient
@each((CE, CRL, SS_LR))
def test_cosines_with_margins_and_several_labels(searched, loss, how):
    x, w, _ = make_layer(classes=CLASSES, dtype=torch.float32)
    labels = fl.Labels(torch.tensor([[3, 9], [5, -1], [-1, -1], [0, 999], [1, 2], [7, 8], [4, -1]]), torch.rand(7, 2))
    options = {"k": 20, "margin": fl.Margin(0.2, 0.1)} | ({"label_smoothing": 0.1} if loss is not SS_LR else {})
    got, expected = (
        value_and_grads(lambda x, w: loss.linear(x, w, labels, normalize=True, scale=8.0, options=of, **options), x, w)
        for of in how
    )
    assert_same([part.to_dense() for part in got], [part.to_dense() for part in expected])
    assert searched


@each_layer
@pytest.mark.parametrize("k", [1, 7, 500])
def test_topk(searched, normalize, k):
    x, w, _ = make_layer(classes=CLASSES, dtype=torch.float32)
    head = fl.LinearLoss(*reversed(w.shape), normalize=normalize, options=CERTIFIED)
    head.weight.data = w
    found, logits = head.topk(x, k), head.double().logits(x.double())
    expected = logits.topk(k)
    torch.testing.assert_close(found.values, expected.values.float())
    assert torch.equal(found.indices, expected.indices)
    assert searched


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_do_not_feel_it(searched, dtype):
    x, w, _ = make_layer(classes=CLASSES, dtype=dtype)
    step = lambda how: value_and_grads(lambda x, w: CRL.linear(x, w, make_index(7, CLASSES), k=3, options=how), x, w)  # noqa: E731
    assert_same(step(CERTIFIED), step(PLAIN), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(CERTIFIED)
    assert not searched


def test_it_compiles():
    torch._dynamo.reset()
    x, w, _ = make_layer(classes=CLASSES, dtype=torch.float32)
    target = make_index(7, CLASSES)
    step = lambda x, w: CRL.linear(x * 1.0, w, target, k=3, options=CERTIFIED)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(value_and_grads(compiled, x, w), value_and_grads(step, x, w))
    torch._dynamo.reset()


def test_no_rows(searched):
    x, w, _ = make_layer(classes=CLASSES, dtype=torch.float32)
    assert CRL.linear(x[:0], w, make_index(0, CLASSES), k=3, reduction="none", options=CERTIFIED).shape == (0,)


# --- where it is used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, features, k, pays", [
    (70_000, 32, 100, True),
    (60_000, 32, 100, False),  # too small
    (200_000, 16, 100, False),  # too few features
    (10_000, 256, 200, False),  # too many picks
])  # fmt: skip
@pytest.mark.parametrize("certified", [None, True, False])
def test_none_is_where_it_pays(searched, certified, classes, features, k, pays):
    x, w = gaussian(3, features, classes)
    step = fl.LinearLoss(features, classes, loss=fl.HSLRLoss(k=k), options=fl.LinearLossOptions(certified=certified))
    step.weight.data = w
    step(x, torch.arange(3))
    if certified is None:
        assert bool(searched) == (pays and ops.has_candidates())
    else:
        assert bool(searched) == certified


def test_where_the_kernel_is_not(monkeypatch, searched):
    monkeypatch.setattr(ops, "has_candidates", lambda: False)
    x, w = gaussian(3, 32, 70_000)
    for certified, expected in ((None, set()), (True, {"by_matmul"})):
        searched.clear()
        fl.linear_cross_entropy(x, w, torch.arange(3), k=9, options=fl.LinearLossOptions(certified=certified))
        assert set(searched) == expected


def test_matmuls_of_fewer_digits_prove_nothing(searched):
    rows = case_of(LAYERS.index(common_offset))
    try:
        for precision, expected in (("highest", "by_matmul"), ("medium", "in_float64")):
            searched.clear()
            torch.set_float32_matmul_precision(precision)
            picks(rows._replace(x=rows.x * 1e30))  # nothing for the kernel
            assert next(name for name in searched if name != "by_kernel") == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_certified_search_makes_no_logits(glass_house):
    """No tensor of all logits, nor of all classes in another dtype."""
    x, w = gaussian(64, 32, 70_000)
    with Watch() as watch, torch.no_grad():
        fl.linear_loss(x, w, torch.arange(64), loss=fl.HSLRLoss(k=100), options=CERTIFIED)
    assert watch.largest <= 2**20


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("features", [0, 2**18, 2**18 + 1])
def test_layers_of_no_and_of_very_many_features(searched, features):
    """The proof ends at 2^18."""
    x, w = torch.randn(2, features), torch.randn(48, features)
    head = fl.LinearLoss(features, 48, options=CERTIFIED)
    head.weight.data = w
    expected = (x.double() @ w.double().t()).topk(3)
    found = head.topk(x, 3)
    torch.testing.assert_close(found.values, expected.values.float(), rtol=1e-4, atol=1e-2)
    assert bool(searched) == (features == 2**18)


@pytest.mark.parametrize("certified", [1, "yes", 0.5])
def test_errors(certified):
    with pytest.raises(TypeError, match="certified must be None, True or False, got"):
        fl.LinearLossOptions(certified=certified)


def test_show_config_says_it(capsys):
    fl.show_config()
    line = next(line for line in capsys.readouterr().out.splitlines() if "certified" in line)
    assert ("certified=True" in line) == (not ops.has_candidates())
