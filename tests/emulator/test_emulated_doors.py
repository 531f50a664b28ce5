"""The GPU doors as compiled, on real tiles: values, states, picks and gradients, and nothing that a GPU would not
forgive. A row is a case."""

import itertools
import math

import pytest
import torch
from gpu_doors import DTYPES, FORMULAS, IGNORED, compare, compare_at_once, make
from gpu_rows import rows_of_every_kind, special_rows, targets_for
from shapes import ONE_MULTIPROCESSOR, part

from doors import CE, CRL, LOGISTIC, LR, SS_LR
from fused_losses.gpu import device as gpu
from fused_losses.gpu import hardest

FP32, BF16, FP16 = DTYPES


@pytest.fixture
def whole_rows(monkeypatch, backend):
    """However few rows there are, each is one program's."""
    monkeypatch.setattr(gpu, "profile", lambda _: ONE_MULTIPROCESSOR)


# --- all negatives ----------------------------------------------------------------------------------------------------

# Every formula in every dtype. Both orders turn, so that the formulas together have every dtype in every length.
COMBINATIONS = [
    (formula, dtype) for place, formula in enumerate(FORMULAS) for dtype in DTYPES[place % 3 :] + DTYPES[: place % 3]
]
SHAPES = ((5, 751), (3, 2049), (4, 21841))  # rows of one warp, four and eight


@pytest.mark.parametrize(
    ("formula", "dtype", "rows", "classes"),
    part([(*combination, *SHAPES[place % 3]) for place, combination in enumerate(COMBINATIONS)], 4),
    ids=str,
)
def test_formulas(formula, dtype, rows, classes, backend):
    logits, target = make(rows, classes, dtype)
    target[0] = IGNORED
    compare(formula, logits, target, backend=backend)
    compare(formula, *special_rows(dtype, min(classes, 9001)), backend=backend)


@pytest.mark.parametrize(("formula", "dtype"), part(COMBINATIONS[::2], 7), ids=str)
def test_split_rows(formula, dtype, backend):
    logits, target = make(2, 100003, dtype)
    compare(formula, logits, target, backend=backend)


@pytest.mark.usefixtures("whole_rows")
@pytest.mark.parametrize(("formula", "dtype"), part(COMBINATIONS[::4], 7), ids=str)
def test_long_rows(formula, dtype, backend):
    logits, target = make(2, 100003, dtype)
    compare(formula, logits, target, backend=backend)


@pytest.mark.usefixtures("whole_rows")
@pytest.mark.parametrize(("formula", "dtype"), part(COMBINATIONS[1::3], 5), ids=str)
def test_rows_as_where_they_are_many(formula, dtype, backend, monkeypatch):
    """Their programs are small, in every pass."""
    monkeypatch.setattr(gpu, "are_many", lambda rows: True)
    logits, target = make(4, 21841, dtype)
    for k, compact in ((0, False), (218, True), (2184, False)):
        compare(formula, logits, target, k, compact, backend=backend)


@pytest.mark.usefixtures("whole_rows")
@pytest.mark.parametrize(
    ("formula", "dtype", "rows", "classes"),
    part([(*combination, *SHAPES[place % 3]) for place, combination in enumerate(COMBINATIONS)], 5),
    ids=str,
)
def test_at_once(formula, dtype, rows, classes, backend):
    launches = backend.device.launches
    before = launches["at_once_kernel"], launches.total()
    logits, target = make(rows, classes, dtype)
    target[0] = IGNORED
    logits[1, 7] = math.nan
    compare_at_once(formula, logits, target, backend=backend)
    special, target = special_rows(dtype, min(classes, 9001))
    compare_at_once(formula, special, target, backend=backend)
    assert (launches["at_once_kernel"], launches.total()) == (before[0] + 2, before[1] + 2)


