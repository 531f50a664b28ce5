"""The losses on one GPU: ``python -m bench.speed.gpu --part check|family|hardest|options|peers|linear --out DIR``.

check runs the GPU backend's tests on the device, with compute-sanitizer over a few of them, and a matrix of more than
2^31 logits. family times every loss of the family over all negatives; hardest times HS-LR over the k hardest, on logits
of several kinds; options times cross-entropy with smoothing, margins and soft labels; peers times it beside other
projects; linear times a linear layer with its loss.
Forward, backward and both: median, 20th and 80th percentile, with the caches flushed before every run and not, and both
as a CUDA graph, which leaves out the processor's work; that alone, in microseconds, is "processor". GB/s by
the bytes that must move (forward 1 U, backward 2 U, or 1 U where the picks were kept) and the share of a device copy's
speed, measured in the same run; peak memory beyond the logits; kernels per step. Results are written after every row to
DIR/PART.json, and a further call goes on where the last one stopped: repeat the command until it exits with 0.
--processes 12 compiles everything first, in so many processes, and runs the tests so, where pytest-xdist is there.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

import fused_losses as fl
from bench.speed import cases, linear
from fused_losses import ops

PASSES = {"forward": 1, "backward": 2, "full": 3}  # U, in the byte model
KEPT_PASSES = {"forward": 1, "backward": 1, "full": 2}  # of the k hardest, whose gradient needs no logits
MOSTLY_PROCESSOR = 2**25  # bytes of logits


class Clock:
    """Times of one function: on the device by events, else by the host's clock."""

    def __init__(self, device: str, milliseconds: float):
        self.device, self.budget = device, milliseconds
        self.on_gpu = device == "cuda"
        self.flushed = torch.empty(2**28 if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def once(self, function: Callable, before: Callable) -> float:
        before()
        if not self.on_gpu:
            start = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def times(self, function: Callable, prepare: Callable = lambda: None, cold: bool = True) -> dict[str, float]:
        """Median, 20th and 80th percentile, in milliseconds."""

        def before():
            prepare()
            if cold:
                self.flushed.zero_()

        first = [self.once(function, before) for _ in range(3)][-1]
        rounds = int(min(200, max(5, self.budget / max(first, 0.01))))
        found = sorted(self.once(function, before) for _ in range(rounds))
        p20, p80 = found[len(found) // 5], found[-1 - len(found) // 5]
        return {"median": statistics.median(found), "p20": p20, "p80": p80, "rounds": rounds}


def copy_speed(clock: Clock) -> float:
    """GB/s, read and written, of a copy within the device."""
    source = torch.ones(2**30 if clock.on_gpu else 2**20, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.times(lambda: target.copy_(source))["median"] / 1e6


def replayed(step: Callable) -> Callable:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def processor_time(step: Callable, calls: int = 50) -> float:
    """Microseconds that the processor needs for a step: the least of rounds that do not wait for the device."""
    taken = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        taken.append(1e6 * (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return min(taken)


def kernels_per_step(step: Callable, device: str) -> int | None:
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


@dataclass(frozen=True)
class Contender:
    """Who computes what: one row of the results, but for the dtype."""

    loss: str
    shape: cases.Shape
    name: str
    step: Callable[..., Tensor]  # of tensors, the first of which are differentiated
    passes: dict[str, int]
    inputs: str = "normal"
    features: int = 0  # of a linear layer; 0: from logits

    def key(self, dtype: str) -> str:
        return f"{self.loss} | {self.shape} | {dtype} | {self.name}"

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        if not self.features:
            return cases.make(self.shape, dtype, device, inputs=self.inputs)
        case = linear.Case("", self.shape.rows, self.features, self.shape.classes, ())
        x, w, target = case.tensors(device)
        return x.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_(), target


def measure(clock: Clock, of: Contender, dtype: torch.dtype, copy: float) -> dict:
    tensors = of.tensors(dtype, clock.device)
    kept = {}

    def forward():
        kept["loss"] = of.step(*tensors)

    def backward():
        kept["loss"].backward()

    def clear():
        for tensor in tensors:
            tensor.grad = None
        kept.clear()

    def forward_only():
        clear()
        forward()

    def step():
        forward()
        backward()

    step()
    clear()
    row: dict = {"kernels_per_step": kernels_per_step(step, clock.device)}
    clear()
    if clock.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    for name, function, prepare in (
        ("forward", forward, clear),
        ("backward", backward, forward_only),
        ("full", step, clear),
    ):
        for heat in ("cold", "hot"):
            times = clock.times(function, prepare, cold=heat == "cold")
            speed = of.passes[name] * of.shape.nbytes(dtype) / times["median"] / 1e6
            row[f"{name} {heat}"] = times | {"GB/s": speed, "of_copy": speed / copy}
    if clock.on_gpu:
        if of.shape.nbytes(dtype) < MOSTLY_PROCESSOR:
            row["processor"] = processor_time(lambda: (clear(), step()))
        clear()
        with contextlib.suppress(RuntimeError):  # what waits for the device cannot be a graph
            times = clock.times(replayed(lambda: (clear(), step())))
            speed = of.passes["full"] * of.shape.nbytes(dtype) / times["median"] / 1e6
            row["full graph"] = times | {"GB/s": speed, "of_copy": speed / copy}
    return row


# --- parts ------------------------------------------------------------------------------------------------------------


def family(shapes) -> Iterator[Contender]:
    """Ours and eager first: what needs a compiler comes last."""
    for last in (False, True):
        for shape in shapes:
            for loss in cases.LOSSES:
                for name, provider in cases.providers(loss).items():
                    if (name == "compiled") == last:
                        yield Contender(loss, shape, name, provider, PASSES)


def options(shapes) -> Iterator[Contender]:
    everyone = {f"CE, {name}": provider for name, provider in cases.providers("cross_entropy").items()}
    for shape in shapes:
        for name, provider in (everyone | cases.with_options()).items():
            loss, _, name = name.rpartition(", ")
            yield Contender(loss, shape, name, provider, PASSES)


def peers(shapes) -> Iterator[Contender]:
    everyone = cases.providers("cross_entropy") | cases.peers()
    for shape in shapes:
        for name, provider in everyone.items():
            yield Contender("cross_entropy", shape, name, provider, PASSES)


def hardest(shapes) -> Iterator[Contender]:
    if shapes is cases.GPU_SHAPES:
        shapes = cases.HARDEST_SHAPES
    for last in (False, True):
        for shape, share, inputs in itertools.product(shapes, cases.SHARES, cases.INPUTS):
            k = max(1, int(share * shape.classes))
            kept = ops.keeps_picks(torch.device("cuda"), torch.bfloat16, shape.classes, k, False)
            for name, provider in cases.hardest_providers(k, inputs).items():
                compact = kept if name == "ours" else "threshold" not in name
                passes = KEPT_PASSES if compact else PASSES
                if (name == "compiled") == last:
                    yield Contender(f"hs_lr_loss, k {k}, {inputs}", shape, name, provider, passes, inputs)


def linear_layers(shapes) -> Iterator[Contender]:
    """Bytes are those of the logits, which most contenders do hold."""
    tiny = shapes is cases.TINY_SHAPES
    for shape, features in [(shapes[1], 16)] if tiny else cases.GPU_LAYERS:
        k = max(1, shape.classes // 100)
        everyone = linear.peers("cuda") | {"ours": fl.linear_cross_entropy}
        for name, step in everyone.items():
            yield Contender("linear cross_entropy", shape, name, step, PASSES, features=features)
        hs_lr = {"ours": linear.linear_step(fl.HSLRLoss(k=k)), "eager": linear.eager_hs_lr(k)}
        for name, step in hs_lr.items():
            yield Contender(f"linear hs_lr_loss, k {k}", shape, name, step, PASSES, features=features)


PARTS = {"family": family, "hardest": hardest, "options": options, "peers": peers, "linear": linear_layers}


def rows_of(part: str, tiny: bool, only: str) -> list[tuple[str, Contender, torch.dtype]]:
    """By key: those that the regular expression finds."""
    contenders = PARTS[part](cases.TINY_SHAPES if tiny else cases.GPU_SHAPES)
    everything = ((of.key(name), of, dtype) for of in contenders for name, dtype in cases.DTYPES.items())
    return [row for row in everything if re.search(only, row[0])]


class Results:
    """Rows by their key in one JSON file, written after every row."""

    def __init__(self, path: Path, header: dict):
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else header | {"rows": {}}
        path.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return key in self.found["rows"]

    def __setitem__(self, key: str, row: dict) -> None:
        self.found["rows"][key] = row
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.found, indent=1))
        unfinished.replace(self.path)


def header(device: str) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "no GPU: the command's own test",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "unit": "milliseconds",
    }


def time_part(options: argparse.Namespace, device: str) -> int:
    deadline = time.monotonic() + options.seconds
    if options.processes > 1 and device == "cuda":
        compile_part(options)
    results = Results(options.out / f"{options.part}.json", header(device))
    clock = Clock(device, milliseconds=1 if options.tiny else options.milliseconds)
    results.found["copy GB/s"] = copy = copy_speed(clock)
    for key, of, dtype in rows_of(options.part, options.tiny, options.only):
        if key in results:
            continue
        if time.monotonic() > deadline:
            print("not finished: run the same command again", flush=True)
            return 3
        try:
            row = measure(clock, of, dtype, copy)
            full = row["full cold"]
            graph = row.get("full graph", {"median": float("nan"), "of_copy": float("nan")})
            print(
                f"{key:60} {full['median']:9.3f} ms, as a graph {graph['median']:9.3f} ms, "
                f"{100 * graph['of_copy']:5.1f} % of a copy; processor {row.get('processor', float('nan')):.0f} us",
                flush=True,
            )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row = {"error": str(error)[:300]}
            print(f"{key:60} {row['error'][:60]}", flush=True)
        results[key] = row
    return 0


def compile_part(options: argparse.Namespace) -> None:
    """Every row once, in processes of their own: the compilers keep on disk what they made."""
    command = [sys.executable, "-m", "bench.speed.gpu", "--part", options.part, "--out", str(options.out)]
    command += ["--only", options.only, *(["--tiny"] if options.tiny else [])]
    turns = [f"{turn}/{options.processes}" for turn in range(options.processes)]
    running = [subprocess.Popen([*command, "--compile", turn]) for turn in turns]
    for process in running:
        process.wait()


def compile_rows(options: argparse.Namespace, device: str) -> int:
    turn, turns = map(int, options.compile.split("/"))
    for _, of, dtype in rows_of(options.part, options.tiny, options.only)[turn::turns]:
        with contextlib.suppress(RuntimeError, torch.OutOfMemoryError):  # said when it is measured
            of.step(*of.tensors(dtype, device)).backward()
    return 0


def beyond_int32() -> None:
    """One step over more than 2^31 logits; rows at either end against PyTorch."""
    logits = torch.randn((2200, 1000003), device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(1000003, (2200,), device="cuda")
    loss = fl.cross_entropy(logits, target, reduction="none")
    loss.sum().backward()
    for row in (0, 1, 1100, 2146, 2147, 2148, 2199):
        z = logits[row : row + 1].detach().double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(z, target[row : row + 1])
        expected.backward()
        torch.testing.assert_close(loss[row].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.grad[row].double(), z.grad[0], rtol=1e-2, atol=1e-9)


def check(options: argparse.Namespace, device: str) -> int:
    """The GPU backend's tests, then compute-sanitizer over split rows and layouts, then more than 2^31 logits."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "--confcutdir=tests/gpu"]
    side_by_side = options.processes > 1 and importlib.util.find_spec("xdist")
    chosen = ["-k", "gradient_rows" if options.tiny else "not bench"]
    commands = {"tests": [*tests, *chosen, *(["-n", str(options.processes)] if side_by_side else [])]}
    sanitizer = shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer:
        for tool in ("memcheck", "racecheck"):
            subset = [*tests, "-k", "layouts or (split_rows and bfloat16)"]
            commands[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "9", *subset]
    codes = {}
    for name, command in commands.items():
        with (out / f"check_{name}.log").open("w") as log:
            try:
                done = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=options.seconds, check=False
                )
                codes[name] = done.returncode
            except subprocess.TimeoutExpired:
                codes[name] = "timed out"
        print(name, codes[name], flush=True)
    if device == "cuda":
        beyond_int32()
        codes["more than 2^31 logits"] = 0
    (out / "check.json").write_text(json.dumps(header(device) | {"exit codes": codes}, indent=1))
    return int(any(codes.values()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("check", *PARTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name it finds")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--seconds", type=float, default=480, help="begin no row after this time (default: 480)")
    parser.add_argument("--milliseconds", type=float, default=200, help="for every timing (default: 200)")
    parser.add_argument("--processes", type=int, default=1, help="that compile, or test, side by side (default: 1)")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no GPU here; --tiny tests the command itself")
    if options.compile:
        return compile_rows(options, device)
    return check(options, device) if options.part == "check" else time_part(options, device)


if __name__ == "__main__":
    sys.exit(main())
