"""Fixtures of the tests on the emulator, and its report. They need a process of their own, ``pytest tests/emulator``:
here kernels are compiled, not interpreted."""

import os
import time

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

from emulated_backend import Backend
from triton_driver import Emulator

import emulator

slow = pytest.mark.slow
DEVICES = {  # target, seed of the errors of approximate instructions
    "sm_90": ("sm_90", 0),
    "sm_80": ("sm_80", 0),
    "sm_100": ("sm_100", 0),
    "sm_90, as inexact as PTX allows": ("sm_90", 1),
}
started = time.time()
backends: list[Backend] = []


@pytest.fixture(scope="session", params=[d if d == "sm_90" else pytest.param(d, marks=slow) for d in DEVICES])
def device(request) -> Emulator:
    target, noise = DEVICES[request.param]
    return Emulator(target, seed=1, noise=noise)


@pytest.fixture(scope="session")
def session_backend(device) -> Backend:
    backends.append(Backend(device))
    return backends[-1]


@pytest.fixture
def backend(session_backend):
    with session_backend.launched():
        yield session_backend


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty hands out NaN, so that an element which nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if emulator.compiler() is None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="the emulator is built with a C++ compiler, and there is none"))


def pytest_terminal_summary(terminalreporter):
    """Door calls of other processes, the ranks of class_parallel, are not among these."""
    cases = sum(len(terminalreporter.stats.get(outcome, ())) for outcome in ("passed", "failed"))
    devices = [backend.device for backend in backends]
    terminalreporter.write_line(
        f"emulator: {cases} cases on {', '.join(sorted({device.target for device in devices}))}: "
        f"{sum(sum(backend.calls.values()) for backend in backends)} door calls, "
        f"{sum(sum(device.launches.values()) for device in devices)} launches of "
        f"{len(set().union(*(device.binaries for device in devices)))} binaries, "
        f"{sum(device.instructions for device in devices) / 1e6:.1f} million instructions of warps, "
        f"{sum(backend.faulty for backend in backends)} door calls with faults, {time.time() - started:.0f} s"
    )
