"""Train the same small network with each loss on the same schedule, and print what comes of it.

    python -m bench.train                 table and curves, with the recorded hyper-parameters
    python -m bench.train --tune          choose the hyper-parameters on the validation split and record them

Every loss is given the same network, initial weights, batches, optimiser, schedule and number of tuning trials. The
test split is read once at the end of each run of the first form, and not at all by the second.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fused_losses as fl
from bench import data as datasets
from bench.data import Dataset

DATA = {"digits": datasets.digits}
RESULTS = Path(__file__).parent / "results"
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
TUNING_SEEDS = (100, 101, 102, 103, 104)  # apart from the seeds 0, 1, ... of the reported runs


@dataclass(frozen=True)
class LogRange:
    low: float
    high: float

    def at(self, u: float) -> float:
        """The value at u in [0, 1), to two digits: what is recorded is what was run."""
        return float(f"{self.low * (self.high / self.low) ** u:.2g}")


@dataclass(frozen=True)
class Choice:
    options: tuple

    def at(self, u: float):
        return self.options[int(u * len(self.options))]


# The prior bias, -log(C - 1), starts the classifier at probability 1/C for every class. It moves all logits alike, so a
# softmax loss does not feel it; LR is spared unlearning C - 1 negatives per row. Every loss may choose.
SHARED_SPACE = {"lr": LogRange(1e-3, 1.0), "prior_bias": Choice((False, True))}


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable[..., Tensor]
    space: dict[str, LogRange | Choice] = field(default_factory=dict)  # keyword arguments of the loss


def cases(data: Dataset) -> list[Case]:
    k = Choice(data.hardest)
    crl = {"alpha": LogRange(0.3, 10.0), "beta": LogRange(0.1, 3.0)}
    alpha = LogRange(0.3, 30.0)
    return [
        Case("CE", fl.cross_entropy),
        Case("NLLR", fl.nllr_loss),
        Case("CRL", fl.crl_loss, crl),
        Case("LR", fl.lr_loss),
        Case("HS-LR", fl.hs_lr_loss, {"alpha": alpha, "k": k}),
        Case("SS-LR", fl.ss_lr_loss, {"alpha": alpha, "gamma": LogRange(0.3, 5.0)}),
        Case("CE, k hardest", fl.cross_entropy, {"k": k}),
        Case("CRL, k hardest", fl.crl_loss, {**crl, "k": k}),
    ]


@dataclass
class Run:
    model: nn.Module
    train_loss: list[float]  # mean over the rows of each epoch
    validation: list[float]  # the first metric after each epoch
    loss_ms: float  # median over the steps: the loss, forward and backward
    step_ms: float  # median over the steps: network, loss and optimiser


def pace(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up in a straight line for the first twentieth, down along a cosine."""
    return min(20 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2)


def fit(data: Dataset, case: Case, settings: dict, seed: int, epochs: int, progress: tqdm) -> Run:
    device = data.train.inputs.device
    arguments = {name: settings[name] for name in case.space}
    torch.manual_seed(seed)
    classifier = nn.Linear(data.features, data.num_classes)
    nn.init.constant_(classifier.bias, -math.log(data.num_classes - 1) if settings["prior_bias"] else 0.0)
    model = nn.Sequential(data.network(), classifier).to(device)
    optimizer = torch.optim.SGD(model.parameters(), settings["lr"], MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = epochs * math.ceil(len(data.train.target) / data.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))

    def clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    train_loss, validation, loss_s, step_s = [], [], [], []
    for _ in range(epochs):
        total = 0.0
        order = torch.randperm(len(data.train.target)).to(device)  # drawn on the CPU: the same batches on every device
        for rows in order.split(data.batch_size):
            started = clock()
            logits = model(data.train.inputs[rows])  # (rows, classes)
            leaf = logits.detach().requires_grad_()  # the graph is cut here so that the loss can be timed alone
            before_loss = clock()
            loss = case.loss(leaf, data.train.target[rows], **arguments)
            loss.backward()
            after_loss = clock()
            optimizer.zero_grad()
            logits.backward(leaf.grad)
            optimizer.step()
            schedule.step()
            step_s.append(clock() - started)
            loss_s.append(after_loss - before_loss)
            total += loss.item() * len(rows)
        train_loss.append(total / len(order))
        model.eval()
        validation.append(next(iter(data.metrics(model, data.validation).values())))
        model.train()
        progress.update()
    return Run(model.eval(), train_loss, validation, 1e3 * statistics.median(loss_s), 1e3 * statistics.median(step_s))


def versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def tune(data: Dataset, chosen: list[Case], trials: int, epochs: int) -> dict:
    """The best of `trials` settings for each loss, by the mean of the first metric on the validation split."""
    record = {
        "data": data.name,
        "command": f"python -m bench.train --data {data.name} --tune",
        "versions": versions(),
        "budget": {"trials": trials, "seeds": list(TUNING_SEEDS), "epochs": epochs},
        "losses": {},
    }
    with tqdm(total=len(chosen) * trials * len(TUNING_SEEDS) * epochs, unit="epoch") as progress:
        for case in chosen:
            progress.set_description(case.name)
            space = SHARED_SPACE | case.space
            # Sobol points cover a space of one to four settings more evenly than as many random draws.
            points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(trials).tolist()
            best = None
            for point in points:
                settings = {name: axis.at(u) for (name, axis), u in zip(space.items(), point, strict=True)}
                scores = [fit(data, case, settings, s, epochs, progress).validation[-1] for s in TUNING_SEEDS]
                if best is None or statistics.mean(scores) > statistics.mean(best["validation"]):
                    best = {"settings": settings, "validation": scores}
            record["losses"][case.name] = best | {"space": {name: vars(axis) for name, axis in space.items()}}
    return record


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float], form: str = ".2f") -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values) if len(values) > 1 else math.nan:{form}}"


def spell(settings: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if name != "prior_bias") + (
        ", prior bias" if settings["prior_bias"] else ""
    )


def draw(runs: dict[str, list[Run]], data: Dataset, path: Path) -> None:
    """Validation error and training loss against epochs; lines are means over seeds, bands run from worst to best."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    error_axes, loss_axes = figure.subplots(1, 2)
    for number, (name, repeats) in enumerate(runs.items()):
        style = {"color": f"C{number}", "linestyle": "--" if "hardest" in name else "-", "label": name}
        error = 100 - 100 * torch.tensor([run.validation for run in repeats])  # (seeds, epochs)
        epochs = range(1, error.shape[1] + 1)
        error_axes.plot(epochs, error.mean(0), **style)
        error_axes.fill_between(epochs, error.amin(0), error.amax(0), color=style["color"], alpha=0.1)
        loss_axes.plot(epochs, torch.tensor([run.train_loss for run in repeats]).mean(0), **style)
    error_axes.set(title=f"{data.name}: validation error, %", xlabel="epoch", yscale="log")
    loss_axes.set(title="training loss, each in its own unit", xlabel="epoch")
    loss_axes.set_yscale("symlog", linthresh=0.1)
    loss_axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report(data: Dataset, chosen: list[Case], record: dict, seeds: int, epochs: int, output: Path) -> None:
    runs, scores, rows = {}, {}, []
    with tqdm(total=len(chosen) * seeds * epochs, unit="epoch") as progress:
        for case in chosen:
            progress.set_description(case.name)
            settings = record["losses"][case.name]["settings"]
            runs[case.name] = [fit(data, case, settings, seed, epochs, progress) for seed in range(seeds)]
            scores[case.name] = [data.metrics(run.model, data.test) for run in runs[case.name]]
    for case in chosen:
        loss_ms, step_ms = (statistics.median(getattr(r, ms) for r in runs[case.name]) for ms in ("loss_ms", "step_ms"))
        by_metric = [spread([100 * score[metric] for score in scores[case.name]]) for metric in scores[case.name][0]]
        settings = record["losses"][case.name]["settings"]
        rows.append([case.name, spell(settings), *by_metric, f"{loss_ms:.3f}", f"{step_ms:.3f}"])
    metrics = [f"test {metric}, %" for metric in next(iter(scores.values()))[0]]
    print(f"\n{data.name}: {seeds} seeds, mean ± standard deviation; hyper-parameters chosen on the validation split\n")
    print(table(["loss", "hyper-parameters", *metrics, "loss, ms/step", "whole step, ms"], rows))
    figure = output / f"{data.name}.png"
    draw(runs, data, figure)
    print(f"\ncurves: {figure}")


def recorded(path: Path, chosen: list[Case]) -> dict:
    record = json.loads(path.read_text()) if path.exists() else {"losses": {}}
    missing = [case.name for case in chosen if case.name not in record["losses"]]
    if missing:
        raise SystemExit(f"{path} has no hyper-parameters for {', '.join(missing)}: run with --tune first")
    return record


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--tune", action="store_true", help="choose the hyper-parameters, record them and stop")
    parser.add_argument("--trials", type=int, default=32, help="settings tried per loss with --tune (default 32)")
    parser.add_argument("--seeds", type=int, default=5, help="runs per loss (default 5)")
    parser.add_argument("--epochs", type=int, help="default: what the data set asks for")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="rows of the table to run (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small networks gain nothing from more")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded hyper-parameters")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the curves (default out)")
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    data = DATA[options.data]().to(options.device)
    epochs = options.epochs or data.epochs
    known = {case.name: case for case in cases(data)}
    for name in options.losses or ():
        if name not in known:
            parser.error(f"argument --losses: invalid choice: {name!r} (choose from {', '.join(known)})")
    chosen = [known[name] for name in options.losses or known]
    path = options.results / f"{data.name}.json"
    if options.tune:
        record = tune(data, chosen, options.trials, epochs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        rows = [
            [name, spell(best["settings"]), spread([100 * score for score in best["validation"]])]
            for name, best in record["losses"].items()
        ]
        print(f"\nbest of {options.trials} settings by the validation split\n")
        print(table(["loss", "hyper-parameters", "validation, %"], rows))
        print(f"\nrecorded: {path}")
    else:
        report(data, chosen, recorded(path, chosen), options.seeds, epochs, options.output)


if __name__ == "__main__":
    main()
