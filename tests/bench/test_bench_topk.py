"""bench.speed.topk on classes of no consequence."""

import pytest
import torch

from bench.speed import topk
from bench.speed.topk import ALONE, OURS, Case

TINY = Case(classes=70_001, features=4, rows=3, k=5)  # more than one block


def test_every_search_finds_the_same():
    x, w = TINY.queries(), TINY.vectors(0, TINY.classes)
    for name, search in ALONE.items():
        torch.testing.assert_close(search(TINY)(x), (x @ w.t()).topk(TINY.k).values, msg=lambda m: f"{name}: {m}")
    assert torch.equal(TINY.vectors(65_000, 66_000), w[65_000:66_000])


def test_ranks_find_what_one_process_finds():
    """And a search that holds all logits is seen to."""
    case = Case(classes=4_000_000, features=2, rows=8, k=5)
    whole = topk.in_processes("(x @ W.T).topk(k)", case, 1, 1, rounds=2)
    ranks = topk.in_processes(OURS, case, 2, 2, rounds=2)
    assert ranks["sum"] == pytest.approx(whole["sum"])
    assert len(ranks["seconds"]) == len(whole["seconds"]) == 2
    assert whole["bytes"] > 0.9 * case.rows * case.classes * 4 > ranks["bytes"]


def test_logits_that_differ_are_no_result(monkeypatch):
    found = {name: {"seconds": [1.0], "bytes": 0, "sum": float(len(name))} for name in ALONE}
    monkeypatch.setattr(topk, "in_processes", lambda name, *_: found[name])
    with pytest.raises(RuntimeError, match="finds other logits"):
        topk.report(TINY, ranks=2, threads=1, rounds=1, turns=1)
