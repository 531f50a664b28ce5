"""Where each loss trains: accuracy against the learning rate, with plain and with cosine logits.

    python -m bench.evidence.sweep          the digits among 1,000 classes, kept in bench/results/sweep.json

Accuracy is that of the validation split after the last epoch; nothing is chosen by it but the advice of
docs/choosing.md. `python -m bench.charts sweep` draws it.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import fused_losses as fl
from bench.evidence import records
from bench.evidence.data import Dataset, padded
from bench.evidence.digits import digits
from bench.evidence.fit import MOMENTUM, WEIGHT_DECAY, pace
from bench.evidence.metrics import accuracy
from bench.evidence.tables import table

CLASSES, K = 1_000, 30
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LOSSES = {
    "CE": lambda: fl.CrossEntropyLoss(), f"CE, k = {K}": lambda: fl.CrossEntropyLoss(k=K), "CRL": lambda: fl.CRLLoss(),
    "LR": lambda: fl.LRLoss(), f"HS-LR, k = {K}": lambda: fl.HSLRLoss(k=K), "SS-LR": lambda: fl.SSLRLoss(),
    f"SS-LR, k = {K}": lambda: fl.SSLRLoss(k=K),
}  # fmt: skip
HEADS = {
    "linear, bias -log(C - 1)": {"bias": True},
    "cosine, scale 16": {"normalize": True, "scale": 16.0},
    "cosine, scale 16, logit_bias": {"normalize": True, "scale": 16.0, "logit_bias": True},
}


def train(data: Dataset, loss: fl.modules.RowLoss, head: dict, rate: float, seed: int, epochs: int) -> float:
    """The accuracy that comes of it; the schedule of fit.py."""
    torch.manual_seed(seed)
    network = data.network()
    classifier = fl.LinearLoss(data.features, data.num_classes, loss=loss, **head)
    if head.get("bias"):
        nn.init.constant_(classifier.bias, -math.log(data.num_classes - 1))
    parameters = [*network.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = epochs * math.ceil(len(data.train.target) / data.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train.target)).split(data.batch_size):
            optimizer.zero_grad()
            classifier(network(data.train.inputs[rows]), data.train.target[rows]).backward()
            optimizer.step()
            schedule.step()
    return accuracy(lambda inputs: classifier.logits(network(inputs)), data.validation)["accuracy"]


def summary(record: dict) -> str:
    """For docs/choosing.md: the best accuracy of each loss, and the learning rates within two points of it."""
    heads, rates = record["validation accuracy"], record["rates"]
    rows = []
    for name in next(iter(heads.values())):
        row = [name]
        for losses in heads.values():
            mean = [100 * sum(of_rate) / len(of_rate) for of_rate in losses[name]]
            near = [rate for rate, score in zip(rates, mean, strict=True) if score >= max(mean) - 2]
            span = f"{near[0]:g}" if len(near) == 1 else f"{near[0]:g} to {near[-1]:g}"
            row.append(f"{max(mean):.1f} %, {span}")
        rows.append(row)
    return table(["loss", *heads], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each setting (default 2)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--results", type=Path, default=records.RESULTS / "sweep.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = padded(digits(), CLASSES)
    found: dict[str, dict[str, list[list[float]]]] = {}
    with tqdm(total=len(HEADS) * len(LOSSES) * len(options.rates) * options.seeds) as progress:
        for head_name, head in HEADS.items():
            for name, loss in LOSSES.items():
                of_rates = []
                for rate in options.rates:
                    seeds = range(100, 100 + options.seeds)  # those of the tuning, not of the reported runs
                    of_rates.append([round(train(data, loss(), head, rate, s, options.epochs), 4) for s in seeds])
                    progress.update(options.seeds)
                found.setdefault(head_name, {})[name] = of_rates
    head = {"command": "python -m bench.evidence.sweep", "versions": records.versions(), "data": data.name}
    head |= {"epochs": options.epochs, "rates": list(options.rates)}
    options.results.write_text(json.dumps(head | {"validation accuracy": found}) + "\n")
    print(f"{summary(json.loads(options.results.read_text()))}\n\nrecorded: {options.results}")


if __name__ == "__main__":
    main()
