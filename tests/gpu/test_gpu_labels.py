"""Rows with several labels, and label smoothing, at the GPU doors: the reference's picks bit for bit, its statistics
and gradients as accurately as its own against float64. A row is a case."""

import itertools
import math

import pytest
import torch
from gpu_doors import DTYPES, FORMULAS, bits, gpu_backend, make
from gpu_labels import coefficients_for, compare_labels, make_labels
from gpu_regimes import REGIMES
from gpu_rows import INF, NAN, rows_of_every_kind, special_rows

import cases
from doors import CE, CRL, LR, SS_LR
from fused_losses import reference
from fused_losses.gpu import device as gpu
from fused_losses.gpu import hardest

FP32, BF16, _ = DTYPES
FORMS = ((0, False), (5, True), (5, False))

each_form = pytest.mark.parametrize(("k", "compact"), FORMS, ids=["all", "compact", "threshold"])
# The interpreter is slow: one of two, the other with the slow tests.
smoothed_or_not = pytest.mark.parametrize("smoothing", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
each_dtype = pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.slow), BF16], ids=str)
one_of_each = pytest.mark.parametrize("formula", [CRL, LR], ids=str)


@pytest.fixture(autouse=True)
def scarce_room(monkeypatch):
    """Room for 2 k candidates and no more: rows of many equal logits must go the long way."""
    monkeypatch.setattr(hardest, "_FEWEST_CANDIDATES", 1)


# --- all negatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "smoothing"),
    [
        (1, 0.1),
        (3, 0.0),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in ((1, 0.0), (3, 0.1), (2, 0.1), (6, 0.0))),
    ],
)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_formulas(formula, smoothing, most, device):
    logits, _ = make(most + 1, 203, (BF16, FP32)[most % 2])
    labels = make_labels(most + 1, most, 203)
    compare_labels(formula, logits.to(device), labels.to(device), smoothing=smoothing)


@smoothed_or_not
@each_dtype
@one_of_each
def test_every_position_of_the_labels(formula, dtype, smoothing, device):
    """In either rim, in whole tiles, in the cut one; rows begin at every remainder by a vector. Neighbours, and labels
    of one tile and of several."""
    classes = 83
    logits, _ = make(classes, classes, dtype)
    one = torch.arange(classes)
    compare_labels(formula, logits.to(device), one[:, None].to(device), smoothing=smoothing)
    some = torch.stack([one, (one + 1) % classes, (one + 60) % classes], dim=1).sort(dim=1).values
    compare_labels(formula, logits.to(device), some.to(device), smoothing=smoothing)


@each_dtype
@pytest.mark.parametrize(
    "classes", [1, 2, 7, 9, 64, *(pytest.param(c, marks=pytest.mark.slow) for c in (8, 15, 65, 127, 300))]
)
def test_class_counts(classes, dtype, device):
    """Up to as many labels as classes: no negative is left."""
    logits, _ = make(3, classes, dtype)
    for most in {1, min(classes, 3), min(classes, 70)}:
        for smoothing in (0.0, 0.1):
            for formula in (CE, LR):
                labels = make_labels(3, most, classes)
                compare_labels(formula, logits.to(device), labels.to(device), smoothing=smoothing)


@smoothed_or_not
@each_dtype
@pytest.mark.parametrize("formula", [CE, CRL, LR, SS_LR], ids=str)
def test_edges(formula, dtype, smoothing, device):
    """-inf, +inf and NaN at labels and at negatives; all of S at -inf."""
    for classes in (75, 211):
        logits, target = special_rows(dtype, classes)
        others = torch.tensor([[3, 9, 40], [9, 40, classes - 1], [0, 9, -1], [4, 9, 41]]).repeat(5, 1)[: len(logits)]
        for labels in (target[:, None], others):
            compare_labels(formula, logits.to(device), labels.to(device), smoothing=smoothing)


