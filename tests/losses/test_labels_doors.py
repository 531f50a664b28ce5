"""The doors of the C++ kernels for several labels per row and label smoothing, held against the reference in float64.

The coefficients are random here: what finish makes of the statistics is tested elsewhere.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

import doors
from fused_losses import ops, reference

cpp = torch.ops.fused_losses
pytestmark = pytest.mark.skipif(bool(ops._extension_failure), reason=ops._extension_failure or "built")

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMULAS = (doors.CE, doors.LR, doors.SS_LR)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def labels_of(rows: int, places: int, classes: int, seed: int = 0) -> Tensor:
    """(rows, places), ascending, -1 behind the last: full, empty, then as it happens."""
    generator = torch.Generator().manual_seed(1000 * seed + classes)
    labels = torch.full((rows, places), -1)
    for row in range(rows):
        most = min(places, classes)
        count = (most, 0)[row] if row < 2 else int(torch.randint(most + 1, (), generator=generator))
        labels[row, :count] = torch.randperm(classes, generator=generator)[:count].sort().values
    return labels


def logits_of(labels: Tensor, first: int, classes: int, dtype: torch.dtype) -> Tensor:
    """(10, classes) with what is not finite in the last rows, at a label and at a negative where there is one."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(10, classes, generator=generator)
    logits[2] = (logits[2] * 2).round() / 2
    logits[3] += 1000
    logits[4] = torch.where(torch.rand(classes, generator=generator) < 0.4, -INF, logits[4])
    logits[5] = -INF
    for row, odd in ((6, NAN), (7, INF)):
        here = labels[row] - first
        here = here[(here >= 0) & (here < classes)]
        if len(here):
            logits[row, here[-1]] = odd
    logits[8, classes // 2], logits[9, classes // 3] = NAN, INF
    return logits.to(dtype)


def coefficients_of(rows: int, places: int, dtype: torch.dtype) -> Tensor:
    """(rows, 2 + places); one row whose c is NaN, one with a t that is."""
    coefficients = torch.randn(rows, 2 + places, generator=torch.Generator().manual_seed(places)).to(dtype)
    coefficients[0, -1] = NAN
    coefficients[2, 0] = NAN
    return coefficients


def forms_of(classes: int) -> list[tuple[int, bool]]:
    """(k, compact)"""
    few = max(1, classes // 50)
    return [(0, False), (few, True), (few, False), (classes, True), (classes, False)]


def assert_as_reference(formula, logits, labels, form: dict) -> None:
    rows, dtype = logits.shape[0], logits.dtype
    cd = reference.compute_dtype(dtype)
    exact = {"rtol": 1e-12, "atol": 1e-12} if cd == torch.float64 else {"rtol": 3e-6, "atol": 2e-6}
    last = {"rtol": exact["rtol"] + {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0), "atol": exact["atol"]}

    ours = doors.statistics(cpp, formula, logits, labels, **form)
    theirs = doors.statistics(reference, formula, logits.double(), labels, **form)
    nan = theirs.statistics[:, 1].isnan()
    assert torch.equal(ours.statistics[:, 1].isnan(), nan)
    sound = ~nan & ~logits.isinf().logical_and(logits > 0).any(1)
    torch.testing.assert_close(
        ours.statistics[sound].double(), theirs.statistics[sound], equal_nan=True, **exact, msg=lambda m: f"{form} {m}"
    )
    infinite = ~nan & ~sound  # of these s may be anything
    both = [seen.statistics[infinite][:, [0, 1, *range(3, 3 + labels.shape[1])]] for seen in (ours, theirs)]
    torch.testing.assert_close(both[0].double(), both[1], equal_nan=True, **exact)
    assert torch.equal(ours.pick_index[~nan], theirs.pick_index[~nan])
    assert torch.equal(ours.pick_logit[~nan].double(), theirs.pick_logit[~nan])
    if form["label_smoothing"] == 0:
        assert (ours.statistics[~nan, 2] == 0).all()

    coefficients = coefficients_of(rows, labels.shape[1], cd)
    coefficients[:, 0] = coefficients[:, 0].where(~nan, NAN)
    if form["label_smoothing"] == 0:
        coefficients[:, 1] = NAN  # nobody reads it
    grad = torch.linspace(-0.5, 2, rows, dtype=cd)
    dlogits = doors.backward_of_labels(cpp, formula, grad, coefficients, logits, labels, ours, **form)
    truth = doors.backward_of_labels(
        reference, formula, grad.double(), coefficients.double(), logits.double(), labels, theirs, **form
    )
    torch.testing.assert_close(dlogits.double(), truth, equal_nan=True, **last, msg=lambda m: f"{form} {m}")


@each_dtype
@pytest.mark.parametrize("formula", [*doors.SOFTMAX, *doors.LOGISTIC], ids=str)
def test_every_form_of_few_classes(formula, dtype):
    for classes, places in itertools.product((1, 2, 5, 751), (1, 2, 3, 7)):
        labels = labels_of(10, places, classes)
        logits = logits_of(labels, 0, classes, dtype)
        for (k, compact), smoothing in itertools.product(forms_of(classes), (0.0, 0.1)):
            ignore_index = -1 if k % 2 else None
            form = {"k": k, "compact": compact, "label_smoothing": smoothing, "ignore_index": ignore_index}
            assert_as_reference(formula, logits, labels, form)


@each_dtype
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_every_instruction_set(isa, formula, dtype):
    for classes, places in ((5, 3), (1003, 1), (1003, 40), (4097, 2)):
        labels = labels_of(10, places, classes)
        logits = logits_of(labels, 0, classes, dtype)
        for k, compact in forms_of(classes):
            form = {"k": k, "compact": compact, "label_smoothing": 0.1, "ignore_index": None}
            assert_as_reference(formula, logits, labels, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_many_classes(formula, dtype):
    for classes, places in ((4097, 7), (21841, 1), (21841, 3), (21841, 300)):
        labels = labels_of(10, places, classes)
        logits = logits_of(labels, 0, classes, dtype)
        for (k, compact), smoothing in itertools.product(forms_of(classes)[:3], (0.0, 0.1)):
            form = {"k": k, "compact": compact, "label_smoothing": smoothing, "ignore_index": -1}
            assert_as_reference(formula, logits, labels, form)


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_labels_of_other_shards(formula):
    """Of a row some labels are here, before, behind, or none; -1 is no class of any shard."""
    for first, classes, of_all in ((0, 5, 12), (4, 5, 12), (7, 5, 12), (1, 751, 753), (9000, 4097, 2**40)):
        for places in (1, 2, 3, 7):
            labels = labels_of(10, places, min(of_all, first + classes + 3))
            logits = logits_of(labels, first, classes, torch.float32)
            for (k, compact), smoothing in itertools.product(forms_of(classes), (0.0, 0.1)):
                form = {"k": k, "compact": compact, "label_smoothing": smoothing, "part": (first, of_all)}
                assert_as_reference(formula, logits, labels, form)


def test_one_label_is_a_class_index():
    """Bit for bit, but for the column of s and that of b."""
    logits, target = torch.randn(6, 1003), torch.randint(1003, (6,))
    grad = torch.rand(6)
    for formula, (k, compact) in itertools.product(FORMULAS, forms_of(1003)):
        kept = doors.forward(cpp, formula, logits, target, k, compact)
        seen = doors.statistics(cpp, formula, logits, target[:, None], k, compact)
        assert torch.equal(seen.statistics[:, [0, 1, 3]], kept.statistics)
        assert torch.equal(seen.statistics[:, 2], torch.zeros(6))
        assert torch.equal(seen.pick_index, kept.pick_index) and torch.equal(seen.pick_logit, kept.pick_logit)
        coefficients = torch.stack((kept.coefficients[:, 0], torch.full((6,), NAN), kept.coefficients[:, 1]), dim=1)
        dlogits = doors.backward_of_labels(
            cpp, formula, grad, coefficients, logits, target[:, None], seen, k, compact
        )  # fmt: skip
        assert torch.equal(dlogits, doors.backward(cpp, formula, grad, logits, target, kept, k, compact))


def test_statistics_are_those_of_forward():
    """Of a class index and of a multi-hot row."""
    logits = torch.randn(6, 1003)
    for formula, (k, compact), multi_hot in itertools.product(FORMULAS, forms_of(1003), (False, True)):
        if multi_hot and formula.family == "softmax":
            continue
        target = torch.rand(6, 1003) < 0.01 if multi_hot else torch.tensor([0, -100, 5, 1002, 7, 7])
        kept = doors.forward(cpp, formula, logits, target, k, compact)
        seen = cpp.statistics(logits, target, *formula.spec(1003, k, compact))
        for ours, theirs in zip(seen, kept[2:], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("formula", [doors.CE, doors.LR], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(isa, threads, formula):
    for rows, classes in ((1, 70001), (3, 70001), (40, 5000)):
        labels = labels_of(rows, 5, classes)
        logits = torch.randn(rows, classes)
        logits[-1, classes // 2] = -INF
        grad, coefficients = torch.rand(rows), torch.rand(rows, 7)
        for k, compact in ((0, False), (700, True), (700, False)):
            form = {"k": k, "compact": compact, "label_smoothing": 0.1}
            results = []
            for n in (1, 2, 3, 8):
                threads(n)
                seen = doors.statistics(cpp, formula, logits, labels, **form)
                dlogits = doors.backward_of_labels(cpp, formula, grad, coefficients, logits, labels, seen, **form)
                results.append([bytes(t.view(torch.uint8).numpy().tobytes()) for t in (*seen, dlogits)])
            assert results[1:] == results[:1] * 3, (rows, classes, k, compact)


@pytest.mark.parametrize("order", ["as they come", "ascending", "descending", "all but one equal"])
@pytest.mark.parametrize("offset", [0, 1000, -1000])
def test_the_sum_for_smoothing_keeps_its_digits(isa, order, offset):
    """A million classes, at an offset where a sum of the logits themselves would keep four digits of it."""
    classes = 1_000_003
    row = torch.randn(classes, generator=torch.Generator().manual_seed(1))
    if order == "all but one equal":
        row = torch.full((classes,), 0.1)
        row[classes // 3] = 0.3
    elif order != "as they come":
        row = row.sort(descending=order == "descending").values
    logits, labels = (row + offset)[None], torch.tensor([[1, 5000, 900_000]])
    for k in (0, classes):
        ours = doors.statistics(cpp, doors.CE, logits, labels, k, k > 0, label_smoothing=0.1).statistics[0, 2]
        negatives = logits[0].double()
        negatives[labels[0]] = -INF
        truth = (negatives - negatives.max())[negatives > -INF].sum()
        torch.testing.assert_close(ours.double(), truth, rtol=2e-7, atol=0)
        ours = doors.statistics(cpp, doors.LR, logits, labels, k, k > 0, label_smoothing=0.1).statistics[0, 2]
        truth = negatives[negatives > -INF].sum()
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6 if offset == 0 else 2e-7, atol=0)


def test_rows_that_are_ignored_are_zeros():
    """Whatever is in them and comes from upstream; without ignore_index a row without labels counts."""
    logits, labels = torch.randn(3, 9), torch.tensor([[-1, -1], [2, -1], [-1, -1]])
    logits[0] = NAN
    coefficients, grad = torch.full((3, 4), NAN), torch.full((3,), NAN)
    for formula, (k, compact), smoothing in itertools.product(FORMULAS, forms_of(9), (0.0, 0.1)):
        form = {"k": k, "compact": compact, "label_smoothing": smoothing}
        seen = doors.statistics(cpp, formula, logits, labels, ignore_index=-1, **form)
        assert (seen.statistics[[0, 2]] == 0).all() and (seen.pick_index[[0, 2]] == -1).all()
        dlogits = doors.backward_of_labels(
            cpp, formula, grad, coefficients, logits, labels, seen, ignore_index=-1, **form
        )  # fmt: skip
        assert (dlogits[[0, 2]] == 0).all() and dlogits[1].isnan().all()
        seen = doors.statistics(cpp, formula, logits, labels, **form)
        assert seen.statistics[0, 1].isnan() and (seen.statistics[2, 3:] == -INF).all()
        assert (seen.pick_index[2] >= 0).sum() == min(k, 9, seen.pick_index.shape[1])


def test_labels_of_any_layout():
    """Not contiguous, expanded, and in one row more places than classes."""
    logits, labels = torch.randn(6, 5), labels_of(6, 7, 5)
    spread = torch.stack((labels, labels), dim=2)[:, :, 1]
    assert not spread.is_contiguous()
    for formula, view in itertools.product((doors.CE, doors.LR), (spread, labels.t().contiguous().t())):
        ours, theirs = (doors.statistics(cpp, formula, logits, x, 2, True, label_smoothing=0.1) for x in (view, labels))
        assert all(map(torch.equal, ours, theirs))
    one = torch.tensor([[3, -1]]).expand(6, 2)
    ours, theirs = (doors.statistics(cpp, doors.CE, logits, x) for x in (one, one.contiguous()))
    assert all(map(torch.equal, ours, theirs))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [cpp, reference], ids=["cpp", "reference"])
@pytest.mark.parametrize(
    "labels, error, message",
    [
        ([[1, 2], [0, 5]], IndexError, r"Target 5 is out of bounds. \(row 1, 5 classes\)"),
        ([[1, 2], [-2, 0]], IndexError, r"Target -2 is out of bounds. \(row 1, 5 classes\)"),
        ([[2**62, -1], [0, 1]], IndexError, "Target 4611686018427387904 is out of bounds"),
        ([[-(2**63), -1], [0, 1]], IndexError, "Target -9223372036854775808 is out of bounds"),
        ([[0, -100], [0, 1]], IndexError, "Target -100 is out of bounds"),
        ([[2, 1], [0, 1]], ValueError, "labels must be ascending, with -1 behind the last"),
        ([[0, 1], [3, 3]], ValueError, "labels must be ascending, with -1 behind the last"),
        ([[0, 1], [-1, 3]], ValueError, "labels must be ascending, with -1 behind the last"),
    ],
)
def test_labels_that_are_none(backend, labels, error, message):
    logits, sound = torch.randn(2, 5), torch.tensor([[0, 1], [2, -1]])
    for formula in (doors.CE, doors.LR):
        seen = doors.statistics(backend, formula, logits, sound)
        with pytest.raises(error, match=message):
            doors.statistics(backend, formula, logits, torch.tensor(labels))
        with pytest.raises(error, match=message):
            doors.backward_of_labels(
                backend, formula, torch.ones(2), torch.ones(2, 4), logits, torch.tensor(labels), seen
            )  # fmt: skip


@pytest.mark.parametrize("backend", [cpp, reference], ids=["cpp", "reference"])
def test_arguments_that_do_not_fit(backend):
    logits, labels = torch.randn(2, 5), torch.tensor([[0, 1], [2, -1]])
    for smoothing in (1.0, -0.1, NAN, INF):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
            doors.statistics(backend, doors.CE, logits, labels, label_smoothing=smoothing)
    spec = doors.CE.spec(5, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing must be .* 0 without labels"):
        backend.statistics(logits, torch.tensor([0, 1]), *spec)
    with pytest.raises(ValueError, match="ignore_index must be None or -1 with labels"):
        doors.statistics(backend, doors.CE, logits, labels, ignore_index=-100)
    for target in (labels[:, :0], labels.int(), labels[:, 0], labels.double()):
        with pytest.raises(ValueError, match=r"labels must be int64 \(rows, P\), P >= 1"):
            doors.statistics(backend, doors.CE, logits, target)
    with pytest.raises(ValueError, match="as many rows as the logits"):
        doors.statistics(backend, doors.CE, logits, labels[:1])
    spec = doors.CE.spec(5, ignore_index=None, labels=True)
    for weight in (torch.ones(5), torch.ones(2, 3), torch.ones(2, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"weight must be|of rank 2"):
            backend.forward(logits, labels, weight, "none", *spec)
        with pytest.raises(ValueError, match=r"weight must be|of rank 2"):
            backend.finish(torch.zeros(2, 5), labels, weight, "none", *spec)
    with pytest.raises(ValueError, match="six numbers of MarginTerms"):
        backend.forward(logits, labels, None, "none", *spec._replace(margin=[1.0]))
    with pytest.raises(ValueError, match="a margin works with class indices and labels only"):
        backend.forward(logits, torch.ones(2, 5), None, "none", *doors.LR.spec(5)._replace(margin=[1.0] * 6))
    seen = doors.statistics(backend, doors.CE, logits, labels)
    for coefficients, statistics in ((torch.ones(2, 2), None), (torch.ones(2, 5), None), (None, torch.ones(2, 3))):
        wrong = seen if statistics is None else seen._replace(statistics=statistics)
        of_rows = torch.ones(2, 4) if coefficients is None else coefficients
        with pytest.raises(ValueError, match=r"coefficients must|statistics must"):
            doors.backward_of_labels(backend, doors.CE, torch.ones(2), of_rows, logits, labels, wrong)
