"""What a step of the classifier and its loss costs in training among many classes: `python -m bench.evidence.costs`.

    python -m bench.evidence.costs                      digits among 100,000 classes: table
    python -m bench.evidence.costs --record             keep it, for python -m bench.evidence

The linear layer and the loss, forward and backward, by themselves: rows, features and classes are those of the recorded
runs, and so are the losses' settings. Ours are LinearLoss; "CE, 10 % random" computes the logits of the sampled classes
alone (Partial FC: An et al., CVPR 2022, arXiv 2203.15565, section 3.3). All of them give dense gradients. Times are
medians of the processor's time, in turns; memory is what a step takes at its peak beyond input, weight and gradients,
in a process of its own.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.evidence import records
from bench.evidence.contenders import SampledCrossEntropy, cases, sampled_classes
from bench.evidence.data import Dataset, padded
from bench.evidence.digits import digits
from bench.evidence.tables import table
from bench.speed.linear import MIB, linear_step, peak_bytes

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # input (rows, features), weight (classes, features), target (rows,)


def sampled_step(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    classes, place = sampled_classes(len(w), target)
    return F.cross_entropy(F.linear(x, w.index_select(0, classes)), place[target])


def steps(data: Dataset, results: Path) -> dict[str, Step]:
    """By loss, those of the recorded runs."""
    names = list(records.read(results / f"{data.name}-runs.json")["losses"])
    settings = records.settings_of(results / f"{data.name}.json", names)
    found = {}
    for case in cases(data):
        if case.name in names:
            loss: nn.Module = case.criterion(settings[case.name])
            found[case.name] = sampled_step if isinstance(loss, SampledCrossEntropy) else linear_step(loss)
    return found


def tensors(data: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of the targets, whose classes are the first few."""
    x = torch.randn(data.batch_size, data.features)
    w = torch.randn(data.num_classes, data.features).mul_(data.features**-0.5)
    return x.requires_grad_(), w.requires_grad_(), data.train.target[: data.batch_size]


def run(step: Step, x: Tensor, w: Tensor, target: Tensor) -> float:
    """Milliseconds."""
    x.grad = w.grad = None
    started = time.process_time()
    step(x, w, target).backward()
    return 1e3 * (time.process_time() - started)


def times(data: Dataset, all_steps: dict[str, Step], rounds: int) -> dict[str, float]:
    given = tensors(data)
    for step in all_steps.values():
        run(step, *given)
    taken = {name: [] for name in all_steps}
    for _ in range(rounds):
        for name, step in all_steps.items():
            taken[name].append(run(step, *given))
    return {name: statistics.median(of) for name, of in taken.items()}


def memory(data: Dataset, step: Step) -> int:
    x, w, target = tensors(data)
    run(step, x, w.detach()[:1000].requires_grad_(), target)  # libraries, their threads and buffers
    before = peak_bytes("cpu")
    for _ in range(2):
        run(step, x, w, target)
    return peak_bytes("cpu") - before - x.nbytes - w.nbytes


def memory_in_a_process(command: list[str], name: str) -> int:
    done = subprocess.run([*command, "--memory", name], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--memory", metavar="LOSS", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = padded(digits(), options.classes)
    everyone = steps(data, options.results)
    if not everyone:
        parser.error(f"no runs of {data.name} in {options.results}: bench.evidence.train --many-classes ... --record")
    if options.memory:
        print(json.dumps(memory(data, everyone[options.memory])))
        return
    command = [sys.executable, "-m", "bench.evidence.costs", "--classes", str(options.classes)]
    command += ["--results", str(options.results)]
    milliseconds = times(data, everyone, options.rounds)
    found = {name: {"ms": ms, "bytes": memory_in_a_process(command, name)} for name, ms in milliseconds.items()}
    shape = f"{data.batch_size} rows, {data.features} features, {data.num_classes:,} classes"
    print(f"{shape}, fp32, one thread\n")
    rows = [[name, f"{of['ms']:.0f}", f"{of['bytes'] / MIB:.0f}"] for name, of in found.items()]
    print(table(["loss", "ms", "MiB"], rows))
    if options.record:
        head = {"command": f"python -m bench.evidence.costs --classes {options.classes} --record", "shape": shape}
        head |= {"steps_per_epoch": math.ceil(len(data.train.target) / data.batch_size)}
        path = options.results / f"{data.name}-costs.json"
        path.write_text(json.dumps(head | {"versions": records.versions(), "losses": found}, indent=2) + "\n")
        print(f"\nrecorded: {path}")


if __name__ == "__main__":
    main()
