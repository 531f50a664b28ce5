"""Time of certified selection: the k hardest of a float32 layer by products in bfloat16, beside what else there is.

    python -m bench.speed.certified              the table
    python -m bench.speed.certified --check      and exit 1 if a bar is missed

Forward is that of the layer and its selection, a step is forward, backward and SGD with sparse gradients. They take
turns in one process; times are medians, in milliseconds. --cpu takes the time of the processor instead of the clock's,
which other processes disturb less: with one thread, the two are the same on a quiet machine.

Partial FC is a port of PartialFC_V2 of InsightFace to one rank: the classes of the batch, and others at random until
they are a tenth, are gathered, and get logits, cross-entropy and the gradients. It is another loss, which samples what
the k hardest are exactly.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl
from bench.evidence.tables import table
from bench.speed.linear import Bars, chunked_cross_entropy, eager_hs_lr
from fused_losses.linear_certified import most_candidates
from fused_losses.linear_rows import LEAST_NORM
from fused_losses.losses import LossSpec
from fused_losses.ops import has_candidates

K = 100
SAMPLED = 0.1
MOST_LOGITS = 2**27  # that a peer may hold all of
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Shape:
    rows: int
    features: int
    classes: int
    most: float = 1.05  # of the forward pass in float32, in the time that certified=None takes
    beats_sampling: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.features} x {self.classes:,}"


SHAPES = (
    Shape(256, 128, 100_000),
    Shape(64, 512, 100_000, most=0.62),
    Shape(64, 64, 1_000_000, most=0.45, beats_sampling=True),
    Shape(16, 64, 1_000_000),
    Shape(64, 64, 2_000_000),
    Shape(1, 128, 100_000),
    Shape(16, 128, 100_000),
    Shape(1024, 128, 100_000),
    Shape(256, 1024, 100_000),
    Shape(256, 64, 10_000),
    Shape(64, 256, 10_000),
    Shape(1024, 512, 10_000),
)


def forward(w: Tensor, x: Tensor, target: Tensor, certified: bool | None) -> Callable[[], object]:
    options = fl.LinearLossOptions(certified=certified, sparse_grad=True)
    return lambda: fl.linear_loss(x, w, target, loss=fl.HSLRLoss(k=K), options=options)


def trained(w: Tensor, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """A step that ends with SGD on the rows of w that a sparse gradient names, or on all of a dense one."""

    def step() -> None:
        x.grad = w.grad = None
        loss(x, w).backward()
        with torch.no_grad():
            w.add_(w.grad, alpha=-LEARNING_RATE)

    return step


def sparse_step(w: Tensor, x: Tensor, target: Tensor, certified: bool | None) -> Callable[[], None]:
    options = fl.LinearLossOptions(certified=certified, sparse_grad=True)
    return trained(w, x, lambda x, w: fl.linear_loss(x, w, target, loss=fl.HSLRLoss(k=K), options=options))


def partial_fc(w: Tensor, x: Tensor, target: Tensor) -> Callable[[], None]:
    classes = w.shape[0]

    def step() -> None:
        x.grad = None
        drawn = torch.rand(classes)
        drawn[target] = 2.0
        index = drawn.topk(int(SAMPLED * classes), sorted=False).indices.sort().values
        sampled = w.detach()[index].requires_grad_()
        F.cross_entropy(F.linear(x, sampled), torch.searchsorted(index, target)).backward()
        with torch.no_grad():
            w.index_add_(0, index, sampled.grad, alpha=-LEARNING_RATE)

    return step


def count_candidates(x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, k: int) -> Tensor:
    """How many classes the bound leaves of each row, (rows,); -1 for one that is not certain."""
    spec = LossSpec("lr", [], 1.0, k, -100, 0, w.shape[0], True)
    most = most_candidates(k)
    return torch.ops.fused_losses._cpu_candidates(x, w, bias, False, LEAST_NORM, 1.0, target, most, *spec)[0]


def candidates(w: Tensor, x: Tensor, target: Tensor) -> str:
    """In the mean, and at most."""
    if not has_candidates():
        return ""
    count = count_candidates(x, w, None, target, K)
    return f"{count.double().mean():.0f}, {count.max()}"


FLOAT32, CERTIFIED, SPARSE, SPARSE_CERTIFIED = "forward, float32", "forward", "sparse step, float32", "sparse step"
PARTIAL_FC, EAGER, CHUNKED = "Partial FC 10 %", "F.linear, best PyTorch", "F.linear_cross_entropy, 64 rows"
RUNS = ("one matmul", FLOAT32, CERTIFIED, SPARSE, SPARSE_CERTIFIED, PARTIAL_FC, EAGER, CHUNKED)


def runs_of(shape: Shape) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.rows, shape.features, generator=generator)
    w = torch.randn(shape.classes, shape.features, generator=generator).mul_(shape.features**-0.5)
    target = torch.randint(shape.classes, (shape.rows,), generator=generator)
    x.requires_grad_()
    w.requires_grad_()
    fixed_x, fixed_w = x.detach(), w.detach().clone()  # forward does not see what the steps make of the weight
    runs: dict[str, Callable[[], object]] = {
        FLOAT32: forward(fixed_w, fixed_x, target, False),
        CERTIFIED: forward(fixed_w, fixed_x, target, None),
        SPARSE: sparse_step(w, x, target, False),
        SPARSE_CERTIFIED: sparse_step(w, x, target, None),
        PARTIAL_FC: partial_fc(w, x, target),
        "candidates": lambda: candidates(fixed_w, fixed_x, target),
    }
    if shape.rows * shape.classes <= MOST_LOGITS:
        logits = torch.empty(shape.rows, shape.classes)
        runs["one matmul"] = lambda: torch.mm(fixed_x, fixed_w.t(), out=logits)
        hs_lr = eager_hs_lr(K)
        runs[EAGER] = trained(w, x, lambda x, w: hs_lr(x, w, target))
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
            chunked = chunked_cross_entropy(64)
            runs[CHUNKED] = trained(w, x, lambda x, w: chunked(x, w, target))
    return runs


def times(runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            started = clock()
            run()
            if round_number > 0:
                taken[name].append(1e3 * (clock() - started))
    return {name: statistics.median(milliseconds) for name, milliseconds in taken.items()}


def report(shape: Shape, rounds: int, clock: Callable[[], float], bars: Bars) -> list[str]:
    runs = runs_of(shape)
    counted = runs.pop("candidates")()
    found = times(runs, rounds, clock)
    share = found[CERTIFIED] / found[FLOAT32]
    judged = [bars.judge(f"{shape}, forward ({share:.2f})", share <= shape.most, f"<= {shape.most:g}")]
    if shape.beats_sampling:
        against = found[SPARSE_CERTIFIED] / found[PARTIAL_FC]
        judged.append(bars.judge(f"{shape}, step to {PARTIAL_FC} ({against:.2f})", against < 1, f"below {PARTIAL_FC}"))
    milliseconds = [f"{found[name]:.1f}" if name in found else "" for name in RUNS]
    return [str(shape), *milliseconds, f"{share:.2f}", str(counted), ", ".join(judged)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.certified", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--rounds", type=int, default=7, help="of each kind (default 7)")
    parser.add_argument("--cpu", action="store_true", help="the time of the processor, of all threads")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many (default all)")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    fl.show_config()
    clock, bars = time.process_time if options.cpu else time.perf_counter, Bars()
    rows = [report(shape, options.rounds, clock, bars) for shape in SHAPES[: options.shapes]]
    print(f"\nrows x features x classes, k = {K}, float32, ms\n")
    print(table(["shape", *RUNS, "forward to float32", "candidates: mean, most", "bars"], rows))
    print("\n" + ("\n".join(f"MISSED {what}" for what in bars.missed) or "every bar is held"))
    if options.check and bars.missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
