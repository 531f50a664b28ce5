"""The losses on the CPU against plain PyTorch, interleaved: ``python -m bench.speed [--check]``.

Every round runs every provider once, in an order of its own, so that whatever slows the machine for a while slows all
of them; what is judged is the ratio of two medians of one run. A step is forward and backward with a fresh gradient.
``clone`` and ``zeros`` of the logits stand beside every case as the floor of memory; behind the cases come the groups
of cells.py. ``--check`` compares with the bars and exits with 1 if one is missed; ``--write`` records the medians, with
the machine and the versions, in ``bench/results/cpu.json``.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.speed import cases, cells
from bench.speed.cases import Case, Shape
from bench.speed.cells import Bar, step_of

RESULTS = Path(__file__).parents[1] / "results" / "cpu.json"

# glibc gives large blocks back to the system at once, or keeps them, as it was used before: fresh gradients then cost
# their page faults, or nothing. Keep them, for every provider alike.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


CE = ("CE, eager",)  # F.cross_entropy


def _bars(hardest: list[Bar], softmax: float, ss_lr: list[Bar], lr: float | None) -> list[Bar]:
    bars = hardest + [Bar(f"{name}, ours", CE, softmax) for name in ("CRL", "CE", "NLLR")] + ss_lr
    return bars + ([Bar("LR, ours", ("LR, eager", "LR, compiled"), lr)] if lr else [])


HS, SS = "HS-LR, ours", "SS-LR, ours"
HS_PYTORCH = ("HS-LR, eager", "HS-LR, compiled")
BARS = dict(
    zip(
        cases.CPU_CASES,
        (
            _bars(
                [Bar(HS, CE, 0.40), Bar(HS, ("HS-LR, authors",), 1 / 18), Bar(HS, HS_PYTORCH, 1 / 8)],
                0.50,
                [Bar(SS, ("SS-LR, authors",), 1 / 12), Bar(SS, ("SS-LR, compiled",), 1 / 4)],
                0.38,
            ),
            _bars([Bar(HS, CE, 0.40)], 0.50, [Bar(SS, ("SS-LR, authors",), 1 / 7)], None),
            _bars([Bar(HS, ("HS-LR, authors",), 1 / 20)], 0.50, [Bar(SS, ("SS-LR, authors",), 1 / 13)], None),
            _bars(
                [Bar(HS, ("HS-LR, authors",), 1 / 9), Bar(HS, HS_PYTORCH, 1 / 6)],
                0.95,
                [Bar(SS, ("SS-LR, authors",), 1 / 4)],
                0.5,
            ),
            [],  # 10 % of the classes: reported, not judged
        ),
        strict=True,
    )
)


# What an option may cost, beside the plain loss.
WITH_OPTIONS = cases.CPU_CASES[:1]
for _case in WITH_OPTIONS:
    BARS[_case] += [Bar(name, ("CE, ours",), 1.15) for name in cases.with_options() if name.endswith("ours")]


def steps_of(case: Case) -> dict[str, Callable[[], object]]:
    logits, target = cases.make(case.shape, cases.DTYPES[case.dtype], "cpu")
    steps: dict[str, Callable[[], object]] = {"clone": logits.detach().clone, "zeros": lambda: torch.zeros_like(logits)}
    contenders = cases.contenders(case.k) | (cases.with_options() if case in WITH_OPTIONS else {})
    return steps | {name: step_of(provider, logits, target) for name, provider in contenders.items()}


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, two rounds of warm-up aside.

    Every round has another order: who runs behind a provider that leaves the caches full of its own would always pay.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffled = list(steps), random.Random(0)
    for number in range(rounds + 2):
        shuffled.shuffle(order)
        for name in order:
            step = steps[name]
            started = time.perf_counter()
            step()
            elapsed = time.perf_counter() - started
            if number >= 2:
                times[name].append(1e3 * elapsed)
    return times


def rounds_of(shape: Shape, rounds: int) -> int:
    """A short step feels every interrupt: more of them cost little time and steady the median."""
    return rounds if shape.rows * shape.classes > 2**20 else 5 * rounds


def report(name: str, median: dict[str, float], unit: str, bars: list[Bar]) -> list[str]:
    """Prints the times, also as a share of the unit's; returns the bars that were missed."""
    print(f"\n{name}: ms per step, and as a share of {unit}")
    for step, ms in sorted(median.items(), key=lambda item: item[1]):
        print(f"  {step:32} {ms:9.3f} {ms / median[unit]:8.2f}")
    missed = []
    for bar in bars:
        for rival in bar.rivals:
            ratio = median[bar.ours] / median[rival]
            verdict = "ok    " if ratio <= bar.most else "MISSED"
            line = f"{verdict} {bar.ours} / {rival}: {ratio:.3f} ({1 / ratio:.1f}x), bar {bar.most:.3f}"
            print(f"    {line}")
            if ratio > bar.most:
                missed.append(f"{name}: {line}")
    return missed


def machine() -> dict[str, str | int]:
    model = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    isa = torch.ops.fused_losses._cpu_isa("") if hasattr(torch.ops.fused_losses, "_cpu_isa") else "plain PyTorch"
    return {"processor": model, "threads": torch.get_num_threads(), "kernels": isa, "torch": torch.__version__}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="on a GPU: python -m bench.speed.gpu")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--write", action="store_true", help=f"record the medians in {RESULTS.name}")
    parser.add_argument(
        "--rounds", type=int, default=31, help="per case, five times as many for small ones (default: 31)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="avx512bf16, avx512, avx2 or baseline instead of the best there is")
    parser.add_argument("--only", help="run the cases whose name contains this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.isa:
        torch.ops.fused_losses._cpu_isa(options.isa)

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    missed, record = [], machine() | {"unit": "ms per step", "rounds": options.rounds, "cases": {}, "groups": {}}
    for case in cases.CPU_CASES:
        if options.only and options.only not in str(case):
            continue
        times = interleaved(steps_of(case), rounds_of(case.shape, options.rounds))
        median = {name: statistics.median(values) for name, values in times.items()}
        record["cases"][str(case)] = {name: round(ms, 4) for name, ms in median.items()}
        missed += report(str(case), median, *CE, BARS[case])
    for group in cells.groups():
        if options.only and options.only not in str(group):
            continue
        times = interleaved(group.steps(), rounds_of(group.shape, options.rounds))
        median = {name: statistics.median(values) for name, values in times.items()}
        record["groups"][str(group)] = {name: round(ms, 4) for name, ms in median.items()}
        missed += report(str(group), median, group.unit, group.bars)
    if options.write:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + ("\n".join(["missed:", *missed]) if missed else "every bar met"))
    return int(options.check and bool(missed))
