"""bench.train on a budget of seconds: what it prints, draws and records, and which rows it reads."""

import dataclasses
import json
import math
import statistics

import pytest
import torch

import fused_losses as fl

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from bench import train
from bench.data import Split, digits

LOSSES = ["CE", "NLLR", "CRL", "LR", "HS-LR", "SS-LR", "CE, k hardest", "CRL, k hardest"]


class Unreadable(torch.Tensor):
    """May be moved to a device; whatever else is done with it fails the test."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            return args[0]
        raise AssertionError("the test split was read")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a record for every loss, from a tuning whose data set has no test split to read."""
    folder = tmp_path_factory.mktemp("results")

    def blind():
        data = digits()
        return dataclasses.replace(data, test=Split(*(tensor.as_subclass(Unreadable) for tensor in data.test)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.DATA, "digits", blind)
        train.main(["--tune", "--trials", "2", "--epochs", "1", "--results", str(folder)])
    return folder


def read_table(text: str) -> dict[str, dict[str, str]]:
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_splits_are_disjoint_balanced_and_the_same_every_time():
    data = digits()
    rows = [tuple(image.tolist()) for split in (data.train, data.validation, data.test) for image in split.inputs]
    assert [len(split.target) for split in (data.train, data.validation, data.test)] == [718, 360, 719]
    assert len(set(rows)) == 1797  # no two of the images are equal, so none stands in two splits
    for split in (data.train, data.validation, data.test):
        assert split.target.bincount(minlength=10).min() >= len(split.target) // 11
    again = digits()
    assert torch.equal(again.test.inputs, data.test.inputs)
    assert torch.equal(again.train.target, data.train.target)


def test_tune_records_settings_budget_and_versions(tuned):
    record = json.loads((tuned / "digits.json").read_text())
    assert list(record["losses"]) == LOSSES
    assert record["budget"] == {"trials": 2, "seeds": list(train.TUNING_SEEDS), "epochs": 1}
    assert record["versions"]["torch"] == torch.__version__
    for case in train.cases(digits()):
        entry = record["losses"][case.name]
        assert set(entry["settings"]) == {"lr", "prior_bias", *case.space}
        assert len(entry["validation"]) == len(train.TUNING_SEEDS)
        assert 1e-3 <= entry["settings"]["lr"] <= 1


def test_tune_keeps_the_setting_with_the_best_validation_mean(monkeypatch):
    tried = []

    def scored(data, case, settings, seed, epochs, progress):
        score = 1 / (1 + abs(math.log(settings["lr"] / 0.03))) + 1e-3 * (seed % 2)
        tried.append((settings["lr"], seed, score))
        return train.Run(None, [], [0.0, score], 0.0, 0.0)

    monkeypatch.setattr(train, "fit", scored)
    record = train.tune(digits(), train.cases(digits())[:1], trials=16, epochs=2)
    best = record["losses"]["CE"]
    assert len(tried) == 16 * len(train.TUNING_SEEDS)
    assert len({lr for lr, *_ in tried}) == 16
    assert best["settings"]["lr"] == min((lr for lr, *_ in tried), key=lambda lr: abs(math.log(lr / 0.03)))
    assert best["validation"] == [score for lr, _, score in tried if lr == best["settings"]["lr"]]


def test_report_prints_the_table_and_names_the_curves(tuned, tmp_path, capsys):
    train.main(["--seeds", "2", "--epochs", "2", "--results", str(tuned), "--output", str(tmp_path / "curves")])
    printed = capsys.readouterr().out
    rows = read_table(printed)
    assert list(rows) == LOSSES
    for row in rows.values():
        mean, deviation = map(float, row["test accuracy, %"].split(" ± "))
        assert 0 <= mean <= 100
        assert 0 <= deviation <= 71  # of two values in [0, 100]
        assert 0 < float(row["loss, ms/step"]) < float(row["whole step, ms"])
    png = tmp_path / "curves" / "digits.png"
    assert f"curves: {png}" in printed
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_table_holds_the_test_accuracy_of_the_runs(tuned, tmp_path, capsys):
    train.main(["--losses", "CE", "--seeds", "3", "--epochs", "1", "--results", str(tuned), "--output", str(tmp_path)])
    row = read_table(capsys.readouterr().out)["CE"]
    data, settings = digits(), train.recorded(tuned / "digits.json", [])["losses"]["CE"]["settings"]
    case = train.cases(data)[0]
    models = [train.fit(data, case, settings, seed, 1, train.tqdm(disable=True)).model for seed in range(3)]
    accuracy = [100 * (m(data.test.inputs).argmax(1) == data.test.target).double().mean().item() for m in models]
    assert row["test accuracy, %"] == f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}"


def test_a_step_is_the_plain_training_step():
    """Cutting the graph at the logits (to time the loss) changes nothing: a plain loop ends in equal weights."""
    data = digits()
    data = dataclasses.replace(data, train=Split(data.train.inputs[:70], data.train.target[:70]))
    case = next(case for case in train.cases(data) if case.name == "HS-LR")
    settings = {"lr": 0.1, "prior_bias": True, "alpha": 2.0, "k": 3}
    model = train.fit(data, case, settings, 7, 3, train.tqdm(disable=True)).model

    torch.manual_seed(7)
    classifier = torch.nn.Linear(128, 10)
    torch.nn.init.constant_(classifier.bias, -math.log(9))
    plain = torch.nn.Sequential(data.network(), classifier)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(3):
        for batch, rows in enumerate(torch.randperm(70).split(64)):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * train.pace(2 * epoch + batch, 6)
            loss = fl.hs_lr_loss(plain(data.train.inputs[rows]), data.train.target[rows], alpha=2.0, k=3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_learning_rate_warms_up_and_comes_to_rest():
    shares = [train.pace(step, 1000) for step in range(1000)]
    top = shares.index(max(shares))
    assert shares[0] == 0.02
    assert 45 <= top <= 55
    assert shares[top] > 0.99
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] < 1e-5


def test_the_network_learns():
    data = digits()
    settings = {"lr": 0.1, "prior_bias": False}
    run = train.fit(data, train.cases(data)[0], settings, 0, 10, train.tqdm(disable=True))
    assert run.validation[-1] > 0.9
    assert run.train_loss[-1] < 0.2 * run.train_loss[0]
    assert len(run.validation) == len(run.train_loss) == 10


def test_without_a_record_the_command_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"no hyper-parameters for CE, NLLR.*run with --tune first"):
        train.main(["--results", str(tmp_path)])


def test_unknown_loss_is_named(capsys):
    with pytest.raises(SystemExit):
        train.main(["--losses", "focal"])
    assert "'focal'" in capsys.readouterr().err


def test_the_recorded_hyper_parameters_cover_every_loss():
    data = digits()
    record = train.recorded(train.RESULTS / "digits.json", train.cases(data))
    for case in train.cases(data):
        assert set(record["losses"][case.name]["settings"]) == {"lr", "prior_bias", *case.space}
