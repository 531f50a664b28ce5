"""bench/evidence/sweep.py: what docs/choosing.md says of learning rates is what was trained."""

import json

import pytest

pytest.importorskip("sklearn")

from bench.evidence import records, sweep

PAGE = records.RESULTS.parents[1] / "docs" / "choosing.md"


def test_the_page_quotes_the_record():
    record = json.loads((records.RESULTS / "sweep.json").read_text())
    quoted = PAGE.read_text().partition("<!-- sweep table -->\n")[2].partition("\n<!-- end -->")[0]
    assert quoted == sweep.summary(record)
    assert record["command"] in PAGE.read_text()


def test_summary():
    scores = {"CE": [[0.5, 0.7], [0.9, 0.9], [0.89, 0.89], [0.1, 0.1]], "LR": [[0.1], [0.3], [0.2], [0.1]]}
    text = sweep.summary({"rates": [0.1, 0.3, 1.0, 3.0], "validation accuracy": {"plain": scores}})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["loss", "plain"]
    assert rows[2:] == [["CE", "90.0 %, 0.3 to 1"], ["LR", "30.0 %, 0.3"]]


def test_every_loss_trains_and_a_wrong_rate_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "CLASSES", 20)
    monkeypatch.setattr(sweep, "LOSSES", {"CE": sweep.LOSSES["CE"]})
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    path = tmp_path / "sweep.json"
    sweep.main(["--epochs", "8", "--seeds", "1", "--rates", "0.1", "1e4", "--results", str(path)])
    found = json.loads(path.read_text())["validation accuracy"]
    assert set(found) == set(sweep.HEADS)
    for head, losses in found.items():
        (good,), (bad,) = losses["CE"]
        assert good > 0.6, head  # chance is 0.05
        assert bad < good, head
