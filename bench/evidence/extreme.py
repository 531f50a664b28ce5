"""Extreme multi-label classification on made rows: frequencies of labels after Zipf, topics, five labels a row.

    python -m bench.evidence.extreme                     50,000 labels: table
    python -m bench.evidence.extreme --labels 500000 --rates-of 50000    with the learning rates chosen there
    python -m bench.evidence.extreme --record            keep what the runs gave, for python -m bench.evidence

Public sets of this kind are no files that one may pass on; this one is made from a seed. Topic t has the weight
1 / (t + 1), the r-th label of a topic 1 / (r + 1); a row has one topic and five different labels of it. Its features
are the mean of its labels' vectors (the topic's and one of the label's own) and noise. So a few labels are everywhere,
most have a handful of rows or none, and the labels that are hard to tell apart are those of one topic.

Metrics: precision at 1 and 5, and propensity-scored precision at 5 (Jain, Prabhu, Varma, KDD 2016, section 4, with
A = 0.55, B = 1.5), which counts a rare label for more. Each loss chooses its learning rate among five on the validation
split (sums over the labels among five that are a tenth of the others'), and its reported runs have other seeds.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused_losses as fl
from bench.evidence import networks, records
from bench.evidence.fit import MOMENTUM, pace
from bench.evidence.tables import spread, table
from bench.evidence.tuning import TUNING_SEEDS

FEATURES, HIDDEN = 128, 128
LABELS_OF_A_ROW = 5
NOISE = 0.3
BATCH = 256
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)  # a tenth of them for sums over the labels
SIZES = {"train": 40_000, "validation": 2_000, "test": 5_000}


@dataclass(frozen=True)
class Rows:
    inputs: Tensor  # (rows, features)
    labels: Tensor  # (rows, 5)


def make(num_labels: int, sizes: dict[str, int] = SIZES) -> dict[str, Rows]:
    generator = torch.Generator().manual_seed(0)
    topics = max(LABELS_OF_A_ROW, math.isqrt(num_labels))
    ranks = num_labels // topics  # labels of a topic: t, t + topics, t + 2 topics, ...
    of_topic = torch.randn(topics, FEATURES, generator=generator)
    of_label = torch.randn(topics * ranks, FEATURES, generator=generator)
    rows = sum(sizes.values())
    topic = torch.multinomial(1 / torch.arange(1.0, topics + 1), rows, replacement=True, generator=generator)
    # the five largest of log weight + Gumbel noise are a draw without replacement
    gumbel = -torch.empty(rows, ranks).exponential_(generator=generator).log()
    rank = (gumbel - torch.arange(1.0, ranks + 1).log()).topk(LABELS_OF_A_ROW, dim=1).indices
    labels = topic[:, None] + topics * rank
    noise = NOISE * torch.randn(rows, FEATURES, generator=generator)
    inputs = of_topic[topic] + of_label[labels].mean(1) + noise
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    return {
        name: Rows(inputs[end - size : end], labels[end - size : end])
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


# --- metrics ----------------------------------------------------------------------------------------------------------


def propensity(labels: Tensor, num_labels: int) -> Tensor:
    """(num_labels,): the chance that a label which applies was noted, from how often it was."""
    times = torch.bincount(labels.flatten(), minlength=num_labels).double()
    constant = (math.log(len(labels)) - 1) * (1.5 + 1) ** 0.55
    return 1 / (1 + constant * (-0.55 * (times + 1.5).log()).exp())


def precision(found: Tensor, labels: Tensor, scores: Tensor) -> dict[str, float]:
    """found: (rows, 5) labels, best first; scores: the propensities."""
    right = (found[:, :, None] == labels[:, None, :]).any(2)  # (rows, 5)
    gained = (right / scores[found.clamp(max=len(scores) - 1)]).sum()  # a model that is NaN names no label
    most = (1 / scores[labels]).sum()  # a row has as many labels as are counted
    return {
        "P@1": right[:, 0].double().mean().item(),
        "P@5": right.double().mean().item(),
        "PSP@5": (gained / most).item(),
    }


# --- contenders -------------------------------------------------------------------------------------------------------


def asymmetric_loss(logits: Tensor, index: Tensor) -> Tensor:
    """ASL with its authors' settings for many labels (Ridnik et al., ICCV 2021, arXiv 2009.14119, section 2.3)."""
    p = logits.sigmoid()
    q = (p - 0.05).clamp(min=0)
    losses = -(q**4) * (1 - q).clamp(min=1e-8).log()
    p_of = p.gather(1, index)
    positives = -(1 - p_of) * p_of.clamp(min=1e-8).log()
    return losses.scatter(1, index, positives).sum(1).mean()


class Asymmetric(fl.LinearLoss):
    """ASL of all logits, all held; compiled where they are many, which takes a quarter of the time."""

    def forward(self, input: Tensor, target: fl.Labels) -> Tensor:
        loss = compiled_asymmetric_loss() if len(self.weight) > 10_000 else asymmetric_loss
        return loss(F.linear(input, self.weight, self.bias), target.index)


@functools.cache
def compiled_asymmetric_loss() -> Callable[[Tensor, Tensor], Tensor]:
    """Made when it is needed: the compiler takes a second to import."""
    return torch.compile(asymmetric_loss, dynamic=False)


def ours(loss: Callable[[], nn.Module]) -> Callable[[int], fl.LinearLoss]:
    return lambda num_labels: fl.LinearLoss(HIDDEN, num_labels, loss=loss(), bias=True)


