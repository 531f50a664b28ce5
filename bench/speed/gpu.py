"""The losses on one GPU: ``python -m bench.speed.gpu --part check|family|hardest|peers --out DIR``.

check runs the GPU backend's tests on the device, with compute-sanitizer over a few of them, and a matrix of more than
2^31 logits. family times every loss of the family over all negatives; hardest times HS-LR over the k hardest, on logits
of several kinds; peers times cross-entropy beside other projects.
Forward, backward and both: median, 20th and 80th percentile, with the caches flushed before every run and not; GB/s by
the bytes that must move (forward 1 U, backward 2 U, or 1 U where the picks were kept) and the share of a device copy's
speed, measured in the same run; peak memory beyond the logits; kernels per step. Results are written after every row to
DIR/PART.json, and a further call goes on where the last one stopped: repeat the command until it exits with 0.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from bench.speed import cases
from fused_losses import ops

PASSES = {"forward": 1, "backward": 2, "full": 3}  # U, in the byte model
KEPT_PASSES = {"forward": 1, "backward": 1, "full": 2}  # of the k hardest, whose gradient needs no logits


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


def kernels_per_step(step: Callable, device: str) -> int | None:
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def measure(
    clock: Clock, provider: cases.Provider, shape: cases.Shape, dtype: torch.dtype, copy: float, inputs: str = "normal",
    passes: dict[str, int] = PASSES,
) -> dict:  # fmt: skip
    logits, target = cases.make(shape, dtype, clock.device, inputs=inputs)
    kept = {}

    def forward():
        kept["loss"] = provider(logits, target)

    def backward():
        kept["loss"].backward()

    def clear():
        logits.grad = None
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
            speed = passes[name] * shape.nbytes(dtype) / times["median"] / 1e6
            row[f"{name} {heat}"] = times | {"GB/s": speed, "of_copy": speed / copy}
    return row


# --- parts ------------------------------------------------------------------------------------------------------------


def family(shapes):
    """Ours and eager first: what needs a compiler comes last."""
    for last in (False, True):
        for shape in shapes:
            for loss in cases.LOSSES:
                for name, provider in cases.providers(loss).items():
                    if (name == "compiled") == last:
                        yield shape, loss, name, provider, "normal", PASSES


def peers(shapes):
    everyone = cases.providers("cross_entropy") | cases.peers()
    for shape in shapes:
        for name, provider in everyone.items():
            yield shape, "cross_entropy", name, provider, "normal", PASSES


def hardest(shapes):
    if shapes is cases.GPU_SHAPES:
        shapes = cases.HARDEST_SHAPES
    for last in (False, True):
        for shape, share, inputs in itertools.product(shapes, cases.SHARES, cases.INPUTS):
            k = max(1, int(share * shape.classes))
            kept = ops.keeps_picks(torch.device("cuda"), shape.classes, k, False)
            for name, provider in cases.hardest_providers(k, inputs).items():
                compact = kept if name == "ours" else "threshold" not in name
                passes = KEPT_PASSES if compact else PASSES
                if (name == "compiled") == last:
                    yield shape, f"hs_lr_loss, k {k}, {inputs}", name, provider, inputs, passes


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


def time_part(part: str, out: Path, device: str, tiny: bool, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    results = Results(out / f"{part}.json", header(device))
    clock = Clock(device, milliseconds=1 if tiny else 200)
    results.found["copy GB/s"] = copy = copy_speed(clock)
    rows = {"family": family, "hardest": hardest, "peers": peers}[part]
    for shape, loss, name, provider, inputs, passes in rows(cases.TINY_SHAPES if tiny else cases.GPU_SHAPES):
        for dtype_name, dtype in cases.DTYPES.items():
            key = f"{loss} | {shape} | {dtype_name} | {name}"
            if key in results:
                continue
            if time.monotonic() > deadline:
                print("not finished: run the same command again", flush=True)
                return 3
            try:
                row = measure(clock, provider, shape, dtype, copy, inputs, passes)
                full = row["full cold"]
                print(f"{key:60} {full['median']:9.3f} ms {100 * full['of_copy']:5.1f} % of a copy", flush=True)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                row = {"error": str(error)[:300]}
                print(f"{key:60} {row['error'][:60]}", flush=True)
            results[key] = row
    return 0


def beyond_int32() -> None:
    """One step over more than 2^31 logits; rows at either end against PyTorch."""
    import fused_losses as fl

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


def check(out: Path, device: str, tiny: bool, seconds: float) -> int:
    """The GPU backend's tests, then compute-sanitizer over split rows and layouts, then more than 2^31 logits."""
    out.mkdir(parents=True, exist_ok=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "--confcutdir=tests/gpu"]
    chosen = ["-k", "gradient_rows" if tiny else "not bench"]
    commands = {"tests": [*tests, *chosen]}
    sanitizer = shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer:
        for tool in ("memcheck", "racecheck"):
            subset = [*tests, "-k", "layouts or (split_rows and bfloat16)"]
            commands[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "9", *subset]
    codes = {}
    for name, command in commands.items():
        with (out / f"check_{name}.log").open("w") as log:
            try:
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False)
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
    parser.add_argument("--part", choices=("check", "family", "hardest", "peers"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--seconds", type=float, default=480, help="begin no row after this time (default: 480)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no GPU here; --tiny tests the command itself")
    if options.part == "check":
        return check(options.out, device, options.tiny, options.seconds)
    return time_part(options.part, options.out, device, options.tiny, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
