"""The commands of bench.speed.linear on shapes of no consequence."""

import json

import pytest
import torch

from bench.speed import linear
from bench.speed.linear import EAGER, PYTORCH_HS_LR, Bars, Case

TINY = Case("tiny", 4, 8, 400, ("ours, HS-LR",), 5, {EAGER: 0.0, PYTORCH_HS_LR: 1e9}, most_logits=1e9)


def test_every_step_computes_its_loss():
    """Ours and the peers agree, so that the same thing is measured."""
    for case in (TINY, Case("tiny", 4, 8, 400, ("ours, CRL", "ours, CE"))):
        x, w, target = case.tensors("cpu")
        values = {name: step(x, w, target).item() for name, step in case.steps("cpu").items()}
        for ours, peers in (("ours, HS-LR", [PYTORCH_HS_LR]), ("ours, CE", linear.peers("cpu"))):
            for peer in peers:
                if ours in values:
                    assert values[ours] == pytest.approx(values[peer], rel=1e-5)


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(linear, "in_a_process", lambda *arguments, **options: {"bytes": 7})


@pytest.mark.usefixtures("no_processes")
def test_report_judges_its_bars():
    bars = Bars()
    rows = linear.report(TINY, linear.measured(TINY, "cpu", threads=1, rounds=1), bars)
    assert [row[0] for row in rows] == ["one matmul", *TINY.steps("cpu")]
    assert len(bars.missed) == 1
    assert f"tiny, against {PYTORCH_HS_LR}" in bars.missed[0]


def test_the_page_quotes_the_record():
    record = json.loads(linear.RESULTS.read_text())
    page = (linear.RESULTS.parents[2] / "docs" / "linear.md").read_text()
    assert page.partition("<!-- linear -->\n")[2].partition("\n<!-- end -->")[0] == linear.recorded_table(record)
    assert record["command"] in page


@pytest.mark.usefixtures("no_processes")
def test_what_is_kept_is_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear, "CASES", {"tiny": TINY})
    monkeypatch.setattr(linear, "RESULTS", tmp_path / "linear.json")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    linear.main(["--cases", "tiny", "--rounds", "1", "--threads", "1", "--processor-time", "--write"])
    record = json.loads((tmp_path / "linear.json").read_text())
    assert record["command"].endswith("--cases tiny --rounds 1 --threads 1 --processor-time --write")
    assert set(record["cases"]["tiny"]) == {"one matmul", *TINY.steps("cpu")}
    capsys.readouterr()
    linear.main(["--recorded"])
    header, _, ours, *_ = [[cell.strip() for cell in row.split("|")] for row in capsys.readouterr().out.splitlines()]
    assert header[2] == "4 x 8 x 400, k = 5"
    assert ours[1:3] == ["ours, HS-LR", "1.00, 0 MiB"]


def test_memory_of_a_step_that_holds_all_logits_is_seen():
    case = Case("tiny", 512, 2, 40_000, ("ours, CE",))
    case_json = json.dumps(case.__dict__)
    found = {
        name: linear.in_a_process("--memory", case_json, name, device="cpu", threads=1)["bytes"]
        for name in ("ours, CE", EAGER)
    }
    assert found[EAGER] > 1.9 * case.logits_bytes
    assert found["ours, CE"] < 0.9 * case.logits_bytes


@pytest.mark.parametrize("normalize", [False, True])
def test_a_million_classes_in_small(monkeypatch, normalize):
    monkeypatch.setattr(linear, "MILLION", {"rows": 4, "features": 8, "classes": 1000, "k": 5})
    found = linear.million(normalize, "cpu")
    assert found["strays"] == 0
    assert 5 <= found["picked"] <= 4 * 6


@pytest.mark.usefixtures("no_processes")
def test_command_exits_with_1_where_a_bar_is_missed(monkeypatch, capsys):
    monkeypatch.setattr(linear, "CASES", {"tiny": TINY})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    linear.main(["--cases", "tiny", "--rounds", "1"])
    assert "MISSED tiny" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        linear.main(["--cases", "tiny", "--rounds", "1", "--check"])
    assert caught.value.code == 1
