"""What the warps execute for a logit: instructions of PTX, moves between registers included, times the threads of a
warp. A search takes more or fewer turns from row to row: these are a few rows, always the same. Over all negatives rows
are whole, as where they are many: what programs that share a row do at its ends would be most of it."""

import pytest
import torch
from gpu_doors import make
from shapes import ONE_MULTIPROCESSOR

from doors import LR, SS_LR, backward, forward, grad_like
from fused_losses.gpu import device as gpu

HS_LR = LR._replace(alpha=1.0)
CELLS = (  # formula, rows, classes, k, compact, at most forward, backward
    (SS_LR, 8, 21841, 0, False, 34.0, 30.0),
    (HS_LR, 2, 21841, 218, True, 31.0, None),
    (HS_LR, 2, 21841, 2184, False, 53.0, None),
    (HS_LR, 8, 1000, 10, True, 50.5, None),
    (HS_LR, 8, 1000, 100, False, 67.0, None),
)


@pytest.mark.parametrize(("formula", "rows", "classes", "k", "compact", "in_forward", "in_backward"), CELLS, ids=str)
def test_instructions(formula, rows, classes, k, compact, in_forward, in_backward, device, backend, monkeypatch):
    if device.target != "sm_90":
        pytest.skip("budgets of one target")
    if k == 0:
        monkeypatch.setattr(gpu, "profile", lambda _: ONE_MULTIPROCESSOR)
    logits, target = make(rows, classes, torch.bfloat16)
    before = device.instructions
    kept = forward(backend, formula, logits, target, k, compact)
    between = device.instructions
    assert 32 * (between - before) / logits.numel() <= in_forward
    if in_backward is not None:
        backward(backend, formula, grad_like(logits), logits, target, kept, k, compact)
        assert 32 * (device.instructions - between) / logits.numel() <= in_backward
