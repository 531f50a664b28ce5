"""The gates of bench/machine_code.py: what the GPU kernels compile to. Needs Triton, but no GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


TARGETS = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def compiling():
    """One process per target, all started at once: they take minutes of ptxas."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["--dtypes", "bf16", "fp32", "--losses", "cross_entropy", "ss_lr", "--gates"]
    processes = {
        target: subprocess.Popen(
            [sys.executable, "-m", "bench.machine_code", "--targets", target, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for target in TARGETS
    }
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("target", TARGETS)
def test_gates(compiling, target):
    """No spills in loops, 16-byte accesses for every class count, int64 row bases, instructions per logit."""
    printed, _ = compiling[target].communicate()
    assert compiling[target].returncode == 0, printed[-6000:]
    assert printed.count(f"| {target} |") >= 30 and ", 0 gates broken" in printed
