"""bench.evidence.extreme on few labels: what is made, what is counted, what is recorded."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from bench.evidence import extreme
from bench.evidence.extreme import LABELS_OF_A_ROW, make, precision, propensity

FEW = {"train": 300, "validation": 40, "test": 60}


def test_rows_have_five_labels_of_one_topic_and_few_labels_are_frequent():
    rows = make(1000, FEW)
    assert {name: len(of.labels) for name, of in rows.items()} == FEW
    labels = torch.cat([of.labels for of in rows.values()])
    topics = math.isqrt(1000)
    assert (labels % topics == labels[:, :1] % topics).all()
    assert all(len(set(row)) == LABELS_OF_A_ROW for row in labels.tolist())
    times = labels.flatten().bincount(minlength=1000).sort(descending=True).values
    assert times[:100].sum() > 0.4 * times.sum()
    assert torch.equal(make(1000, FEW)["test"].inputs, rows["test"].inputs)


def test_precision_counts_a_rare_label_for_more():
    labels = torch.tensor([[0, 1, 2, 3, 4], [0, 5, 6, 7, 8]])
    scores = torch.full((20,), 0.5, dtype=torch.float64)
    scores[0] = 1.0
    found = torch.tensor([[0, 9, 10, 11, 12], [13, 5, 6, 14, 15]])
    assert precision(found, labels, scores) == pytest.approx({"P@1": 0.5, "P@5": 0.3, "PSP@5": 5 / 18})
    nothing = torch.full_like(found, 20)  # what a model that is NaN names
    assert precision(nothing, labels, scores) == {"P@1": 0.0, "P@5": 0.0, "PSP@5": 0.0}
    assert precision(labels, labels, scores) == pytest.approx({"P@1": 1.0, "P@5": 1.0, "PSP@5": 1.0})
    noted = propensity(torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4]]), 6)
    assert noted[0] > noted[1] > noted[5] > 0


def test_the_asymmetric_loss_is_that_of_every_logit():
    torch.manual_seed(0)
    head = extreme.Asymmetric(8, 30, bias=True).double()
    x, index = torch.randn(4, 8, dtype=torch.float64), torch.tensor([[1, 2, 3, 4, 5]] * 4)
    p = (x @ head.weight.T + head.bias).sigmoid()
    expected = 0.0
    for row in p:
        for label, probability in enumerate(row):
            q = max(0.0, probability.item() - 0.05)
            own = 1 <= label <= 5
            expected -= (1 - probability) * probability.log() if own else q**4 * math.log(1 - q)
    assert head(x, extreme.fl.Labels(index)).item() == pytest.approx(expected.item() / 4)


def test_a_run_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(extreme, "LEARNING_RATES", (0.01, 1.0))
    monkeypatch.setattr(extreme, "make", lambda num_labels: make(num_labels, FEW))
    arguments = ["--labels", "1000", "--seeds", "2", "--epochs", "2", "--record", "--results", str(tmp_path)]
    extreme.main(arguments)
    record = json.loads((tmp_path / "extreme-1000.json").read_text())
    assert list(record["losses"]) == list(extreme.CONTENDERS)
    for of in record["losses"].values():
        best = max(of["validation"], key=of["validation"].get)
        assert of["settings"]["lr"] == float(best)
        assert len(of["test"]["PSP@5"]) == 2


def test_rates_that_were_chosen_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(extreme, "make", lambda num_labels: make(num_labels, FEW))
    chosen = {"HS-LR": {"settings": {"lr": 0.02}}}
    (tmp_path / "extreme-50.json").write_text(json.dumps({"losses": chosen}))
    arguments = [
        "--labels",
        "1000",
        "--rates-of",
        "50",
        "--losses",
        "HS-LR",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--record",
    ]
    extreme.main([*arguments, "--results", str(tmp_path)])
    record = json.loads((tmp_path / "extreme-1000.json").read_text())
    assert record["command"].endswith("--labels 1000 --rates-of 50 --record")
    assert record["losses"]["HS-LR"]["settings"] == {"lr": 0.02} and record["losses"]["HS-LR"]["validation"] == {}
    with pytest.raises(SystemExit):
        extreme.main([*arguments, "--rates-of", "60", "--results", str(tmp_path)])
