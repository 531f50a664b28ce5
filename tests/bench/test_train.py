"""bench.evidence.train on a budget of seconds: what it prints, draws and records, and which rows it reads."""

import dataclasses
import json
import math
import statistics
import subprocess
import sys

import pytest
import torch

import fused_losses as fl

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from tqdm import tqdm

from bench.evidence import records, train, tuning
from bench.evidence.contenders import SampledCrossEntropy, cases
from bench.evidence.data import Dataset, Split, padded
from bench.evidence.digits import digits
from bench.evidence.fit import Run, fit, pace
from bench.evidence.metrics import label_ranking, retrieval
from bench.evidence.networks import embedding, regularised_perceptron
from bench.evidence.tuning import TUNING_SEEDS

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
    assert record["budget"] == {"trials": 2, "seeds": list(TUNING_SEEDS), "epochs": 1}
    recorded, running = (version.partition("+")[0] for version in (record["versions"]["torch"], torch.__version__))
    assert recorded == running  # a wheel need not say its "+cu130"
    for case in cases(digits()):
        entry = record["losses"][case.name]
        assert set(entry["settings"]) == {"lr", "prior_bias", *case.space}
        assert len(entry["validation"]) == len(TUNING_SEEDS)
        assert 1e-3 <= entry["settings"]["lr"] <= 1


def test_tune_keeps_the_setting_with_the_best_validation_mean(monkeypatch):
    tried = []

    def scored(data, case, settings, seed, epochs, progress):
        score = 1 / (1 + abs(math.log(settings["lr"] / 0.03))) + 1e-3 * (seed % 2)
        tried.append((settings["lr"], seed, score))
        return Run(None, [], [], [0.0, score], 0.0, 0.0, {})

    monkeypatch.setattr(tuning, "fit", scored)
    best = tuning.tune(digits(), cases(digits())[0], 16, TUNING_SEEDS, 2, tqdm(disable=True))
    assert len(tried) == 16 * len(TUNING_SEEDS)
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
    data, settings = digits(), records.settings_of(tuned / "digits.json", ["CE"])["CE"]
    case = cases(data)[0]
    models = [fit(data, case, settings, seed, 1, tqdm(disable=True)).model for seed in range(3)]
    accuracy = [100 * (m(data.test.inputs).argmax(1) == data.test.target).double().mean().item() for m in models]
    assert row["test accuracy, %"] == f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}"


