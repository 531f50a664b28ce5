"""Launches: a kernel that is known by the kinds of its arguments is the one that Triton would have found."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from triton_driver import active

from fused_losses.gpu import device as gpu


@triton.jit(do_not_specialize=("n",))
def scaled_sum(x_ptr, y_ptr, out_ptr, n, factor, DOUBLED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.load(x_ptr + at, at < n, other=0.0).to(tl.float32) * factor
    if y_ptr is not None:
        total += tl.load(y_ptr + at, at < n, other=0.0)
    tl.store(out_ptr + at, 2 * total if DOUBLED else total, at < n)


@triton.jit
def specialised(out_ptr, n, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), n)


def arguments():
    """Aligned and not, of every dtype, present or not; numbers of 32 and 64 bits, of which Triton likes 1 and 16."""
    wide = torch.ones(64)
    xs = [wide.to(dtype)[start:] for dtype in (torch.float32, torch.bfloat16, torch.int64) for start in (0, 1)]
    return itertools.product(xs, (None, wide[:8], wide[1:9]), (torch.empty(8),), (0, 1, 7, 16, 2**31), (0.5, 1.0))


def test_what_triton_tells_apart_is_told_apart(device):
    kernel, tritons = gpu.Kernel(scaled_sum, 1, DOUBLED=True, BLOCK=8), {}
    with active(device):
        for given in arguments():
            *_, binder = scaled_sum.device_caches[device.arch]
            _, specialization, _ = binder(*given, **kernel.options)
            ours = tuple(map(gpu._kind, given))
            assert tritons.setdefault(ours, specialization) == specialization, given
    assert len(tritons) == 6 * 3 * 2


def test_a_known_kernel_is_started_with_its_arguments(device):
    with active(device):
        for doubled, turn in itertools.product((False, True), range(2)):
            kernel = gpu.Kernel(scaled_sum, 1, DOUBLED=doubled, BLOCK=8)
            for x, y, out, n, factor in list(arguments())[:: 7 + turn]:
                out.fill_(-1)
                for _ in range(2):
                    gpu.launch(kernel, (1,), x, y, out, n, factor)
                n = min(n, 8)
                expected = (x[:8].float() * factor + (0 if y is None else y)) * (1 + doubled)
                assert torch.equal(out[:n], expected[:n]) and (out[n:] == -1).all()


def test_numbers_that_triton_specialises_are_refused(device):
    with active(device), pytest.raises(AssertionError):
        gpu.launch(gpu.Kernel(specialised, 1, BLOCK=8), (1,), torch.empty(8), 3)
