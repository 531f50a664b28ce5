"""The gates of bench/speed/machine_code.py: what the GPU kernels compile to. Needs Triton, but no GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """-> (what the command printed, its reports)"""
    path = tmp_path_factory.mktemp("machine_code") / "reports.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["--targets", "sm_80", "sm_90", "--dtypes", "bf16", "fp32", "--losses", "cross_entropy", "ss_lr"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.speed.machine_code", *arguments, "--gates", "--json", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text())["reports"]


def test_gates(compiled):
    """No spills in loops, 16-byte accesses for every class count, int64 row bases, instructions per logit."""
    assert ", 0 gates broken" in compiled[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_was_looked_at(compiled, target, dtype):
    reports = [report for report in compiled[1] if (report["target"], report["dtype"]) == (target, dtype)]
    assert len(reports) >= 40
    assert {report["kernel"] for report in reports} >= {
        "softmax_forward_kernel", "softmax_partial_kernel", "softmax_backward_kernel",
        "logistic_forward_kernel", "logistic_partial_kernel", "index_backward_kernel", "multi_hot_backward_kernel",
        "row_kernel", "maxima_kernel", "blocks_kernel", "scatter_kernel", "threshold_kernel",
    }  # fmt: skip
    walking = [report for report in reports if report["loops"]]
    assert len(walking) >= 35 and all(report["registers"] >= 16 for report in reports)
    for report in walking:
        assert any("16" in access for loop in report["loops"] for access in loop["accesses"]), report["kernel"]