def test_a_step_is_the_plain_training_step():
    """Cutting the graph at the logits (to time the loss) changes nothing: a plain loop ends in equal weights."""
    data = digits()
    data = dataclasses.replace(data, train=Split(data.train.inputs[:70], data.train.target[:70]))
    case = next(case for case in cases(data) if case.name == "HS-LR")
    settings = {"lr": 0.1, "prior_bias": True, "alpha": 2.0, "k": 3}
    model = fit(data, case, settings, 7, 3, tqdm(disable=True)).model

    torch.manual_seed(7)
    classifier = torch.nn.Linear(128, 10)
    torch.nn.init.constant_(classifier.bias, -math.log(9))
    plain = torch.nn.Sequential(data.network(), classifier)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(3):
        for batch, rows in enumerate(torch.randperm(70).split(64)):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * pace(2 * epoch + batch, 6)
            loss = fl.hs_lr_loss(plain(data.train.inputs[rows]), data.train.target[rows], alpha=2.0, k=3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_learning_rate_warms_up_and_comes_to_rest():
    shares = [pace(step, 1000) for step in range(1000)]
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
    run = fit(data, cases(data)[0], settings, 0, 10, tqdm(disable=True))
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
    settings = records.settings_of(records.RESULTS / "digits.json", [case.name for case in cases(data)])
    for case in cases(data):
        assert set(settings[case.name]) == {"lr", "prior_bias", *case.space}


def characters() -> Dataset:
    """Noisy drawings of 12 identities, the last 4 of them never trained on."""
    generator = torch.Generator().manual_seed(0)
    looks = torch.rand(12, 1, 28, 28, generator=generator)
    target = torch.arange(12).repeat_interleave(8)
    images = looks[target] + 0.3 * torch.randn(96, 1, 28, 28, generator=generator)
    return Dataset(
        name="characters",
        train=Split(images[:64], target[:64]),
        validation=None,
        test=Split(images[64:], target[64:]),
        num_classes=8,
        network=lambda: embedding(16),
        features=16,
        metrics=retrieval,
        hardest=(1, 3),
        epochs=2,
        batch_size=16,
        seeds=2,
        trials=1,
        tuning_seeds=1,
        open_set=True,
    )


def keywords() -> Dataset:
    """Three of 30 words at a time, to be read off 20 numbers."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(200, 30).scatter_(1, torch.rand(200, 30, generator=generator).topk(3).indices, 1.0)
    inputs = target @ torch.randn(30, 20, generator=generator)
    splits = [Split(inputs[a:b], target[a:b]) for a, b in ((0, 120), (120, 160), (160, 200))]
    return Dataset(
        "keywords", *splits, num_classes=30, network=lambda: regularised_perceptron(20, 32, dropout=0.1), features=32,
        metrics=label_ranking, hardest=(1, 3, 10), epochs=2, batch_size=16, seeds=2, trials=2, tuning_seeds=1,
    )  # fmt: skip


def settings_for(data: Dataset, lr: float) -> dict[str, dict]:
    return {
        case.name: {name: axis.at(0.5) for name, axis in case.searched(data).items()} | {"lr": lr}
        for case in cases(data)
    }


def write_settings(folder, data: Dataset, lr: float):
    losses = {name: {"settings": settings} for name, settings in settings_for(data, lr).items()}
    (folder / f"{data.name}.json").write_text(json.dumps({"losses": losses}))


def test_unseen_identities_are_retrieved_after_training():
    data = characters()
    torch.manual_seed(0)
    untrained = data.metrics(torch.nn.Sequential(data.network().eval(), torch.nn.Identity()), data.test)
    for name in ("CE", "HS-LR"):
        case = next(case for case in cases(data) if case.name == name)
        run = fit(data, case, settings_for(data, 0.03)[name], 0, 8, tqdm(disable=True))
        assert run.validation == []
        assert data.metrics(run.model, data.test)["mAP"] > max(0.6, untrained["mAP"] + 0.05)


def test_multi_hot_targets_are_learned_by_the_logistic_losses():
    data = keywords()
    assert [case.name for case in cases(data)] == ["LR", "HS-LR", "SS-LR", "LR, k hardest", "SS-LR, k hardest"]
    chance = data.test.target.mean().item()
    for case in cases(data):
        run = fit(data, case, settings_for(data, 0.03)[case.name], 0, 20, tqdm(disable=True))
        scores = data.metrics(run.model, data.test)
        assert min(scores.values()) > 2 * chance, case.name


@pytest.mark.parametrize(
    "data", [digits(), padded(digits(), 1000), characters(), keywords()], ids=lambda data: data.name
)
def test_the_linear_loss_trains_the_same_model(data):
    """Classifier and loss in one against logits and loss: other sums, so other last bits, but one training."""

    def moved(run):
        torch.manual_seed(3)
        start = torch.nn.Linear(data.features, data.num_classes).weight
        return run.model[1].weight.detach() - start.detach()

    for case in cases(data):
        if case.loss is SampledCrossEntropy:  # of no module of this package
            continue
        settings = settings_for(data, 0.01)[case.name]
        logits, linear = (fit(data, case, settings, 3, 2, tqdm(disable=True), linear) for linear in (False, True))
        assert linear.train_loss == pytest.approx(logits.train_loss, rel=1e-4)
        far = moved(logits).norm()
        assert far > 0.01
        assert (moved(linear) - moved(logits)).norm() < 1e-3 * far


def test_runs_are_recorded_by_seed_and_merged_by_loss(tmp_path, monkeypatch, capsys):
    data = characters()
    monkeypatch.setitem(train.FOLDERS, "omniglot", lambda root, hold_out: data)
    write_settings(tmp_path, data, 0.03)
    command = ["--data", "omniglot", "--root", "x", "--record", "--results", str(tmp_path), "--output", str(tmp_path)]
    train.main([*command, "--losses", "HS-LR"])
    train.main([*command, "--losses", "CE"])
    record = json.loads((tmp_path / "characters-runs.json").read_text())
    assert list(record["losses"]) == ["CE", "HS-LR"]  # in the order of the table, not of the runs
    assert record["budget"] == {"seeds": [0, 1], "epochs": 2, "device": "cpu"}
    assert record["command"] == "python -m bench.evidence.train --data omniglot --root DIR --record"
    case = cases(data)[0]
    for seed, score in enumerate(record["losses"]["CE"]["test"]["mAP"]):
        run = fit(data, case, record["losses"]["CE"]["settings"], seed, 2, tqdm(disable=True))
        assert score == data.metrics(run.model, data.test)["mAP"]  # the probe did not disturb the training
    curves = record["losses"]["HS-LR"]["curves"]
    assert {name: [len(run) for run in runs] for name, runs in curves.items()} == {
        "train_loss": [2, 2],
        "easy share": [3, 3],
    }
    assert "margin" in record["losses"]["CE"]["curves"]
    with pytest.raises(SystemExit, match=r"characters-runs.json holds HS-LR with another budget"):
        train.main([*command, "--losses", "CE", "--epochs", "1"])
    assert "rank-1" in capsys.readouterr().out


def test_the_final_training_holds_nothing_out(tmp_path, monkeypatch):
    asked = []

    def loader(root, hold_out):
        asked.append(hold_out)
        return keywords()

    monkeypatch.setitem(train.FOLDERS, "corel5k", loader)
    command = ["--data", "corel5k", "--root", "x", "--losses", "LR", "--epochs", "1"]
    train.main([*command, "--tune", "--results", str(tmp_path)])
    train.main([*command, "--results", str(tmp_path), "--output", str(tmp_path)])
    assert asked == [True, False]


def test_tuning_one_loss_leaves_the_others_of_the_record(tmp_path):
    command = ["--tune", "--trials", "1", "--epochs", "1", "--tuning-seeds", "1", "--results", str(tmp_path)]
    train.main([*command, "--losses", "CRL"])
    first = json.loads((tmp_path / "digits.json").read_text())["losses"]["CRL"]
    train.main([*command, "--losses", "CE"])
    record = json.loads((tmp_path / "digits.json").read_text())
    assert list(record["losses"]) == ["CE", "CRL"]
    assert record["losses"]["CRL"] == first
    with pytest.raises(SystemExit, match="holds CRL with another budget"):
        train.main([*command, "--losses", "CE", "--trials", "2"])
    assert json.loads((tmp_path / "digits.json").read_text()) == record


def test_many_classes_are_tuned_and_trained_apart(tmp_path, capsys):
    command = ["--many-classes", "40", "200", "--losses", "CE", "HS-LR", "--epochs", "1", "--results", str(tmp_path)]
    train.main([*command, "--tune", "--trials", "1"])
    train.main([*command, "--record", "--seeds", "2", "--output", str(tmp_path)])
    for number in (40, 200):
        record = json.loads((tmp_path / f"digits-{number}-runs.json").read_text())
        assert record["command"] == f"python -m bench.evidence.train --data digits --many-classes {number} --record"
        assert list(record["losses"]) == ["CE", "HS-LR"]
    assert "digits-200: 2 seeds" in capsys.readouterr().out


def test_settings_of_another_set(tmp_path, monkeypatch, capsys):
    data = dataclasses.replace(digits(), name="digits-swapped", settings_of="digits", epochs=1)
    monkeypatch.setitem(train.DATA, "digits", lambda: data)
    write_settings(tmp_path, digits(), 0.05)
    folders = ["--results", str(tmp_path), "--output", str(tmp_path)]
    train.main(["--losses", "CE", "--seeds", "1", "--record", *folders])
    assert json.loads((tmp_path / "digits-swapped-runs.json").read_text())["losses"]["CE"]["settings"]["lr"] == 0.05
    with pytest.raises(SystemExit):
        train.main(["--tune", *folders])
    assert "--tune: digits-swapped takes the settings of digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "omniglot"], "omniglot needs --root"),
        (["--data", "omniglot", "--root", "nowhere"], "images_background_small1.zip is missing"),
        (["--data", "corel5k", "--root", "nowhere"], "Corel5k-train-sparse.arff is missing"),
        (["--root", "somewhere"], "takes no --root"),
        (["--many-classes", "5"], "digits cannot be padded to 5 classes"),
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--linear", "--tune"], "--linear"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert message in capsys.readouterr().err


def test_sharded_over_processes_the_training_is_the_same(tmp_path):
    """torchrun and --class-parallel against --linear in one process, through the command line."""
    write_settings(tmp_path, digits(), 0.05)
    losses = ["--losses", "CE", "CRL", "HS-LR", "SS-LR"]
    asked = ["-m", "bench.evidence.train", "--record", "--seeds", "1", "--epochs", "5", *losses]
    folders = ["--results", str(tmp_path), "--output", str(tmp_path)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]  # 10 classes: 4, 4 and 2
    asked += ["--dtype", "float64"]
    for command in ([*asked, "--linear"], [*torchrun, *asked, "--class-parallel"]):
        done = subprocess.run([sys.executable, *command, *folders], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1  # one rank tells
    one, sharded = (
        json.loads((tmp_path / f"digits-{way}-float64-runs.json").read_text()) for way in ("linear", "class-parallel")
    )
    assert (
        sharded["command"]
        == "torchrun --nproc-per-node 3 -m bench.evidence.train --data digits --class-parallel --dtype float64 --record"
    )
    for loss, of in one["losses"].items():
        assert len(of["first_losses"][0]) == 50
        assert sharded["losses"][loss]["first_losses"][0] == pytest.approx(of["first_losses"][0], abs=1e-7)
        assert sharded["losses"][loss]["test"]["accuracy"] == of["test"]["accuracy"]


def test_class_parallel_without_torchrun_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        train.main(["--class-parallel"])
    assert "torchrun" in capsys.readouterr().err