@pytest.mark.parametrize(("classes", "k", "compact"), part([(100003, 0, False), (751, 9, True), (751, 9, False)], 3))
def test_at_once_in_two_launches(classes, k, compact, backend):
    """Rows that are split, and the k hardest."""
    compare_at_once(CRL, *make(2, classes, BF16), k, compact, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("formula", [CRL, LR], ids=str)
def test_one_row_of_a_million_classes(formula, backend):
    compare(formula, *make(1, 1_000_003, BF16), backend=backend)


LENGTHS = (1, 2, 7, 8, 9, 255, 256, 257, 1024, 1025, 2048, 4096, 8192, 8193, 16385, 32768, 65537)


@pytest.mark.parametrize("classes", part(LENGTHS, 3))
def test_class_counts(classes, backend):
    logits, target = make(2, classes, BF16)
    compare(CRL, logits, target, backend=backend)
    compare(SS_LR, logits.float(), target, backend=backend)


# --- the k hardest ----------------------------------------------------------------------------------------------------

HARDEST = (  # classes, k: held in registers; walked; in blocks of 8, 16, 32 and 64
    (17, 16), (751, 1), (751, 75), (1000, 700), (2048, 20),
    (2049, 1000), (9001, 2000), (21841, 2184),
    (9001, 281), (21841, 218), (9001, 20), (21841, 21), (21841, 2), (100003, 1000), (100003, 30),
)  # fmt: skip
# Compact and not: a few compilations. Not NLLR, whose value may vanish beside the numbers that it is a difference of.
FORMULAS_OF = {FP32: (CE, LR), BF16: (CRL, SS_LR), FP16: (CE, SS_LR)}


def every_kind(classes: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = list(rows_of_every_kind(classes, k, dtype, seed).values())
    logits = torch.stack(rows if classes < 50000 else rows[1::4])
    return logits, targets_for(logits)


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "threshold"])
@pytest.mark.parametrize(("shape", "dtype"), part(itertools.product(HARDEST, DTYPES), 8), ids=str)
def test_picks(shape, dtype, compact, backend):
    classes, k = shape
    compare(FORMULAS_OF[dtype][not compact], *every_kind(classes, k, dtype), k, compact, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "threshold"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9001, 281), (21841, 218), (21841, 21), (21841, 2)], ids=str)
def test_picks_by_programs_of_whole_rows(shape, dtype, compact, backend, whole_rows):
    classes, k = shape
    compare(FORMULAS_OF[dtype][not compact], *every_kind(classes, k, dtype), k, compact, backend=backend)


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "threshold"])
@pytest.mark.parametrize(("classes", "k"), part([(21841, 218), (21841, 21), (100003, 1000), (1_000_003, 1000)], 4))
def test_picks_of_split_rows(classes, k, compact, backend):
    logits, _ = make(1 if classes > 10**6 else 2, classes, FP32)
    compare(CRL, logits, targets_for(logits), k, compact, backend=backend)


@pytest.mark.parametrize("k", part([20, 1, 2], 3))
@pytest.mark.parametrize("dtype", part([BF16, FP32], 2), ids=str)
def test_scarce_room(k, dtype, backend, monkeypatch):
    """Room for 2 k candidates and no more: rows of many equal logits go the long way."""
    monkeypatch.setattr(hardest, "_FEWEST_CANDIDATES", 1)
    compare(CRL, *every_kind(9001, k, dtype, seed=1), k, True, backend=backend)


@pytest.mark.parametrize("compact", part([True, False], 2), ids=["compact", "threshold"])
def test_blocks_on_one_warp(compact, backend, monkeypatch):
    """No plan asks for it. Barriers, not the reductions that happen to lie between, order what a program writes."""
    monkeypatch.setattr(hardest, "_FEWEST_CANDIDATES", 1)
    monkeypatch.setattr(hardest, "plan", lambda *_: hardest.Plan(gpu.Tile(1, 2), width=8, listed=2))
    compare(CRL, *every_kind(2203, 5, BF16), 5, compact, backend=backend)


