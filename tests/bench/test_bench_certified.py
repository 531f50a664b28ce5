"""The commands that measure certified selection, on shapes of no consequence."""

import pytest
import torch
import torch.nn.functional as F

from bench.evidence import candidates
from bench.speed import certified
from bench.speed.certified import Shape
from bench.speed.linear import Bars
from fused_losses import ops

TINY = Shape(4, 8, 1000, most=1e9, beats_sampling=True)


def test_partial_fc_of_all_classes_is_cross_entropy(monkeypatch):
    monkeypatch.setattr(certified, "SAMPLED", 1.0)
    x, w, target = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8), torch.randint(50, (4,))
    plain = w.clone().requires_grad_()
    F.cross_entropy(F.linear(x, plain), target).backward()
    expected, x.grad = x.grad, None
    trained = w.clone().requires_grad_()
    certified.partial_fc(trained, x, target)()
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(trained.detach(), w - certified.LEARNING_RATE * plain.grad)


def test_partial_fc_samples_the_classes_of_the_batch():
    x, w, target = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8), torch.tensor([3, 3, 50, 99])
    trained = w.clone().requires_grad_()
    certified.partial_fc(trained, x, target)()
    moved = (trained.detach() != w).any(1).nonzero().flatten().tolist()
    assert len(moved) == 10 and {3, 50, 99} <= set(moved)


@pytest.mark.parametrize("certain", [None, False])
def test_steps_move_the_classes_picked(certain):
    x, w, target = torch.randn(4, 8, requires_grad=True), torch.randn(10_000, 8), torch.tensor([3, 3, 50, 99])
    trained = w.clone().requires_grad_()
    certified.sparse_step(trained, x, target, certain)()
    moved = (trained.detach() != w).any(1).sum()
    assert certified.K < moved <= 4 * (certified.K + 1)


def test_report_judges_its_bars():
    bars = Bars()
    row = certified.report(TINY, 1, iter(range(1000)).__next__, bars)  # every run takes one second
    assert row[0] == "4 x 8 x 1,000" and row.count("1000.0") == len(certified.RUNS)
    assert len(bars.missed) == 1 and "step to Partial FC" in bars.missed[0]


def test_command_exits_with_1_where_a_bar_is_missed(monkeypatch, capsys):
    monkeypatch.setattr(certified, "SHAPES", (Shape(4, 8, 1000, most=0.0),))
    certified.main(["--threads", "1", "--rounds", "1"])
    assert "MISSED" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        certified.main(["--threads", "1", "--rounds", "1", "--check"])


@pytest.mark.skipif(not ops.has_candidates(), reason="no AVX-512 BF16, or no C++ extension")
def test_shares_of_the_rows_are_all_of_them(monkeypatch):
    rows = candidates.rows_of(candidates.padded(candidates.digits(), 1000), "digits-1000", (10,), epochs=1)
    assert [row[1] for row in rows] == ["CE", "HS-LR"]
    for row in rows:
        assert sum(map(int, row[4:])) == pytest.approx(100, abs=4)
        assert all(10 <= int(number) <= 104 for number in row[3].split(", "))
