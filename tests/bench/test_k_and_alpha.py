"""bench/evidence/k_and_alpha.py: what is swept, what is recorded, what the tables say of it."""

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from bench.evidence import k_and_alpha


def test_the_grid_stays_below_the_number_of_negatives():
    settings = list(k_and_alpha.grid(10, quick=False))
    assert {setting["k"] for case, _, setting in settings if case.name == "HS-LR"} == {1, 3}
    assert max(setting["alpha"] for case, _, setting in settings if case.name == "SS-LR") == 9
    assert len(list(k_and_alpha.grid(100_000, quick=True))) < len(list(k_and_alpha.grid(100_000, quick=False))) / 2


def test_best_is_that_of_the_means():
    assert k_and_alpha.best({"0.1": [0.5, 0.7], "0.3": [0.9, 0.1], "1": [0.2, 0.2]}) == (pytest.approx(60), "0.1")


def test_a_sweep_is_recorded_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(k_and_alpha, "KS", (1, 3))
    monkeypatch.setattr(k_and_alpha, "ALPHAS", (1.0,))
    monkeypatch.setattr(k_and_alpha, "SHARES", (1.0,))
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    path = tmp_path / "swept.json"
    arguments = ["--epochs", "6", "--seeds", "1", "--rates", "0.1", "1e4", "--results", str(path), "--classes"]
    k_and_alpha.main([*arguments, "20"])
    k_and_alpha.main([*arguments, "10"])
    record = json.loads(path.read_text())
    assert [of["classes"] for of in record["data"].values()] == [10, 20]
    scores = record["data"]["digits-20"]["scores"]
    assert set(scores["HS-LR"]) == {"k 1, alpha 1", "k 3, alpha 1"}
    assert set(scores["SS-LR"]) == {"alpha 1", "alpha 1 (C - 1)"}
    for of_rates in scores["HS-LR"].values():
        assert of_rates["0.1"][0] > 0.6 > of_rates["10000"][0]  # chance is 0.05
    printed = capsys.readouterr().out
    assert "lr 0.1" in printed and "SS-LR, gamma 2" in printed and "digits, 20 classes" in printed