@pytest.mark.parametrize("place", [0, 1, 70, 130, 209, 210])
@one_of_each
def test_smoothing_sees_a_masked_class_wherever_it_is(formula, place, device):
    """In the head, in a tile with a label, in one without, in the cut tile, in the tail. A masked label is not in S."""
    logits, _ = make(2, 211, BF16)
    logits[:, place] = -INF
    spec = formula.spec(211, ignore_index=-1)._replace(labels=True, label_smoothing=0.1)
    for labels, expected in (([[2, 72], [0, 1]], [True, place > 1]), ([[place], [place]], [False, False])):
        labels = torch.tensor(labels)
        compare_labels(formula, logits.to(device), labels.to(device), smoothing=0.1)
        statistics = gpu_backend.statistics(logits.to(device), labels.to(device), *spec)[0].cpu()
        assert (statistics[:, 2] == -INF).tolist() == expected


@one_of_each
def test_offsets(formula, device):
    """Far from 0 the sums keep their digits."""
    logits, _ = make(3, 203, FP32)
    labels = make_labels(3, 3, 203)
    for offset in (1000.0, -1000.0, 5e4):
        compare_labels(formula, (logits + offset).to(device), labels.to(device), smoothing=0.1)


@one_of_each
def test_many_equal_terms(formula, device, monkeypatch):
    """A plain sum of them rounds every time in the same direction."""
    monkeypatch.setattr(gpu, "parts_for", lambda *_: 1)
    logits, labels = torch.full((1, 32773), 0.1), torch.tensor([[5, 20000]])
    logits[:, :64] = 0.4  # the largest of every thread
    spec = formula.spec(32773, ignore_index=-1)._replace(labels=True, label_smoothing=0.1)
    ours, same, truth = (
        backend.statistics(z.to(on), labels.to(on), *spec)[0].cpu()
        for backend, z, on in (
            (gpu_backend, logits, device), (reference, logits, "cpu"), (reference, logits.double(), "cpu")
        )
    )  # fmt: skip
    for column in (1, 2):
        cases.assert_as_accurate(ours[:, column], same[:, column], truth[:, column], f"{column}")


@smoothed_or_not
@pytest.mark.usefixtures("split_rows", "shuffled_grid")
@each_dtype
@one_of_each
def test_split_rows(formula, dtype, smoothing, device):
    logits, _ = make(5, 299, dtype)
    for most in (1, 4):
        compare_labels(formula, logits.to(device), make_labels(5, most, 299).to(device), smoothing=smoothing)
    logits, target = special_rows(dtype, 299)
    compare_labels(formula, logits.to(device), target[:, None].to(device), smoothing=smoothing)


# --- the k hardest ----------------------------------------------------------------------------------------------------


@smoothed_or_not
@pytest.mark.parametrize(
    ("regime", "compact"),
    [
        pytest.param(regime, compact, marks=pytest.mark.slow if place % 3 else ())
        for place, (regime, compact) in enumerate(itertools.product(REGIMES, (True, False)))
    ],
)
def test_picks(regime, compact, smoothing, device, force):
    """Of rows whose hardest classes are labels, or lie in one block with them."""
    force(regime)
    dtype, formula = ((BF16, CE), (FP32, LR))[REGIMES.index(regime) % 2]
    rows = rows_of_every_kind(203, 6, dtype)
    logits = torch.stack(list(rows.values())[smoothing > 0 :: 2])
    hard = logits.float().nan_to_num(nan=0.0).argsort(dim=1, descending=True)[:, :1]
    for most in (1, 3):
        labels = make_labels(len(logits), most, 203, seed=most)
        labels[::2] = torch.cat((hard, hard + 1, hard + 9), dim=1)[::2, :most].remainder(203).sort(dim=1).values
        compare_labels(formula, logits.to(device), labels.to(device), 6, compact, smoothing)


@pytest.mark.parametrize(("formula", "regime"), [*zip(FORMULAS, 3 * REGIMES, strict=False)], ids=str)
def test_formulas_over_picks(formula, regime, device, force):
    force(regime)
    logits, _ = make(3, 131, BF16)
    for most, compact in ((2, True), (6, False)):
        labels = make_labels(3, most, 131)
        compare_labels(formula, logits.to(device), labels.to(device), 5, compact, smoothing=0.1 * (most == 2))


