"""Time and peak memory of one training step of a linear layer with its loss: ours, and what else there is.

    python -m bench.speed.linear              the tables
    python -m bench.speed.linear --check      and exit 1 if a bar of the tables is missed
    python -m bench.speed.linear --write      and keep them in bench/results/linear.json

Times are medians of steps that take turns in one process, so that a busy machine slows all alike; a ratio is the median
of the peer over ours, the slower one if two of ours are judged. Memory is what a step takes at its peak beyond input,
weight and their gradients, in a process of its own: max RSS on the CPU, torch.cuda.max_memory_allocated on CUDA.

glibc's malloc returns every block above 32 MiB to the system, and each step pays a page fault per 4 KiB of it again:
that is a part of what it costs to hold all logits, and the bars are judged so. --keep-memory takes the times with a
malloc that keeps what it has, which spares linear and the loss most of that.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_losses as fl

RESULTS = Path(__file__).parents[1] / "results" / "linear.json"
MIB = 2**20
SLOW = 1.0  # seconds
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}

EAGER, CHUNKED = "linear + F.cross_entropy", "F.linear_cross_entropy, chunked"
CHUNKED_64 = f"{CHUNKED} by 64 rows"
PYTORCH_HS_LR = "linear + best PyTorch HS-LR"
Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # input (rows, features), weight (classes, features), target (rows,)


# --- who computes it --------------------------------------------------------------------------------------------------


def linear_step(loss: nn.Module) -> Step:
    """Ours."""
    return lambda x, w, target: fl.linear_loss(x, w, target, loss=loss)


def eager_hs_lr(k: int) -> Step:
    """linear, then the target masked, topk and softplus: what a careful PyTorch user would write."""

    def step(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(x, w)
        z_y = logits.gather(1, target[:, None])
        hardest = logits.scatter(1, target[:, None], -torch.inf).topk(k, dim=1, sorted=False).values
        return F.softplus(-z_y).mean() + F.softplus(hardest).mean()

    return step


def eager_cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target)


def chunked_cross_entropy(rows: int | None) -> Step:
    """None: as torch chooses, by the aspect ratio of the layer, a few rows where the classes are many."""

    def step(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(x, w, target, options=options)

    return step


def liger_cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, w, target)


def cut_cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, target)


def peers(device: str) -> dict[str, Step]:
    """Cross-entropy by others; those that are installed and run on the device."""
    found: dict[str, Step] = {EAGER: eager_cross_entropy}
    if hasattr(nn, "LinearCrossEntropyOptions"):  # torch 2.13
        found |= {CHUNKED: chunked_cross_entropy(None), CHUNKED_64: chunked_cross_entropy(64)}
    if device != "cpu" and importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger_cross_entropy
    if device != "cpu" and importlib.util.find_spec("cut_cross_entropy"):
        found["cut-cross-entropy"] = cut_cross_entropy
    return found


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    features: int
    classes: int
    ours: tuple[str, ...]  # which of the steps are judged
    k: int | None = None
    faster: dict[str, float] = field(default_factory=dict)  # peer: at least so many times faster
    most_logits: float | None = None  # peak memory of ours, in units of all logits
    less_than_linear: float | None = None  # all logits that ours needs less than linear + F.cross_entropy

    @property
    def logits_bytes(self) -> int:
        return 4 * self.rows * self.classes

    def steps(self, device: str) -> dict[str, Step]:
        ours: dict[str, Step] = {"ours, CRL": linear_step(fl.CRLLoss()), "ours, CE": fl.linear_cross_entropy}
        if self.k is not None:
            ours = {"ours, HS-LR": linear_step(fl.HSLRLoss(k=self.k))}
            ours[PYTORCH_HS_LR] = eager_hs_lr(self.k)
        return ours | peers(device)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        x = torch.randn(self.rows, self.features, **options)
        w = torch.randn(self.classes, self.features, **options).mul_(self.features**-0.5)
        target = torch.randint(self.classes, (self.rows,), **options)
        return x.requires_grad_(), w.requires_grad_(), target


CASES = {
    case.name: case
    for case in (
        Case(
            "100k classes, k 100", 256, 128, 100_000, ("ours, HS-LR",), 100,
            {PYTORCH_HS_LR: 2.8, EAGER: 2.5, CHUNKED: 8.0}, most_logits=0.25,
        ),
        Case("21841 classes, k 218", 512, 256, 21_841, ("ours, HS-LR",), 218, {PYTORCH_HS_LR: 1.8}),
        Case(
            "100k classes, CRL and CE", 256, 128, 100_000, ("ours, CRL", "ours, CE"), None,
            {EAGER: 1.0}, most_logits=0.6, less_than_linear=1.9,
        ),
    )
}  # fmt: skip


Clock = Callable[[], float]  # time.perf_counter, or time.process_time where others use the machine too


def run(step: Step, x: Tensor, w: Tensor, target: Tensor, clock: Clock = time.perf_counter) -> float:
    """Seconds of a full step with fresh gradients."""
    x.grad = w.grad = None
    started = clock()
    loss = step(x, w, target)
    loss.backward()
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return clock() - started


def times(case: Case, device: str, rounds: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Median milliseconds of each step, of two for a slow one; a matmul alone is the floor."""
    x, w, target = case.tensors(device)
    logits = torch.empty(case.rows, case.classes, device=device)

    def matmul() -> float:
        started = clock()
        torch.mm(x.detach(), w.detach().t(), out=logits)
        if device != "cpu":
            torch.accelerator.synchronize()
        return clock() - started

    runs = {"one matmul": matmul}
    runs |= {name: lambda step=step: run(step, x, w, target, clock) for name, step in case.steps(device).items()}
    taken = {name: [] for name in runs}
    warm_up = {name: go() for name, go in runs.items()}
    for round_number in range(rounds):
        for name, go in runs.items():
            if warm_up[name] < SLOW or round_number < 2:
                taken[name].append(1e3 * go())
    return {name: statistics.median(ms) for name, ms in taken.items()}


