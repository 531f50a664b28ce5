"""bench/evidence/page.py and bench/evidence/tables.py: what stands on the page is what was recorded."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from bench.evidence import figures, records, train
from bench.evidence.page import BLOCKS, NOTHING, PAGE, render
from bench.evidence.significance import paired

EPOCHS, SEEDS = 3, 4


def a_record(name: str, losses: dict[str, float]) -> dict:
    """Runs of each loss around a mean."""
    entries = {}
    for number, (loss, mean) in enumerate(losses.items()):
        scores = [mean + 0.001 * seed + 0.0005 * (seed * number % 3) for seed in range(SEEDS)]
        curve = "easy share" if "LR" in loss else "margin"
        entries[loss] = {
            "settings": {"lr": 0.1, "prior_bias": bool(number % 2)},
            "test": {"mAP": scores, "rank-1": [1 - score for score in scores]},
            "loss_ms": 0.25,
            "step_ms": 1.0,
            "first_losses": [[mean + 0.5, mean + 0.25]] * SEEDS,
            "curves": {
                "train_loss": [[1.0, 0.5, 0.1]] * SEEDS,
                curve: [[0.9, 0.5, 0.25, 0.1 * seed] for seed in range(SEEDS)],
            },
        }
    return {
        "data": name,
        "command": f"python -m bench.evidence.train --data {name} --record",
        "versions": {"torch": "2.13.0"},
        "threads": 1,
        "budget": {"seeds": list(range(SEEDS)), "epochs": EPOCHS, "device": "cpu"},
        "losses": entries,
    }


def keep(folder, name: str, losses: dict[str, float]) -> dict:
    record = a_record(name, losses)
    (folder / f"{name}-runs.json").write_text(json.dumps(record))
    return record


def block(kind: str, name: str) -> str:
    return f"before\n<!-- {kind} {name} -->\nold\n<!-- end -->\nafter\n"


def test_the_page_is_what_the_recorded_results_give(tmp_path):
    """After a run with --record, python -m bench.evidence; an edit of a number by hand does not survive."""
    page = PAGE.read_text()
    assert render(page, records.RESULTS, tmp_path / "figures") == page
    for drawn in (tmp_path / "figures").glob("*.png"):
        assert (PAGE.parent / "figures" / drawn.name).exists()


def test_the_recorded_runs_had_the_recorded_settings():
    for path in records.RESULTS.glob("*-runs.json"):
        runs = records.read(path)["losses"]
        name = path.name.removesuffix("-runs.json")
        for way in ("-float64", "-linear", "-class-parallel", "-swapped"):
            name = name.removesuffix(way)
        chosen = records.settings_of(path.with_name(f"{name}.json"), list(runs))
        assert {loss: of["settings"] for loss, of in runs.items()} == chosen, path.name


def test_where_nothing_was_recorded_no_number_stands(tmp_path):
    for kind in BLOCKS:
        expected = f"before\n<!-- {kind} omniglot -->\n{NOTHING}\n<!-- end -->\nafter\n"
        assert render(block(kind, "omniglot"), tmp_path, tmp_path / "figures") == expected
    assert not (tmp_path / "figures").exists()


def test_results_table(tmp_path):
    record = keep(tmp_path, "omniglot", {"CE": 0.5, "HS-LR": 0.6})
    text = render(block("results", "omniglot"), tmp_path, tmp_path)
    header, _, ce, hs_lr = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")
    ]
    assert header == ["loss", "hyper-parameters", "mAP, %", "rank-1, %", "mAP less CE's", "p"]
    scores = 100 * torch.tensor(record["losses"]["HS-LR"]["test"]["mAP"], dtype=torch.float64)
    assert hs_lr[2] == f"{scores.mean():.2f} ± {scores.std():.2f}"
    assert ce[4:] == ["", ""]
    difference = scores - 100 * torch.tensor(record["losses"]["CE"]["test"]["mAP"], dtype=torch.float64)
    assert hs_lr[4] == f"{difference.mean():+.2f}"
    assert float(hs_lr[5]) < 1e-4
    assert "`python -m bench.evidence.train --data omniglot --record`: 4 seeds, 3 epochs, cpu" in text


def test_three_ways_to_compute_one_training(tmp_path):
    def row():
        text = render(block("ways", "digits"), tmp_path, tmp_path)
        (row,) = [line for line in text.splitlines() if line.startswith("| CE")]
        return [cell.strip().split(" ± ")[0] for cell in row.strip("|").split("|")]

    keep(tmp_path, "digits", {"CE": 0.5, "LR": 0.4})
    keep(tmp_path, "digits-linear", {"CE": 0.51})
    assert row() == ["CE", "50.15", "51.15"]
    sharded = keep(tmp_path, "digits-class-parallel", {"CE": 0.515})
    assert row() == ["CE", "50.15", "51.15", "51.65", "5.0e-03"]  # the losses differ by as much as the means
    sharded["budget"]["seeds"] = [0, 1]
    (tmp_path / "digits-class-parallel-runs.json").write_text(json.dumps(sharded))
    assert row() == ["CE", "50.05", "51.05", "51.55", "5.0e-03"]
    keep(tmp_path, "digits-linear-float64", {"CE": 0.51})
    keep(tmp_path, "digits-class-parallel-float64", {"CE": 0.5100001})
    assert row() == ["CE", "50.05", "51.05", "51.55", "5.0e-03", "1.0e-07"]


def test_margins_and_shares(tmp_path):
    def rows(kind):
        lines = [line for line in render(block(kind, "digits"), tmp_path, tmp_path).splitlines() if line[0] == "|"]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[2] != "-"]

    keep(tmp_path, "digits", {"CE": 0.5, "LR": 0.4})  # the last of a curve: 0, 0.1, 0.2, 0.3, the mean 1.65 / 4 and up
    keep(tmp_path, "digits-1000", {"CE": 0.5, "LR": 0.4})
    assert rows("mechanisms")[1:] == [["CE", "0.150 ± 0.129", ""], ["LR", "", "45.00 ± 3.23"]]
    assert rows("shares") == [["easy classes' share, %", "1,000 classes"], ["LR", "45.00 ± 3.23"]]


def test_many_and_figures(tmp_path):
    keep(tmp_path, "digits", {"CE": 0.5, "CRL": 0.5, "LR": 0.4})
    for number in (10000, 1000):
        keep(tmp_path, f"digits-{number}", {"CE": 0.5, "LR": 1 / math.log(number), "HS-LR": 0.4})
    many = render(block("many", "digits"), tmp_path, tmp_path)
    assert many.index("1,000 classes") < many.index("10,000 classes")  # by number, not by name
    assert "0.25 ms" in many
    for kind in ("curves", "margins", "classes"):
        text = render(block(kind, "digits"), tmp_path, tmp_path / "figures")
        assert f"](figures/digits-{kind}.png)" in text
        png = (tmp_path / "figures" / f"digits-{kind}.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        render(block(kind, "digits"), tmp_path, tmp_path / "figures")
        assert (tmp_path / "figures" / f"digits-{kind}.png").read_bytes() == png


def test_the_easy_share_that_is_drawn_is_the_mean_over_training(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "line", lambda axes, name, x, values: drawn.setdefault(name, []).append((x, values)))
    monkeypatch.setattr(figures, "save", lambda figure, path: None)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes: None)
    sizes = {number: a_record(f"digits-{number}", {"CE": 0.5, "LR": 0.4}) for number in (100, 1000)}
    figures.against_classes(sizes, tmp_path / "x.png")
    assert len(drawn["CE"]) == 1  # it has a metric, and no easy share
    (x, _), (_, shares) = drawn["LR"]
    assert x == [100, 1000]
    expected = [100 * (0.9 + 0.5 + 0.25 + 0.1 * seed) / 4 for seed in range(SEEDS)]
    assert shares == [pytest.approx(expected)] * 2


def test_one_change_at_a_time(tmp_path):
    keep(tmp_path, "digits", {"CE": 0.5, "LR": 0.4, "HS-LR": 0.7})
    text = render(block("against", "digits"), tmp_path, tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| HS-LR")]
    assert "| LR " in row and "+30.0" in row
    assert text.count("\n| ") == 3  # the header, its line, and the only pair of which both took part


def test_very_many_labels(tmp_path):
    def entry(shift: float) -> dict:
        scores = [0.4 + shift + 0.01 * seed + 0.001 * (seed * seed % 3) for seed in range(SEEDS)]
        return {"settings": {"lr": 0.3}, "test": {"P@1": scores, "P@5": scores, "PSP@5": scores}, "step_ms": 35.4}

    record = a_record("extreme-50", {}) | {"losses": {"LR": entry(0), "HS-LR": entry(0.1)}}
    (tmp_path / "extreme-50.json").write_text(json.dumps(record))
    text = render(block("extreme", "extreme-50"), tmp_path, tmp_path)
    found = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| HS-LR")]
    assert found[0][6:8] == ["35", "+10.00"] and float(found[0][8]) < 0.01


def test_k_and_alpha(tmp_path):
    scores = {
        "HS-LR": {"k 3, alpha 1": {"0.1": [0.5, 0.7], "0.3": [0.8, 0.8]}},
        "SS-LR": {"alpha 0.1 (C - 1)": {"0.1": [0.9], "0.3": [0.1]}},
    }
    of = {"name": "digits-20", "classes": 20, "scores": scores}
    (tmp_path / "k-and-alpha.json").write_text(json.dumps({"data": {"digits-20": of}}))
    pairs = render(block("pairs", "digits-20"), tmp_path, tmp_path)
    assert "digits, 20 classes: k" in pairs and "80.0, lr 0.3" in pairs
    assert NOTHING in render(block("pairs", "digits-30"), tmp_path, tmp_path)
    assert "90.0, lr 0.1" in render(block("alphas", "k-and-alpha"), tmp_path, tmp_path)


def test_an_unknown_block_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no such block: <!-- guess omniglot -->"):
        render(block("guess", "omniglot"), tmp_path, tmp_path)


def two_sided(t: float) -> float:
    """The p-value of t on 3 degrees of freedom, in closed form."""
    angle = math.atan(abs(t) / math.sqrt(3))
    return 1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle))


def test_paired_is_the_t_test_with_holms_correction():
    base = [1.0, 2.0, 3.0, 4.0]
    scores = {"CE": base, "up": [1.5, 2.4, 3.6, 4.5], "noise": [2.0, 1.0, 4.0, 3.5], "same": base}
    found = paired(scores, "CE")
    assert list(found) == ["up", "noise", "same"]
    mean, p = found["up"]
    assert mean == pytest.approx(0.5)
    # differences 0.5, 0.4, 0.6, 0.5: standard deviation sqrt(0.02 / 3); "same" has no spread and cannot be compared
    assert p == pytest.approx(2 * two_sided(0.5 / (math.sqrt(0.02 / 3) / 2)))
    mean, p = found["noise"]  # differences 1, -1, 1, -0.5
    assert mean == pytest.approx(0.125)
    assert p == pytest.approx(two_sided(0.125 / (math.sqrt(3.1875 / 3) / 2)))
    assert math.isnan(found["same"][1])
    assert math.isnan(paired({"CE": [1.0], "LR": [2.0]}, "CE")["LR"][1])


def test_every_kind_of_work_has_its_place_on_the_page():
    page = PAGE.read_text()
    for name in (*train.DATA, *train.FOLDERS):
        for kind in ("results", "against") if name.endswith("-swapped") else ("tuning", "results", "curves"):
            assert f"<!-- {kind} {name} -->\n" in page


def test_costs(tmp_path):
    """Where every run got there: the steps until then, and their seconds."""
    record = keep(tmp_path, "many-50", {"CE": 0.9, "LR": 0.5})
    record["losses"]["CE"]["curves"]["validation"] = [[0.5, 0.96, 0.9], [0.96, 0.97, 0.98], [0.1, 0.95, 0.2]]
    record["losses"]["LR"]["curves"]["validation"] = [[0.5, 0.6, 0.94], [0.96, 0.97, 0.98], [0.1, 0.95, 0.2]]
    (tmp_path / "many-50-runs.json").write_text(json.dumps(record))
    assert NOTHING in render(block("costs", "many-50"), tmp_path, tmp_path)
    cost = {"ms": 50.0, "bytes": 3 * 2**20}
    costs = {"command": "a", "shape": "b", "versions": {"torch": "2"}, "steps_per_epoch": 12}
    (tmp_path / "many-50-costs.json").write_text(json.dumps(costs | {"losses": {"CE": cost, "LR": cost}}))
    text = render(block("costs", "many-50"), tmp_path, tmp_path)
    assert "| 50        | 3   | 24 " in text and "| 1.2 " in text and "2 of 3 runs" in text
