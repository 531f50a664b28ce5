"""The groups of bench.speed.cells on a shape of no consequence."""

import pytest
import torch

from bench.speed import cells, cpu
from bench.speed.cases import Shape

SMALL = Shape(3, 800)
GROUPS = (
    cells.kinds_of_rows(SMALL, "fp32", 8, 1.3),
    cells.numbers_of_picks(SMALL, "bf16"),
    cells.multi_hot(SMALL, of_bce=1.0, lr=1.0, hs=1.0),
    cells.double(SMALL, {"CE": 1.0, "SS-LR": 1.0}),
)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_step_runs_and_every_bar_is_about_steps(group, capsys):
    steps = group.steps()
    times = cpu.interleaved(steps, 1)
    assert set(times) == set(steps)
    impossible = [bar._replace(most=0.0) for bar in group.bars]
    median = {name: values[0] for name, values in times.items()}
    assert len(cpu.report(str(group), median, group.unit, impossible)) == sum(len(bar.rivals) for bar in group.bars)
    assert capsys.readouterr().out.count("MISSED") == len(impossible)


@pytest.mark.parametrize("kind", cells.KINDS)
def test_kinds_of_rows_are_what_they_are_called(kind):
    logits, target = cells.rows_of(kind, SMALL, torch.float32, 8)
    assert logits.shape == (SMALL.rows, SMALL.classes) and logits.requires_grad and target.shape == (SMALL.rows,)
    hardest = logits.topk(8, 1).indices.sort(1).values
    if kind == "side by side":
        assert (hardest.diff() == 1).all()
    elif kind == "ascending":
        assert (hardest == torch.arange(SMALL.classes - 8, SMALL.classes)).all()
    elif kind == "two values":
        assert (logits.sum(1) == 4).all() and set(logits.unique().tolist()) == {0.0, 1.0}
    elif kind == "masked":
        assert logits.isinf().float().mean() > 0.95
