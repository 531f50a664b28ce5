"""The gates of bench/machine_code.py: what the GPU kernels compile to. Needs Triton, but no GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_gates(target):
    """No spills in loops, 16-byte accesses for every class count, int64 row bases, instructions per logit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["--targets", target, "--dtypes", "bf16", "fp32", "--losses", "cross_entropy", "ss_lr", "--gates"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.machine_code", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(f"| {target} |") >= 30 and ", 0 gates broken" in done.stdout