@pytest.mark.parametrize("regime", ["held", "walked"])
@pytest.mark.parametrize("classes", [1, 2, 7, 9, 17])
def test_few_classes(regime, classes, device, force):
    """Every k, up to more than there are negatives, and no negatives at all."""
    force(regime)
    logits = torch.randint(4, (3, classes), generator=torch.Generator().manual_seed(classes)).to(BF16)
    for k in {1, classes - 1, classes} - {0}:
        for most in (1, 3):
            labels = make_labels(3, most, classes).to(device)
            compare_labels(CRL, logits.to(device), labels, k, compact=k % 2 == 0, smoothing=0.1)


# --- labels -----------------------------------------------------------------------------------------------------------


@smoothed_or_not
@pytest.mark.parametrize("regime", [None, "held", "walked", "blocks of 8"])
@one_of_each
def test_rows_without_labels_here(formula, regime, smoothing, device, force):
    """Ignored or without labels, on other shards, bad; ignored rows stay 0 whatever their logits and gradients are."""
    if regime:
        force(regime)
    rows = {
        (-1, -1, -1): 0, (6, 85, 86): 1, (7, 81, 137): 1, (7, 80, 138): NAN, (-2, 7, 9): NAN, (2**62, -1, -1): NAN,
        (8, 9, 2**63 - 1): NAN, (-(2**63), -1, -1): NAN, (136, 137, -1): 1, (0, -1, -1): 1,
    }  # fmt: skip
    labels = torch.tensor([list(row) for row in rows])
    logits, _ = make(len(rows), 75, BF16)
    logits[0] = NAN
    spoilt = torch.tensor([math.isnan(expected) for expected in rows.values()])
    for k, compact in FORMS[1:] if regime else FORMS[:1]:
        for ignore_index in (-1, None):
            coefficients = coefficients_for(labels)
            coefficients[spoilt, 0] = NAN
            grad = torch.ones(len(rows))
            grad[0] = NAN
            dlogits = compare_labels(
                formula, logits.to(device), labels.to(device), k, compact, smoothing, ignore_index=ignore_index,
                part=(7, 138), coefficients=coefficients.to(device), grad=grad.to(device),
            )  # fmt: skip
            assert dlogits[spoilt.to(device)].isnan().all() and dlogits[1:][~spoilt[1:].to(device)].isfinite().all()
            if ignore_index == -1:
                assert (bits(dlogits[0].cpu()) == 0).all()


@each_form
@one_of_each
def test_one_label_is_a_class_index(formula, k, compact, device):
    """Without smoothing: the same picks, the same statistics and gradient but for rounding."""
    logits, target = make(5, 203, BF16)
    logits, target = logits.to(device), target.to(device)
    plain = formula.spec(203, k, compact)
    spec = plain._replace(labels=True, ignore_index=-1)
    seen = gpu_backend.statistics(logits, target[:, None], *spec)
    seen_plain = gpu_backend.statistics(logits, target, *plain)
    assert torch.equal(seen[0][:, [0, 3]], seen_plain[0][:, [0, 2]])
    torch.testing.assert_close(seen[0][:, 1], seen_plain[0][:, 1], rtol=1e-6, atol=0)  # tiles in another order
    assert torch.equal(seen[1], seen_plain[1]) and torch.equal(seen[2], seen_plain[2])
    coefficients = coefficients_for(target[:, None]).to(device)
    given = None if compact else logits
    grads = (
        gpu_backend.backward(torch.ones((), device=device), c, given, y, *of, 203, *s)
        for c, y, of, s in (
            (coefficients, target[:, None], seen, spec), (coefficients[:, [0, 2]], target, seen_plain, plain)
        )
    )  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-6 if logits.dtype == FP32 else 1e-2, atol=0)


@each_form
def test_labels_of_any_stride(k, compact, device):
    logits, _ = make(4, 75, FP32)
    labels = make_labels(4, 3, 75)
    spread = torch.full((8, 9), 5)
    spread[::2, ::3] = labels
    views = spread.to(device)[::2, ::3], labels.to(device).t().contiguous().t(), labels[:1].to(device).expand(4, 3)
    for view in views:
        compare_labels(CE, logits.to(device), view, k, compact, smoothing=0.1)
    compare_labels(CE, logits.to(device), spread.to(device)[::2, :1], k, compact, smoothing=0.1)


