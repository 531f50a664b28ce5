"""Fixtures and the hypothesis profiles. What the tests run over stands in cases.py."""

import os

import hypothesis
import pytest
import torch

from fused_losses import ops, reference
from ranks import Ranks

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# A backend is anything with the three doors as attributes. CPU tensors reach the C++ extension through the dispatcher,
# where it was built, and the reference where it was not.
BACKENDS = {"reference": reference, "dispatched": torch.ops.fused_losses}


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    return BACKENDS[request.param]


def instruction_sets() -> list[str]:
    if ops._extension_failure:
        return ["none"]
    cpu_isa = torch.ops.fused_losses._cpu_isa
    names, chosen = [], cpu_isa("")
    for name in ("avx512bf16", "avx512", "avx2", "baseline"):
        try:
            names.append(cpu_isa(name))
        except ValueError:  # this machine or this build does not have it
            continue
    cpu_isa(chosen)
    return names


def different_instruction_sets() -> list[str]:
    """Less AVX-512 beside AVX-512 BF16: these share all kernels but the one that writes gradients of bfloat16."""
    names = instruction_sets()
    return [name for name in names if name != "avx512" or "avx512bf16" not in names]


@pytest.fixture(params=different_instruction_sets())
def isa(request):
    """The C++ kernels of each instruction set that this machine has."""
    cpu_isa = torch.ops.fused_losses._cpu_isa
    chosen = cpu_isa("")
    yield cpu_isa(request.param)
    cpu_isa(chosen)


@pytest.fixture
def threads():
    """Sets the number of threads, as often as wanted; the test's end restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """torch.empty hands out NaN and huge integers, so that an element which nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()
