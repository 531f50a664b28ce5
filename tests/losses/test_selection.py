"""Which negatives are the k hardest: counts, order, ties, and that the choice is the same everywhere."""

import itertools

import pytest
import torch

import fused_losses as fl
import paper
from cases import (
    CE,
    CRL,
    DTYPES,
    LOGISTIC,
    LOSSES,
    LR,
    NLLR,
    SS_LR,
    each,
    make_index,
    make_logits,
    make_multihot,
    value_and_grad,
)
from doors import LR as LR_DOOR
from doors import forward

INF = float("inf")


def chosen_by(loss, logits, target, **options) -> list[list[int]]:
    """The negatives of each row that get a gradient."""
    _, grad = value_and_grad(lambda z: loss(z, target, reduction="sum", **options), logits)
    return [
        [j for j in row.nonzero().flatten().tolist() if j != y] for row, y in zip(grad, target.tolist(), strict=True)
    ]


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, classes, expected",
    [
        (0.05, 10, 1),  # at least one
        (1e-9, 10, 1),
        (0.25, 10, 2),  # rounds down
        (0.29, 100, 29),  # 0.29 * 100 is 28.999... in floating point
        (0.57, 100, 57),
        (0.58, 100, 58),
        (0.3, 10, 3),
        (0.01, 21841, 218),
        (0.999, 10, 9),
        (1.0, 10, 9),  # a share of all classes, of which 9 are negatives
        (1, 10, 9),
    ],
)
def test_ratio_is_a_share_of_all_classes(ratio, classes, expected):
    logits, target = make_logits(2, classes).clamp(min=-20), make_index(2, classes)
    for loss in (CE, SS_LR):
        assert [len(row) for row in chosen_by(loss, logits, target, ratio=ratio)] == [expected] * 2
    assert torch.equal(fl.hs_lr_loss(logits, target, ratio=ratio), fl.hs_lr_loss(logits, target, k=expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hardest", [1, 2, 10, 300])
def test_the_last_pick_may_lie_far_behind_the_others(hardest, dtype):
    """A search that takes the first ones for enough drops it."""
    classes, far = 16384, 16000
    for others in range(max(0, hardest - 3), hardest + 2):
        logits = torch.full((1, classes), -1.0, dtype=dtype)
        place = 13 * torch.arange(others) + 3
        logits[0, place], logits[0, far] = 5.0, 4.0
        expected = sorted([*place.tolist(), far])[:hardest] if others < hardest else place.tolist()[:hardest]
        rest = [j for j in range(1, classes) if j not in {*expected}]
        expected = sorted(expected + rest[: hardest - len(expected)])
        target = torch.tensor([0])
        assert chosen_by(SS_LR, logits, target, k=hardest) == [expected], others


@pytest.mark.parametrize("k", [11, 12, 13, 10**9])
@each(LOSSES)
def test_more_than_there_are_is_all(loss, k):
    """|S| = min(k, number of negatives), silently, in the value's normaliser too."""
    logits, target = make_logits(4, 12), make_index(4, 12)
    value, grad = value_and_grad(lambda z: loss(z, target, k=k), logits)
    expected, expected_grad = value_and_grad(lambda z: loss.paper(z, target, 11, **loss.hypers[0]).mean(), logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


@each(LOGISTIC)
def test_multihot_rows_choose_among_their_own_negatives(loss):
    """A row with fewer than k negatives takes them all; the positives are never picked, however large."""
    logits, target = make_logits(6, 12), make_multihot(6, 12)
    logits = torch.where(target, logits + 50, logits)
    _, grad = value_and_grad(lambda z: loss(z, target, k=5, reduction="sum"), logits)
    assert torch.equal(grad > 0, paper.negatives(logits, target, 5))


def test_target_is_never_picked():
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    for loss in LOSSES:
        assert chosen_by(loss, logits, torch.tensor([0]), k=2) == [[2, 3]]


# --- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 7])
def test_ties_go_to_the_lowest_class(dtype, levels):
    """Also where the tied classes lie around the target."""
    classes = 40
    logits = torch.randint(levels, (8, classes), generator=torch.Generator().manual_seed(levels)).to(dtype)
    target = torch.tensor([0, 1, 7, 20, 38, 39, 5, 11])
    for k in (1, 2, 19, 37, 38):
        expected = [row.nonzero().flatten().tolist() for row in paper.negatives(logits, target, k)]
        for loss in (CE, NLLR, LR):
            assert chosen_by(loss, logits, target, k=k) == expected, (loss.name, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_both_signs_are_equal(dtype):
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, 0.0]], dtype=dtype)
    target = torch.tensor([1])
    assert chosen_by(LR, logits, target, k=1) == [[0]]
    assert chosen_by(LR, logits, target, k=2) == [[0, 2]]
    assert chosen_by(LR, logits, target, k=3) == [[0, 2, 3]]
    assert chosen_by(LR, -logits, target, k=2) == [[0, 4]]


def test_neighbouring_numbers_are_told_apart():
    """No rounding to a coarser key: neighbours of the narrowest dtype and of the widest."""
    for dtype in DTYPES:
        one = torch.ones((), dtype=dtype)
        above = (
            torch.nextafter(one, one + 1) if dtype in (torch.float32, torch.float64) else one + torch.finfo(dtype).eps
        )
        logits = torch.stack([one, above, one, above, -above, -one]).unsqueeze(0)
        assert chosen_by(LR, logits, torch.tensor([0]), k=2) == [[1, 3]]
        assert chosen_by(LR, -logits, torch.tensor([0]), k=1) == [[4]]
        assert chosen_by(LR, -logits, torch.tensor([0]), k=2) == [[4, 5]]


def test_subnormal_logits_keep_their_order():
    tiny = torch.finfo(torch.float32).tiny / 4
    logits = torch.tensor([[0.0, tiny, 2 * tiny, -tiny, 0.0]])
    assert chosen_by(LR, logits, torch.tensor([4]), k=1) == [[2]]
    assert chosen_by(LR, logits, torch.tensor([4]), k=2) == [[1, 2]]
    assert chosen_by(LR, logits, torch.tensor([4]), k=3) == [[0, 1, 2]]


def test_masked_classes_are_picked_after_all_finite_ones(backend):
    logits = torch.tensor([[-INF, 1.0, -INF, -5.0, -3e38]])
    target = torch.tensor([1])
    picks = {k: forward(backend, LR_DOOR, logits, target, k, True).pick_index[0].tolist() for k in (1, 2, 3, 4)}
    assert {k: sorted(p) for k, p in picks.items()} == {1: [3], 2: [3, 4], 3: [0, 3, 4], 4: [0, 2, 3, 4]}


def test_every_order_of_a_small_row(backend):
    """All arrangements of a row with ties, every k and every target: nothing about the data's order can matter."""
    arrangements = sorted(set(itertools.permutations([2.0, 2.0, 1.0, 1.0, 0.0])))
    logits = torch.tensor(arrangements)
    for y, k in itertools.product(range(5), (1, 2, 3, 4)):
        target = torch.full((len(arrangements),), y)
        chosen = paper.negatives(logits, target, k)
        kept = forward(backend, LR_DOOR, logits, target, k, True)
        picked = torch.zeros_like(chosen).scatter(1, kept.pick_index.long(), True)
        assert torch.equal(picked, chosen)


@pytest.mark.parametrize(
    "pattern", ["random", "ascending", "descending", "equal", "one peak", "sawtooth", "mostly masked"]
)
def test_data_that_would_break_a_clever_selection(backend, pattern):
    classes = 5000
    j = torch.arange(classes, dtype=torch.float32)
    row = {
        "random": make_logits(1, classes, torch.float32)[0],
        "ascending": j / 100,
        "descending": -j / 100,
        "equal": torch.zeros(classes),
        "one peak": torch.where(j == 3210, 10.0, -10.0),
        "sawtooth": (j % 64) / 8,
        "mostly masked": torch.where(j % 97 == 0, j / 1000, -INF),
    }[pattern]
    logits, target = row.repeat(3, 1), torch.tensor([0, 3210, classes - 1])
    for k in (1, 50, 500, 4998):
        chosen = paper.negatives(logits, target, k)
        kept = forward(backend, LR_DOOR, logits, target, k, True)
        assert torch.equal(torch.zeros_like(chosen).scatter(1, kept.pick_index.long(), True), chosen)
        edge = forward(backend, LR_DOOR, logits, target, k, False)
        last = [max(row.nonzero().flatten().tolist(), key=lambda j: (-logits[0, j].item(), j)) for row in chosen]
        assert edge.pick_index.flatten().tolist() == last


def test_every_run_chooses_alike():
    logits, target = make_logits(4, 3000, torch.bfloat16), make_index(4, 3000)
    first = chosen_by(CRL, logits, target, ratio=0.1)
    for _ in range(3):
        assert chosen_by(CRL, logits, target, ratio=0.1) == first