@each_form
def test_layouts_of_logits(k, compact, device):
    wide, _ = make(4, 140, BF16)
    wide, labels = wide.to(device), make_labels(4, 3, 75).to(device)
    for logits in (wide[:, :75], wide[:, 1:76], wide[:, 5:80].contiguous(), wide.t().contiguous().t()[:, :75]):
        compare_labels(LR, logits, labels, k, compact, smoothing=0.1)


@each_form
@one_of_each
def test_only_c_makes_a_row_nan(formula, k, compact, device):
    logits, _ = make(4, 75, FP32)
    labels = make_labels(4, 2, 75)
    coefficients = coefficients_for(labels)
    coefficients[0, 0] = coefficients[1, 3] = NAN
    labels[1] = torch.tensor([4, 70])
    dlogits = compare_labels(
        formula, logits.to(device), labels.to(device), k, compact, 0.1, coefficients=coefficients.to(device)
    )
    assert dlogits[0].isnan().all() and dlogits[1].isnan().nonzero().tolist() == [[70]]


@each_form
@one_of_each
def test_no_rows(formula, k, compact, device):
    logits, labels = torch.empty((0, 75), device=device), torch.empty((0, 3), dtype=torch.int64, device=device)
    compare_labels(formula, logits, labels, k, compact, 0.1)


@smoothed_or_not
@pytest.mark.parametrize("regime", [None, "held", "walked", "blocks of 8"])
def test_labels_in_any_order_lead_to_no_other_memory(regime, smoothing, force, traffic, monkeypatch):
    """Descending, doubled, with gaps, or no classes: the numbers may be wrong, no access may be."""
    labels = torch.tensor([
        [9, 5, 2, 0], [7, 7, 7, 7], [-1, 3, -1, 130], [131, 5, -7, 2**62], [130, 0, 130, 0], [64, 63, -1, 63],
        [-(2**63), 2**63 - 1, 5, -1],
    ])  # fmt: skip
    logits, _ = make(len(labels), 131, BF16)
    coefficients, grad = coefficients_for(labels), torch.ones(())
    known = [logits, labels, coefficients, grad]
    honest = hardest._scratch

    def kept(*of):
        scratch = honest(*of)
        known.extend(scratch[:2])
        return scratch

    monkeypatch.setattr(hardest, "_scratch", kept)
    if regime:
        force(regime)
    for k, compact in FORMS[1:] if regime else FORMS[:1]:
        for formula in (CE, LR):
            spec = formula.spec(131, k, compact, -1)._replace(labels=True, label_smoothing=smoothing)
            seen = gpu_backend.statistics(logits, labels, *spec)
            given = None if compact and k else logits
            known += [*seen, gpu_backend.backward(grad, coefficients, given, labels, *seen, 131, *spec)]
    for way, of_everything in enumerate(traffic.everything()):
        assert sum(traffic(tensor)[way] for tensor in known) == of_everything


@pytest.mark.parametrize("most", [2, 3, 6])
@pytest.mark.parametrize("regime", ["blocks of 8", "blocks of 8, split"])
def test_labels_and_picks_each_in_a_block_of_its_own(regime, most, device, force):
    """The labels are the largest of their blocks, which are found by their maxima: none of the picks may be missed."""
    force(regime)
    generator = torch.Generator().manual_seed(most)
    logits = 0.1 * torch.randn((12, 300), generator=generator)
    labels = torch.empty((12, most), dtype=torch.int64)
    for row, line in enumerate(logits):
        places = 1 + 8 * torch.randperm(36, generator=generator)[: most + 4]
        line[places] = torch.cat((20 + torch.randn(most, generator=generator), 9 + torch.randn(4, generator=generator)))
        labels[row] = places[:most].sort().values
    compare_labels(CE, logits.to(BF16).to(device), labels.to(device), 4, compact=True)
