"""Rows with several labels, and label smoothing, at the GPU doors, against the reference and float64."""

import pytest
import torch
from gpu_doors import FORMULAS
from gpu_labels import compare_labels, make_labels
from gpu_doors import make

@pytest.mark.parametrize("most", [1, 2, 3, 6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_formulas(formula, most, smoothing, device):
    logits, _ = make(4, 203, torch.float32)
    compare_labels(formula, logits.to(device), make_labels(4, most, 203).to(device), smoothing=smoothing)
