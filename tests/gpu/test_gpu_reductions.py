"""The reduction's kernel against the plain one. Rows below, at and above one block of the kernel."""

import math

import pytest
import torch
from gpu_doors import IGNORED

from cases import assert_as_accurate
from fused_losses import reductions
from fused_losses.gpu import doors


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("columns, alpha", [(1, None), (2, None), (2, 1.5)])
@pytest.mark.parametrize("rows", [1, 5, 1024, 2500])
def test_loss_and_slopes(rows, columns, alpha, reduction, device):
    generator = torch.Generator().manual_seed(rows)
    target = torch.randint(50, (rows, 2), generator=generator)[:, 1]  # of stride 2
    target[1::3] = IGNORED
    terms = torch.rand((rows, columns), generator=generator).squeeze(1)
    terms[1::3] = 0
    rest = None, None, alpha, 50, 7, IGNORED, reduction
    loss, slopes = doors.reduce_terms(terms.to(device), target.to(device), *rest)
    expected, expected_slopes = reductions.reduce_terms(terms.double(), target, *rest)
    torch.testing.assert_close(loss.cpu(), expected.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes.cpu(), expected_slopes.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_many_equal_rows(reduction, device):
    terms, target = torch.full((1_000_003,), math.log(2)), torch.zeros(1_000_003, dtype=torch.int64)
    rest = None, None, None, 50, 0, IGNORED, reduction
    loss, _ = doors.reduce_terms(terms.to(device), target.to(device), *rest)
    same, _ = reductions.reduce_terms(terms, target, *rest)
    truth, _ = reductions.reduce_terms(terms.double(), target, *rest)
    assert_as_accurate(loss.cpu(), same, truth, reduction)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_reduce(rows, device):
    terms, target = torch.zeros(rows, device=device), torch.full((rows,), IGNORED, device=device)
    for reduction, expected in ("sum", 0.0), ("mean", torch.nan):
        loss, slopes = doors.reduce_terms(terms, target, None, None, None, 50, 0, IGNORED, reduction)
        torch.testing.assert_close(loss.cpu(), torch.tensor(expected), equal_nan=True)
        assert slopes.shape == (rows,)


def test_a_bad_row_spoils_the_loss(device):
    terms, target = torch.tensor([1.0, torch.nan, 2.0], device=device), torch.tensor([1, 2, 3], device=device)
    for reduction in "sum", "mean":
        loss, _ = doors.reduce_terms(terms, target, None, None, None, 50, 0, IGNORED, reduction)
        assert loss.isnan()


def test_class_weights_and_multi_hot_targets_go_to_the_plain_one(device):
    """The kernel has no arguments for them."""
    terms, target, weight = torch.rand(3), torch.tensor([1, 2, 3]), torch.rand(50)
    rest = None, None, 50, 0, IGNORED, "mean"
    expected = reductions.reduce_terms(terms, target, weight, *rest)
    torch.testing.assert_close(doors.reduce_terms(terms, target, weight, *rest), expected)
