"""The pytest-benchmark suite: every provider of every loss on every CPU case, forward, backward and both.

    make bench                                     runs it, writes out/bench.json, draws out/bench.png
    pytest bench/speed --benchmark-compare=0001    against an earlier run saved with --benchmark-save

One group per case, loss and pass: within a group, the same numbers by different hands.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from bench.speed import cases

ROWS = [
    pytest.param(
        case, name, id=f"{case.shape.rows}x{case.shape.classes}-{case.dtype}-k{case.k}-{name}".replace(" ", "")
    )
    for case in cases.CPU_CASES
    for name in cases.contenders(case.k)
]


class Pass(NamedTuple):
    prepare: Callable  # (provider, logits, target) -> arguments of run; not timed
    run: Callable


def forward_then(provider, logits, target):
    logits.grad = None
    return (provider(logits, target),), {}


def inputs(provider, logits, target):
    logits.grad = None
    return (provider, logits, target), {}


PASSES = {
    "forward": Pass(inputs, lambda provider, logits, target: provider(logits, target)),
    "backward": Pass(forward_then, torch.Tensor.backward),
    "both": Pass(inputs, lambda provider, logits, target: provider(logits, target).backward()),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case, contender", ROWS)
def test_speed(benchmark, case, contender, name):
    loss, _, provider = contender.partition(", ")
    benchmark.group = f"{case}: {loss}, {name}"
    benchmark.extra_info |= {"case": str(case), "loss": loss, "provider": provider, "pass": name}
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    function = cases.contenders(case.k)[contender]
    logits, target = cases.make(case.shape, cases.DTYPES[case.dtype], "cpu")
    measured = PASSES[name]
    benchmark.pedantic(
        measured.run, setup=lambda: measured.prepare(function, logits, target), rounds=7, warmup_rounds=2, iterations=1
    )
    if logits.grad is not None:
        assert logits.grad.isfinite().all()
