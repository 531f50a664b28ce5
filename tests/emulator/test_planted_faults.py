"""Faults planted in copies of the project's own kernels. Each must be found, or nothing is proved about them."""

import inspect
import re

import pytest
import torch
from emulated_backend import Backend
from gpu_doors import compare, make
from gpu_rows import targets_for
from triton_driver import Faulty

from doors import CE, CRL, SS_LR, backward, forward, grad_like
from fused_losses.gpu import picks


@pytest.fixture
def backend(device):
    with Backend(device).launched() as backend:  # its faults are not the project's
        yield backend


@pytest.fixture
def planted(device):
    """planted(kernel, edit): from now on the kernel of that name runs with edit(its PTX)."""

    def plant(kernel, edit):
        def edited(ptx):
            if f".entry {kernel}(" not in ptx:
                return ptx
            changed = edit(ptx)
            assert changed != ptx, "nothing was planted"
            return changed

        device.edit = edited

    honest = device.edit
    yield plant
    device.edit = honest
    device.faults.clear()


def step(backend, formula, k=0, compact=False, classes=2203):
    """Forward and backward of three rows in the last of which two logits in three are equal."""
    logits, _ = make(3, classes, torch.bfloat16)
    logits[2, ::3] = logits[2, 1::3] = 1.0
    target = targets_for(logits)
    kept = forward(backend, formula, logits, target, k, compact)
    return backward(backend, formula, grad_like(logits), logits, target, kept, k, compact)


def without(instruction: str, number: int):
    """Edits PTX: without the instruction of that number among those of a pattern."""

    def edit(ptx):
        found = list(re.finditer(rf"^.*{instruction}.*$", ptx, re.M))[number]
        return ptx[: found.start()] + ptx[found.end() :]

    return edit


def of_line(function, text: str, pattern: str, replacement: str, number: int = 0):
    """Edits PTX: in the instructions that one line of a jitted function was compiled to."""
    lines, first = inspect.getsourcelines(function.fn)
    line = first + [place for place, source in enumerate(lines) if text in source][number]

    def edit(ptx):
        parts = re.split(r"(?=^\s*\.loc)", ptx, flags=re.M)
        here = re.compile(rf"\s*\.loc\s+\d+\s+{line}\s.*?{function.fn.__code__.co_filename.rpartition('/')[2]}")
        return "".join(re.sub(pattern, replacement, part) if here.match(part) else part for part in parts)

    return edit


BARRIER = r"bar\.sync"


def test_a_race(backend, planted):
    """Without the barriers between filling a row of the gradient, its ends last, and writing the picks into it."""
    step(backend, CRL, 20, True)
    planted("scatter_kernel", lambda ptx: re.sub(rf"^.*{BARRIER}.*$", "", ptx, flags=re.M))
    with pytest.raises(Faulty, match="race between warps"):
        step(backend, CRL, 20, True)


def test_a_race_of_a_gradient_with_its_logits(backend, planted):
    """Without the barrier between the threads that read an end of a row and the one that writes over it."""
    logits, target = make(3, 2203, torch.float32)
    compare(CE, logits, target, backend=backend)
    planted("backward_kernel", without(BARRIER, 0))
    with pytest.raises(Faulty, match=r"race between (warps|lanes)"):
        compare(CE, logits, target, backend=backend)


def test_a_race_in_shared_memory(backend, planted):
    """Without the barrier in front of the sum that the warps of a program make together."""
    planted("forward_kernel", without(BARRIER, 0))
    with pytest.raises(Faulty, match=r"race between warps.*shared byte"):
        step(backend, CE)


def test_a_store_out_of_bounds(backend, planted):
    """With the mask of the last tile forgotten."""
    planted("backward_kernel", lambda ptx: re.sub(r"@%p\d+ (st\.global\.v4)", r"\1", ptx))
    with pytest.raises(Faulty, match="out of bounds"):
        step(backend, SS_LR)


def test_a_store_into_the_gap_between_two_rows(backend, planted):
    """The same inside of the gradient's memory, where a GPU would not notice."""
    logits, target = make(3, 2203, torch.bfloat16)
    wide = torch.cat((logits, logits), dim=1)[:, :2203]
    kept = forward(backend, CE, wide, target)
    planted("backward_kernel", lambda ptx: re.sub(r"@%p\d+ (st\.global\.v4)", r"\1", ptx))
    with pytest.raises(Faulty, match=r"written around a result|race between"):
        backward(backend, CE, torch.ones(3), wide, target, kept)


def test_a_read_of_what_was_never_written(backend, planted):
    """Without the padding behind a list of an odd number of candidates, which the next search reads."""
    planted("blocks_kernel", of_line(picks.listed, "logit_ptr + padding", r"@%p\d+ st\.global[^;]*;", ""))
    with pytest.raises(Faulty, match="undefined"):
        step(backend, CRL, 20, True)


def test_a_result_that_is_not_written(backend, planted):
    planted("forward_kernel", without(r"st\.global", 1))
    with pytest.raises(Faulty, match=r"undefined result.*result 2 of forward"):
        step(backend, CE)


def test_a_barrier_that_half_a_warp_reaches(backend, planted):
    planted(
        "scatter_kernel",
        lambda ptx: re.sub(
            r"bar\.sync\s+0;",
            "mov.u32 %r9999, %tid.x; and.b32 %r9999, %r9999, 16; setp.eq.b32 %p9999, %r9999, 0;\n"
            "@%p9999 bra $past;\nbar.sync 0;\n$past:\n",
            ptx,
            count=1,
        ),
    )
    with pytest.raises(Faulty, match="barrier reached by a part of a warp"):
        step(backend, CRL, 20, True)


BARRIERS = {  # of the search by blocks: behind what is written for others to read
    "maxima": (picks.blocks_kernel, 0),
    "winners": (picks.blocks_kernel, 1),
    "candidates": (picks.blocks_kernel, 2),
}


@pytest.mark.parametrize("behind", BARRIERS)
def test_a_race_between_lists(behind, backend, planted):
    function, number = BARRIERS[behind]
    planted("blocks_kernel", of_line(function, "tl.debug_barrier()", r"bar\.sync[^;]*;", "", number))
    with pytest.raises(Faulty, match=r"race between (warps|lanes)"):
        step(backend, CRL, 20, True)
