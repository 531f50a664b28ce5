"""What the tests on the emulator run over, and which part of it they run every time."""

import pytest

from fused_losses.gpu.device import Device

ONE_MULTIPROCESSOR = Device(1, 32, nvidia=True)  # no row is split


def part(cases, every: int) -> list:
    """All cases, of which one in ``every`` is run every time, the others with -m slow."""
    marked = []
    for place, case in enumerate(cases):
        values = case if type(case) is tuple else (case,)  # a Formula is one value
        marked.append(pytest.param(*values, marks=pytest.mark.slow if place % every else ()))
    return marked
