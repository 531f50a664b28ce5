"""Thousands of random cases on the emulator: any loss, dtype, length, k, form and alignment, on rows of every kind."""

import pytest
import torch
from gpu_doors import DTYPES, FORMULAS, compare
from gpu_rows import rows_of_every_kind, targets_for

from conftest import DEVICES

CASES = 2000
LENGTHS = (3, 40, 300, 751, 1500, 2048, 2049, 4097, 9001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "seed"), [(list(DEVICES)[seed % len(DEVICES)], seed) for seed in range(CASES)], indirect=["device"]
)
def test_fuzz(seed, wing):
    draw = torch.Generator().manual_seed(seed)
    pick = lambda among: among[int(torch.randint(len(among), (1,), generator=draw))]  # noqa: E731
    dtype, classes, offset, compact = pick(DTYPES), pick(LENGTHS), pick(range(9)), pick((True, False))
    most = min(classes, pick((8, classes // 40 + 2, classes // 3 + 2)))
    k = pick((0, *(pick(range(1, max(2, most))) for _ in range(3))))
    rows = list(rows_of_every_kind(classes + 20, max(1, k), dtype, seed).values())
    logits = torch.stack(rows[seed % 5 :: 5])[:, offset : offset + classes]
    compare(pick([*FORMULAS.values()]), logits, targets_for(logits, seed), k, compact and k > 0, wing=wing)
