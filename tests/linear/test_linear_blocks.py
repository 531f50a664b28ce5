"""A linear layer with a loss: blocks of classes."""

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CLASSES,
    FEATURES,
    ROWS,
    Watch,
    assert_same,
    cosines,
    each_layer,
    each_reduction,
    make_layer,
    make_upstream,
    value_and_grads,
)

import fused_losses as fl
from cases import (
    CRL,
    LOSSES,
    each,
    make_index,
)
from fused_losses import linear_rows


@pytest.fixture(params=[8, 13, 40], ids=lambda least: f"blocks of {least}")
def small_blocks(request, monkeypatch):
    """Over the k hardest of 100 classes, several blocks of them, in chunks of two rows."""
    monkeypatch.setattr(linear_rows, "LEAST_BLOCK", request.param)
    monkeypatch.setattr(linear_rows, "LEAST_BLOCK_PER_PICK", 2)
    return fl.LinearLossOptions(chunk_bytes=2 * request.param * 8)


@each_reduction
@each_layer
@pytest.mark.parametrize("k", [1, 3, 4])
@each(LOSSES)
def test_blocks_of_classes_change_nothing(small_blocks, loss, k, normalize, reduction):
    """Ignored rows, whose index is a class in some block, among them."""
    (x, w, _), target = make_layer(), make_index(ROWS, CLASSES)
    target[[1, 4]] = 9
    target[2] = 0
    target[3] = CLASSES - 1
    upstream = make_upstream() if reduction == "none" else None
    options = {"k": k, "reduction": reduction, "ignore_index": 9, "weight": torch.linspace(0.1, 3, CLASSES)}
    got = value_and_grads(
        lambda x, w: loss.linear(x, w, target, normalize=normalize, options=small_blocks, **options),
        *(x, w),
        upstream=upstream,
    )
    expected = value_and_grads(
        lambda x, w: loss(cosines(x, w, 1.0) if normalize else F.linear(x, w), target, **options),
        *(x, w),
        upstream=upstream,
    )
    assert_same(got, expected)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("values", [1, 2, 5], ids=lambda values: f"{values} values")
@each(LOSSES)
def test_blocks_of_classes_pick_the_lowest_class_among_equals(small_blocks, loss, k, values):
    """Ties within a block and from block to block; the weight's gradient tells which classes were picked."""
    x = torch.ones(ROWS, 1, dtype=torch.float64)
    w = torch.randint(values, (CLASSES, 1), generator=torch.Generator().manual_seed(k)).double()
    target = make_index(ROWS, CLASSES)
    upstream = make_upstream()
    shared = {"k": k, "reduction": "none"}
    got = value_and_grads(
        lambda x, w: loss.linear(x, w, target, options=small_blocks, **shared), x, w, upstream=upstream
    )
    assert_same(got, value_and_grads(lambda x, w: loss(F.linear(x, w), target, **shared), x, w, upstream=upstream))


NOT_FINITE = {
    "a masked class": [(50, -torch.inf)],
    "a block of masked classes": [(column, -torch.inf) for column in range(16, 56)],
    "every other class masked": [(column, -torch.inf) for column in range(CLASSES) if column != 9],
    "a certain negative": [(7, torch.inf)],
    "a lost target": [(9, -torch.inf)],
    "a certain target": [(9, torch.inf)],
    "a NaN that may not be picked": [(7, torch.nan)],
}


@pytest.mark.parametrize("entries", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@each(LOSSES)
def test_blocks_of_classes_with_logits_that_are_not_finite(small_blocks, loss, entries):
    w, target = make_layer()[1][:, :1].clone(), torch.tensor([9])
    for column, value in entries:
        w[column] = value
    x = torch.ones(1, 1, dtype=torch.float64)  # the logits are the weight
    ours = loss.linear(x, w, target, k=3, reduction="none", options=small_blocks)
    torch.testing.assert_close(ours, loss(w.t(), target, k=3, reduction="none"), equal_nan=True)


@each_layer
def test_blocks_of_classes_keep_to_their_budget(glass_house, small_blocks, normalize):
    x, w, _ = make_layer(64)
    with Watch() as watch, torch.no_grad():
        CRL.linear(x, w, make_index(64, CLASSES), k=2, normalize=normalize, options=small_blocks)
    candidates = 2 * (1 + 2 * -(-CLASSES // (small_blocks.chunk_bytes // 16)))
    assert watch.largest <= max(small_blocks.chunk_bytes // 8, candidates, 64 * FEATURES, CLASSES * FEATURES)
    assert watch.ops.count("mm") >= 64 // 2 * 3
