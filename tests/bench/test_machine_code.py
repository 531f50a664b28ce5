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
    arguments += [
        "--kinds",
        "index",
        "multi_hot",
        "labels smoothed",
    ]  # the others: make machine-code
    done = subprocess.run(
        [sys.executable, "-m", "bench.speed.machine_code", *arguments, "--gates", "--json", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text())["reports"]


def test_roofline():
    """Over a long row what a launch executes is its loop; what a step must take is at least what its bytes take."""
    code = (
        "import torch; from bench.speed import cases, roofline; from bench.speed.machine_code import TARGETS, record\n"
        "shape = cases.Shape(512, 100003)\n"
        "launches = record(TARGETS['sm_90'][1], (512, 100003), torch.bfloat16, 'cross_entropy', 'index', 'mean')\n"
        "found = [32 * roofline.executed(one, 100003, 'sm_90') / 512 / 100003 for one in launches]\n"
        "assert len(found) == 3 and found[1] == 0, found\n"
        "assert 7.5 < found[0] < 11 and 8 < found[2] < 12, found\n"
        "bytes_alone = 3 * 512 * 100003 * 2 / (0.879 * 4.8e12)\n"
        "assert abs(roofline.GPUS['H200'].seconds(6 * 512 * 100003, 0)[0] / bytes_alone - 1) < 1e-3\n"
        "row = roofline.estimates(cases.Shape(4096, 1000), 'cross_entropy')\n"
        "assert row[0] == '4096 x 1000 bf16' and len(row) == 3 + len(roofline.GPUS), row\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_gates(compiled):
    """No spills in loops, 16-byte accesses for every class count, int64 row bases, instructions per logit."""
    assert ", 0 gates broken" in compiled[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_was_looked_at(compiled, target, dtype):
    reports = [report for report in compiled[1] if (report["target"], report["dtype"]) == (target, dtype)]
    assert len(reports) >= 65
    assert {report["kernel"] for report in reports} >= {
        "forward_kernel", "part_kernel", "merge_kernel", "backward_kernel", "finish_kernel",
        "row_kernel", "maxima_kernel", "blocks_kernel", "scatter_kernel", "threshold_kernel",
    }  # fmt: skip
    walking = [report for report in reports if report["loops"]]
    assert len(walking) >= 55 and all(report["registers"] >= 16 for report in reports)
    for report in walking:
        if report["kernel"] == "row_kernel" and all("label" in loss for loss in report["losses"]):
            continue  # a row held in registers is read without a loop: what loops there are, are over its labels
        assert any("16" in access for loop in report["loops"] for access in loop["accesses"]), report["kernel"]


def test_a_kernel_that_losses_share_is_listed_once():
    """Walks and backward kernels of the softmax family know no loss; what ends a row does."""
    command = """
from bench.speed.machine_code import kernels
found = kernels("sm_90", ["bf16"], ["cross_entropy", "nllr", "crl"])
for launched, losses, _, _ in found:
    print(launched.kernel.__name__, len({loss.split(",")[0] for loss in losses}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    listed = [line.split() for line in done.stdout.splitlines()]
    sharing = {name: {int(number) for kernel, number in listed if kernel == name} for name, _ in listed}
    for kernel in ("backward_kernel", "scatter_kernel", "threshold_kernel", "part_kernel", "maxima_kernel"):
        assert sharing[kernel] == {3}, kernel
    for kernel in ("forward_kernel", "merge_kernel", "row_kernel", "blocks_kernel"):
        assert sharing[kernel] == {1, 3}, f"{kernel}: with a finish, and without"
    assert sharing["finish_kernel"] == {1}