K = 100
CONTENDERS: dict[str, Callable[[int], fl.LinearLoss]] = {
    "LR (binary cross-entropy)": ours(fl.LRLoss),
    "ASL": lambda num_labels: Asymmetric(HIDDEN, num_labels, bias=True),
    "CE over labels": ours(fl.CrossEntropyLoss),
    "LR, k hardest": ours(lambda: fl.LRLoss(k=K)),
    "HS-LR": ours(lambda: fl.HSLRLoss(k=K, alpha=10.0)),
    "SS-LR, k hardest": ours(lambda: fl.SSLRLoss(k=K, alpha=10.0)),
    "CE over labels, k hardest": ours(lambda: fl.CrossEntropyLoss(k=K)),
}


SUMS = ("LR (binary cross-entropy)", "ASL", "LR, k hardest")


def rates_of(name: str) -> tuple[float, ...]:
    return tuple(rate / 10 for rate in LEARNING_RATES) if name in SUMS else LEARNING_RATES


# --- runs -------------------------------------------------------------------------------------------------------------


def train(
    rows: Rows, num_labels: int, make_head: Callable[[int], fl.LinearLoss], learning_rate: float, seed: int,
    epochs: int, progress: tqdm,
) -> tuple[nn.Module, fl.LinearLoss, float]:  # fmt: skip
    """Network, head and the median milliseconds of a step."""
    torch.manual_seed(seed)
    network, head = networks.perceptron(FEATURES, HIDDEN), make_head(num_labels)
    nn.init.constant_(head.bias, -math.log(num_labels / LABELS_OF_A_ROW - 1))  # every label as often as the mean one
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], learning_rate, MOMENTUM, nesterov=True)
    steps = epochs * math.ceil(len(rows.labels) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    softmax = isinstance(head.loss, fl.CrossEntropyLoss) and not isinstance(head, Asymmetric)
    seconds = []
    for _ in range(epochs):
        for batch in torch.randperm(len(rows.labels)).split(BATCH):
            started = time.perf_counter()
            index = rows.labels[batch]
            weight = torch.full(index.shape, 1 / LABELS_OF_A_ROW) if softmax else None
            optimizer.zero_grad()
            head(network(rows.inputs[batch]), fl.Labels(index, weight)).backward()
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - started)
            progress.update()
    return network.eval(), head, 1e3 * statistics.median(seconds)


@torch.no_grad()
def evaluate(network: nn.Module, head: fl.LinearLoss, rows: Rows, scores: Tensor) -> dict[str, float]:
    return precision(head.topk(network(rows.inputs), LABELS_OF_A_ROW).indices, rows.labels, scores)


def run(
    num_labels: int,
    names: list[str],
    seeds: int,
    epochs: int,
    rates: dict[str, float],
    keep: Callable[[str, dict], None],
) -> dict:
    """rates: by loss, those that were chosen elsewhere; else each chooses its own."""
    data = make(num_labels)
    scores = propensity(data["train"].labels, num_labels)
    found = {}
    steps = epochs * math.ceil(len(data["train"].labels) / BATCH)
    trials = 0 if rates else len(LEARNING_RATES)
    with tqdm(total=len(names) * (trials + seeds) * steps, unit="step") as progress:
        for name in names:
            progress.set_description(name)

            def at(rate: float, seed: int, name: str = name):
                return train(data["train"], num_labels, CONTENDERS[name], rate, seed, epochs, progress)

            tried = {
                rate: evaluate(*at(rate, TUNING_SEEDS[0])[:2], data["validation"], scores)["P@5"]
                for rate in ([] if rates else rates_of(name))
            }
            best = rates.get(name) or max(tried, key=tried.__getitem__)
            tested, milliseconds = [], []
            for seed in range(seeds):
                network, head, step_ms = at(best, seed)
                tested.append(evaluate(network, head, data["test"], scores))
                milliseconds.append(step_ms)
            found[name] = {
                "settings": {"lr": best},
                "validation": {str(rate): score for rate, score in tried.items()},
                "test": {metric: [score[metric] for score in tested] for metric in tested[0]},
                "step_ms": statistics.median(milliseconds),
            }
            keep(name, found[name])
    return found


def result_rows(losses: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    metrics = list(next(iter(losses.values()))["test"])
    rows = [
        [name, f"{of['settings']['lr']:g}", *(spread([100 * v for v in scores]) for scores in of["test"].values()),
         f"{of['step_ms']:.0f}"]
        for name, of in losses.items()
    ]  # fmt: skip
    return ["loss", "lr", *(f"{metric}, %" for metric in metrics), "ms / step"], rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=50_000)
    parser.add_argument("--losses", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rates-of", type=int, metavar="LABELS", help="take the rates recorded for so many labels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    path = options.results / f"extreme-{options.labels}.json"
    elsewhere, rates = "", {}
    if options.rates_of is not None:
        elsewhere = f" --rates-of {options.rates_of}"
        try:
            settings = records.settings_of(options.results / f"extreme-{options.rates_of}.json", options.losses)
        except records.RecordError as error:
            parser.error(f"argument --rates-of: {error}")
        rates = {name: of["lr"] for name, of in settings.items()}
    budget = {"seeds": list(range(options.seeds)), "epochs": options.epochs, "device": "cpu"}
    head = {
        "data": f"extreme-{options.labels}",
        "command": f"python -m bench.evidence.extreme --labels {options.labels}{elsewhere} --record",
        "versions": records.versions(),
        "threads": options.threads,
        "budget": budget,
    }
    if options.record:
        records.check_budget(path, budget, options.losses)

    def keep(name: str, entry: dict) -> None:
        if options.record:
            records.write(path, head, name, entry, list(CONTENDERS))

    found = run(options.labels, options.losses, options.seeds, options.epochs, rates, keep)
    print(f"\n{options.labels:,} labels, {options.seeds} seeds, {options.epochs} epochs\n")
    print(table(*result_rows(found)))


if __name__ == "__main__":
    main()