# --- layouts and targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", part(
    ["misaligned, odd stride", "rows cut out", "misaligned", "every other row", "expanded", "transposed",
     "every other class", "one class"], 3,
))  # fmt: skip
@pytest.mark.parametrize(("dtype", "classes"), part([(BF16, 751), (FP32, 9001), (BF16, 9001), (FP16, 751)], 2), ids=str)
def test_layouts(name, dtype, classes, backend):
    """NaN on every side of what is passed would be found, and so would a read of anything else there."""
    wide, target = make(6, classes + 39, dtype)
    logits = {
        "rows cut out": lambda: wide[:, :classes],
        "misaligned": lambda: wide[:, 1 : classes + 1],
        "misaligned, odd stride": lambda: wide.flatten()[3 : 3 + 5 * (classes + 38)].view(5, -1)[:, :classes],
        "every other row": lambda: wide[::2],
        "expanded": lambda: wide[2:3].expand(3, classes + 39),
        "transposed": lambda: wide.t().contiguous().t()[:3],
        "every other class": lambda: wide[:, ::2],
        "one class": lambda: wide[:, 4:5],
    }[name]()
    target = target[: logits.shape[0]] % logits.shape[1]
    compare(CRL, logits, target, backend=backend)
    compare(SS_LR, logits, target, backend=backend)
    for compact in (True, False):
        compare(CRL, logits, target, max(1, logits.shape[1] // 40), compact, backend=backend)


def test_index_targets_of_any_stride(backend):
    logits, target = make(4, 751, BF16)
    spread = torch.full((9,), 5)
    spread[1::2] = target
    compare(CRL, logits, spread[1::2], backend=backend)
    compare(LR, logits, spread[:1].expand(4), backend=backend)
    compare(LR, logits, spread[1::2], 9, True, backend=backend)


@pytest.mark.parametrize(
    ("classes", "k", "compact"),
    part(
        [(9001, 90, True), (751, 0, False), (751, 9, True), (751, 300, False), (9001, 90, False), (9001, 2000, False)],
        3,
    ),
)
@pytest.mark.parametrize("formula", [CRL, SS_LR], ids=str)
def test_rows_without_a_target_here(formula, classes, k, compact, backend):
    """Ignored, elsewhere, out of range; what is ignored stays 0 whatever its logits and gradients are."""
    target = torch.tensor([IGNORED, 3, classes + 8, -1, 2**40, 8, classes + 7, 9, IGNORED, -(2**63)])
    logits, _ = make(10, classes, BF16)
    grad = torch.ones(10)
    logits[0], grad[0] = math.nan, math.nan
    dlogits = compare(formula, logits, target, k, compact, grad=grad, part=(8, classes + 8), backend=backend)
    assert not dlogits[[0, 8]].any() and dlogits[[2, 3, 4, 9]].isnan().all()
    compare(formula, logits, target, k, compact, ignore_index=None, part=(8, classes + 8), backend=backend)


@pytest.mark.parametrize(
    ("classes", "k", "compact"), part([(751, 0, False), (751, 9, True), (9001, 90, True), (9001, 2000, False)], 2)
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("formula", [CRL, SS_LR], ids=str)
def test_reductions_and_class_weights(formula, reduction, classes, k, compact, backend):
    logits, target = make(5, classes, BF16)
    target[1] = IGNORED
    for weight in (None, torch.rand(classes)):
        compare(formula, logits, target, k, compact, reduction=reduction, weight=weight, backend=backend)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, backend):
    logits, target = make(rows, 751, BF16)
    compare(CRL, logits, target, backend=backend)
    compare(LR, logits, target, 5, True, backend=backend)


KINDS = (torch.bool, BF16, torch.int64, torch.uint8, FP32, torch.int32)
MULTI_HOT = [
    (formula, KINDS[place % 6], DTYPES[place % 3], (751, 9001)[place // 6 % 2])
    for place, formula in enumerate(2 * (*LOGISTIC, SS_LR))
]
each_multi_hot = pytest.mark.parametrize(("formula", "kind", "dtype", "classes"), part(MULTI_HOT, 5), ids=str)


def multi_hot(classes: int, kind: torch.dtype, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and target, (4, classes), of which one row has no positive and one has nothing else."""
    logits, _ = make(4, classes, dtype)
    target = torch.rand((4, classes), generator=torch.Generator().manual_seed(0)) < 0.2
    target[0], target[1] = False, True
    return logits, target.to(kind)


@each_multi_hot
def test_multi_hot(formula, kind, dtype, classes, backend):
    compare(formula, *multi_hot(classes, kind, dtype), backend=backend)


@each_multi_hot
def test_multi_hot_views(formula, kind, dtype, classes, backend):
    """Targets whose rows begin elsewhere in a vector than the logits' rows."""
    logits, target = multi_hot(classes + 11, kind, dtype)
    views = logits[:, 3 : classes + 3], target[:, 5 : classes + 5]
    compare(formula, *views, backend=backend)
    for k, compact in ((classes // 30, True), (classes // 3, False)):
        compare(SS_LR, *views, k, compact, backend=backend)


@pytest.mark.slow
def test_multi_hot_of_split_rows(backend):
    logits, _ = make(2, 100003, BF16)
    compare(LR, logits, torch.rand((2, 100003), generator=torch.Generator().manual_seed(0)) < 0.1, backend=backend)