# --- peak memory, in a process of its own -----------------------------------------------------------------------------


def peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # a process started by one with more memory inherits its ru_maxrss
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def step_memory(case: Case, step_name: str, device: str) -> int:
    """Peak bytes of two steps beyond input, weight and their gradients."""
    step = case.steps(device)[step_name]
    small = Case("warm-up", 2, case.features, 2 * (case.k or 100), case.ours, case.k)
    run(step, *small.tensors(device))  # libraries, their threads and buffers
    x, w, target = case.tensors(device)
    before = peak_bytes(device)
    for _ in range(2):
        run(step, x, w, target)
    return peak_bytes(device) - before - x.nbytes - w.nbytes


MILLION = {"rows": 64, "features": 64, "classes": 1_000_000, "k": 100}


def million(normalize: bool, device: str) -> dict[str, float]:
    """One million identities with sparse gradients and SGD: memory beyond the weight, rows touched, time."""
    torch.manual_seed(0)
    head = fl.LinearLoss(
        MILLION["features"],
        MILLION["classes"],
        loss=fl.HSLRLoss(k=MILLION["k"]),
        normalize=normalize,
        scale=16.0 if normalize else 1.0,
        options=fl.LinearLossOptions(sparse_grad=True),
        device=device,
    )
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    x = torch.randn(MILLION["rows"], MILLION["features"], device=device, requires_grad=True)
    target = torch.randint(MILLION["classes"], (MILLION["rows"],), device=device)
    before, milliseconds = peak_bytes(device), []
    for _ in range(8):
        started = time.perf_counter()
        optimizer.zero_grad()
        head(x, target).backward()
        optimizer.step()
        if device != "cpu":
            torch.accelerator.synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - started))
    memory = peak_bytes(device) - before

    old = head.weight.detach().clone()
    optimizer.zero_grad()
    head(x, target).backward()
    optimizer.step()
    moved = (head.weight.detach() != old).any(1).nonzero().squeeze(1)
    picked = head.weight.grad._indices()[0]
    strays = len(moved) - torch.isin(moved, picked).sum().item()
    return {"ms": statistics.median(milliseconds[2:]), "bytes": memory, "picked": len(picked), "strays": strays}


