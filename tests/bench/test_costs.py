"""bench.evidence.costs on few classes: whose steps are measured, and that they compute what the runs computed."""

import json

import pytest
import torch

pytest.importorskip("sklearn")

from bench.evidence import costs
from bench.evidence.contenders import SampledCrossEntropy
from bench.evidence.data import padded
from bench.evidence.digits import digits

CLASSES = 2000
SETTINGS = {"CE": {"lr": 0.1}, "CE, k hardest": {"lr": 0.1, "k": 3}, "CE, 10 % random": {"lr": 0.1}}


@pytest.fixture
def results(tmp_path):
    losses = {name: {"settings": settings} for name, settings in SETTINGS.items()}
    for suffix in ("", "-runs"):
        (tmp_path / f"digits-{CLASSES}{suffix}.json").write_text(json.dumps({"losses": losses}))
    return tmp_path


def test_steps_compute_what_the_runs_do(results):
    data = padded(digits(), CLASSES)
    found = costs.steps(data, results)
    assert list(found) == list(SETTINGS)
    x, w, target = costs.tensors(data)
    logits = torch.nn.functional.linear(x, w)
    criteria = {case.name: case.criterion(SETTINGS[case.name]) for case in costs.cases(data) if case.name in SETTINGS}
    for name, criterion in criteria.items():
        torch.manual_seed(0)
        of_layer = found[name](x, w, target)
        torch.manual_seed(0)
        torch.testing.assert_close(of_layer, criterion(logits, target))
    assert isinstance(criteria["CE, 10 % random"], SampledCrossEntropy)


def test_what_is_recorded(results, capsys):
    costs.main(["--classes", str(CLASSES), "--rounds", "1", "--results", str(results), "--record"])
    record = json.loads((results / f"digits-{CLASSES}-costs.json").read_text())
    assert list(record["losses"]) == list(SETTINGS) and record["steps_per_epoch"] == 12
    assert all(of["ms"] > 0 for of in record["losses"].values())
    assert "64 rows, 128 features, 2,000 classes" in capsys.readouterr().out


def test_without_runs(results, capsys):
    with pytest.raises(SystemExit):
        costs.main(["--classes", "3000", "--results", str(results)])
    assert "no runs of digits-3000" in capsys.readouterr().err
