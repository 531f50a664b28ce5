"""Fixtures and the hypothesis profiles. What the tests run over stands in cases.py."""

import os

import hypothesis
import pytest
import torch

from fused_losses import ops, reference  # noqa: F401  (ops defines torch.ops.fused_losses)
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