def in_a_process(*arguments: str, device: str, threads: int) -> dict[str, float]:
    """What it prints as JSON. Its malloc is as the system has it: held, but no longer used, would count as used."""
    command = [sys.executable, "-m", "bench.speed.linear", "--device", device, "--threads", str(threads), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


# --- report -----------------------------------------------------------------------------------------------------------


class Bars:
    """What must hold, and what did not."""

    def __init__(self):
        self.missed: list[str] = []

    def judge(self, what: str, ok: bool, bar: str) -> str:
        if not ok:
            self.missed.append(f"{what}: {bar}")
        return f"{bar}: {'yes' if ok else 'NO'}"


def measured(
    case: Case, device: str, threads: int, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Of each step the milliseconds, and the peak bytes of all but the matmul."""
    found = {name: {"ms": round(ms, 2)} for name, ms in times(case, device, rounds, clock).items()}
    for name in case.steps(device):
        arguments = ("--memory", json.dumps(asdict(case)), name)
        found[name]["bytes"] = in_a_process(*arguments, device=device, threads=threads)["bytes"]
    return found


def report(case: Case, found: dict[str, dict[str, float]], bars: Bars) -> list[list[str]]:
    milliseconds = {name: of["ms"] for name, of in found.items()}
    memory = {name: of["bytes"] for name, of in found.items() if "bytes" in of}
    ours = max(milliseconds[name] for name in case.ours)
    rows = []
    for name, ms in milliseconds.items():
        ratio, judged = ms / ours, []
        if name in case.faster:
            bar = case.faster[name]
            judged.append(bars.judge(f"{case.name}, against {name} ({ratio:.2f} x)", ratio >= bar, f">= {bar} x"))
        if name in case.ours and case.most_logits is not None:
            used = memory[name] / case.logits_bytes
            what = f"{name}, {case.name}, memory ({used:.1%} of the logits)"
            judged.append(bars.judge(what, used <= case.most_logits, f"<= {case.most_logits:.0%}"))
        if name in case.ours and case.less_than_linear is not None:
            less = (memory[EAGER] - memory[name]) / case.logits_bytes
            what = f"{name}, {case.name}, memory ({less:.2f} of the logits less than {EAGER})"
            bar = f">= {case.less_than_linear:g} logits less"
            judged.append(bars.judge(what, less >= case.less_than_linear, bar))
        used = [f"{memory[name] / MIB:.0f}", f"{memory[name] / case.logits_bytes:.0%}"] if name in memory else ["", ""]
        rows.append([name, f"{ms:.1f}", "" if name in case.ours else f"{ratio:.2f} x", *used, ", ".join(judged)])
    return rows


def recorded_table(record: dict) -> str:
    """Of what --write kept, for docs/linear.md: a column for each case, times in units of ours, the slower one."""
    from bench.evidence.tables import table

    header, columns = ["forward + backward, fp32"], []
    for name, found in record["cases"].items():
        case = CASES[name]
        header.append(
            f"{case.rows} x {case.features} x {case.classes:,}" + ("" if case.k is None else f", k = {case.k}")
        )
        ours = max(found[step]["ms"] for step in case.ours)
        columns.append({
            step: f"{of['ms'] / ours:.2f}" + (f", {of['bytes'] / MIB:.0f} MiB" if "bytes" in of else "")
            for step, of in found.items()
        })  # fmt: skip
    steps = sorted(dict.fromkeys(step for column in columns for step in column), key=lambda step: step[:4] != "ours")
    steps.append(steps.pop(steps.index("one matmul")))
    return table(header, [[step, *(column.get(step, "") for column in columns)] for step in steps])


def report_million(device: str, threads: int, bars: Bars) -> list[list[str]]:
    rows = []
    for name, flags in (("HS-LR", []), ("HS-LR, normalize=True", ["--normalize"])):
        found = in_a_process("--million", *flags, device=device, threads=threads)
        memory = bars.judge(
            f"a million classes, {name}: {found['bytes'] / 1e6:.0f} MB", found["bytes"] < 200e6, "< 200 MB"
        )
        touched = bars.judge(
            f"a million classes, {name}: {found['strays']} more rows", found["strays"] == 0, "no other row"
        )
        rows.append(
            [name, f"{found['ms']:.0f}", f"{found['bytes'] / 1e6:.0f} MB", str(found["picked"]), f"{memory}, {touched}"]
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--rounds", type=int, default=11, help="steps of each kind (default 11)")
    parser.add_argument(
        "--cases", nargs="+", choices=[*CASES, "million"], metavar="NAME", help=f"of {', '.join(CASES)}, million"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument(
        "--processor-time", action="store_true", help="count the processor's time, with --threads 1, on a busy machine"
    )
    parser.add_argument("--write", action="store_true", help=f"keep the times and bytes in {RESULTS.name}")
    parser.add_argument("--recorded", action="store_true", help="print what was kept as the table of docs/linear.md")
    parser.add_argument("--keep-memory", action="store_true", help="take the times with a malloc that keeps its blocks")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "STEP"), help=argparse.SUPPRESS)
    parser.add_argument("--million", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--normalize", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    if options.recorded:
        print(recorded_table(json.loads(RESULTS.read_text())))
        return
    if options.memory:
        case, step_name = options.memory
        print(json.dumps({"bytes": step_memory(Case(**json.loads(case)), step_name, options.device)}))
        return
    if options.million:
        print(json.dumps(million(options.normalize, options.device)))
        return

    from bench.evidence.tables import table  # the measured processes are spared its imports

    clock = time.process_time if options.processor_time else time.perf_counter
    bars, kept = Bars(), {}
    chosen = options.cases or [*CASES, "million"]
    fl.show_config()
    for name in chosen:
        if name == "million":
            print("\n1,000,000 classes, 64 features, 64 rows, k = 100: sparse_grad=True, SGD, a whole step\n")
            header = ["loss", "ms", "memory beyond the weight", "rows picked", "bars"]
            print(table(header, report_million(options.device, options.threads, bars)))
            continue
        case = CASES[name]
        shape = f"{case.rows} rows, {case.features} features, {case.classes} classes"
        print(f"\n{case.name}: {shape}, fp32, forward + backward\n")
        header = ["step", "ms", "to ours", "peak, MiB", "of all logits", "bars"]
        kept[name] = measured(case, options.device, options.threads, options.rounds, clock)
        print(table(header, report(case, kept[name], bars)), flush=True)
    if options.write:
        head = {"command": " ".join(["python -m bench.speed.linear", *map(shlex.quote, argv or sys.argv[1:])])}
        head |= {"threads": options.threads, "torch": torch.__version__}
        RESULTS.write_text(json.dumps(head | {"cases": kept}, indent=1) + "\n")
        print(f"recorded: {RESULTS}")
    print("\n" + ("\n".join(f"MISSED {what}" for what in bars.missed) or "every bar is held"))
    if options.check and bars.missed:
        raise SystemExit(1)


if __name__ == "__main__":
    if "--keep-memory" in sys.argv and any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, "-m", "bench.speed.linear", *sys.argv[1:]], os.environ | KEEP_MEMORY)
    main()
