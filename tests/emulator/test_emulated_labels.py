"""Rows with several labels, and label smoothing, as compiled: right, and nothing that a GPU would not forgive."""

import itertools
import math
from functools import partial

import pytest
import torch
from gpu_doors import DTYPES, make
from gpu_finish_labels import CLASSES, compare_finish, statistics_of
from gpu_labels import coefficients_for, compare_labels, make_labels
from gpu_rows import rows_of_every_kind, special_rows
from shapes import part

from doors import CE, CRL, LR, SS_LR

FP32, BF16, FP16 = DTYPES
FORMS = ((751, 0, False), (9001, 0, False), (751, 9, True), (751, 300, False), (9001, 90, True), (9001, 2000, False))
each_form = pytest.mark.parametrize(("classes", "k", "compact"), part(FORMS, 3))


def near_the_hardest(logits: torch.Tensor, most: int) -> torch.Tensor:
    """Labels of which some are the hardest classes and their neighbours."""
    rows, classes = logits.shape
    labels = make_labels(rows, most, classes, seed=most)
    hard = logits.float().nan_to_num(nan=0.0).argmax(1, keepdim=True)
    labels[::2] = ((hard + torch.arange(most) * 5) % classes).sort(dim=1).values[::2]
    return labels


@pytest.mark.parametrize("smoothing", part([0.1, 0.0], 2))
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize(
    ("formula", "dtype", "rows", "classes"),
    part([
        (CRL, BF16, 5, 751), (LR, FP32, 3, 9001), (SS_LR, FP16, 5, 751), (CE, FP32, 4, 21841), (LR, BF16, 2, 100003),
        (CE, BF16, 2, 100003),
    ], 2),
    ids=str,
)  # fmt: skip
def test_all_negatives(formula, dtype, rows, classes, most, smoothing, backend):
    logits, _ = make(rows, classes, dtype)
    compare_labels(formula, logits, near_the_hardest(logits, most), smoothing=smoothing, backend=backend)
    if classes < 100003:
        logits, target = special_rows(dtype, classes)
        labels = torch.stack((target - 5, target, torch.full_like(target, classes - 1)), dim=1)[:, 3 - most :]
        compare_labels(formula, logits, labels, smoothing=smoothing, backend=backend)


# held in registers, walked, in blocks, in blocks that several programs read
HARDEST = ((751, 75), (2048, 20), (9001, 2000), (21841, 218), (9001, 20), (100003, 1000))


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "threshold"])
@pytest.mark.parametrize(
    ("shape", "most", "smoothing"), part(itertools.product(HARDEST, (3, 1), (0.1, 0.0)), 9), ids=str
)
def test_picks(shape, most, smoothing, compact, backend):
    classes, k = shape
    rows = list(rows_of_every_kind(classes, k, BF16).values())
    logits = torch.stack(rows[most::3] if classes < 50000 else rows[1::8])
    compare_labels(
        CRL if compact else LR, logits, near_the_hardest(logits, most), k, compact, smoothing, backend=backend
    )


@each_form
def test_rows_without_labels_here(classes, k, compact, backend):
    """Ignored, on other shards, bad; what is ignored stays 0 whatever its logits and gradients are."""
    labels = torch.tensor([
        [-1, -1], [3, classes + 8], [8, classes + 9], [-2, 9], [8, 2**40], [8, classes + 7], [9, -1], [-(2**63), 8],
    ])  # fmt: skip
    logits, _ = make(len(labels), classes, BF16)
    coefficients, grad = coefficients_for(labels), torch.ones(len(labels))
    logits[0], grad[0] = math.nan, math.nan
    for formula, ignore_index in ((CRL, -1), (LR, None)):
        dlogits = compare_labels(
            formula, logits, labels, k, compact, 0.1, ignore_index=ignore_index, part=(8, classes + 9), grad=grad,
            coefficients=coefficients, backend=backend,
        )  # fmt: skip
        assert dlogits[[2, 3, 4, 7]].isnan().all() and dlogits[[1, 5, 6]].isfinite().all()


@each_form
def test_labels_in_any_order(classes, k, compact, backend):
    """The numbers may be wrong. No access may be, and no other row's."""
    labels = torch.tensor([
        [9, 5, 2], [7, 7, 7], [-1, 3, -1], [classes, 5, -7], [classes - 1, 0, 0], [64, -1, 63], [2**62, -(2**63), 5],
    ])  # fmt: skip
    coefficients = torch.ones((len(labels), 5))  # the same at a label that is there twice
    logits, _ = make(len(labels), classes, BF16)
    for formula in (CE, LR):
        spec = formula.spec(classes, k, compact, -1)._replace(labels=True, label_smoothing=0.1)
        seen = backend.statistics(logits, labels, *spec)
        given = None if compact else logits
        backend.backward(torch.ones(()), coefficients, given, labels, *seen, classes, *spec)


@each_form
def test_layouts(classes, k, compact, backend):
    wide, _ = make(4, classes + 11, BF16)
    spread = torch.full((8, 9), 5)
    spread[::2, ::3] = make_labels(4, 3, classes)
    for logits in (wide[:, 3 : classes + 3], wide.t().contiguous().t()[:, :classes]):
        compare_labels(CRL, logits, spread[::2, ::3], k, compact, 0.1, backend=backend)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("formula", [CRL, SS_LR._replace(alpha=3.0)], ids=str)
def test_finish(formula, reduction, backend):
    """Several blocks of rows; of a class index with a margin too."""
    compare = partial(compare_finish, backend=backend)
    labels = make_labels(300, 3, CLASSES)
    statistics = statistics_of(formula, 300, 3, labels=True)
    statistics[:, 3:].masked_fill_(labels < 0, -math.inf)
    labels[1::4], statistics[1::4] = -1, 0.0
    weight = torch.rand((300, 3), generator=torch.Generator().manual_seed(0))
    compare(formula, statistics, labels, reduction, "cpu", weight, "both", 0.1, ignore_index=-1)
    target = torch.arange(300)[:, None].expand(300, 2)[:, 1] % CLASSES
    statistics = statistics_of(formula, 300, 1, labels=False)
    compare(formula, statistics, target, reduction, "cpu", torch.arange(50.0), "negative")
