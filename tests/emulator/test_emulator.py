"""Whether the emulator itself can be believed: right numbers from kernels without faults, and every fault of kernels
and of hand-written PTX that have one."""

import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton_driver import active

import emulator

# --- kernels without a fault ------------------------------------------------------------------------------------------


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, at < n) + tl.load(y_ptr + at, at < n), at < n)


@triton.jit
def rows(x_ptr, sum_ptr, max_ptr, cumsum_ptr, sorted_ptr, transposed_ptr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    x = tl.load(x_ptr + r * C + c)
    tl.store(sum_ptr + tl.arange(0, R), tl.sum(x, axis=1))
    tl.store(max_ptr + tl.arange(0, C), tl.max(x, axis=0))
    tl.store(cumsum_ptr + r * C + c, tl.cumsum(x, axis=1))
    tl.store(sorted_ptr + r * C + c, tl.sort(x))
    tl.store(transposed_ptr + tl.arange(0, C)[:, None] * R + tl.arange(0, R)[None, :], tl.trans(x))


@triton.jit
def functions(x_ptr, out_ptr, bf16_ptr, fp16_ptr, int_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.exp(x) + tl.log(tl.abs(x)) + tl.sqrt(tl.abs(x)) / (1.5 + x * x))
    tl.store(bf16_ptr + at, x.to(tl.bfloat16))
    tl.store(fp16_ptr + at, x.to(tl.float16))
    i = x.to(tl.int32)
    tl.store(int_ptr + at, (i // 3) ^ (i % 5) + (i << 3) - (i >> 1) * 7)


@triton.jit
def collatz(start_ptr, steps_ptr):
    value = tl.load(start_ptr + tl.program_id(0))
    steps = value * 0
    while value > 1:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    tl.store(steps_ptr + tl.program_id(0), steps)


# --- kernels with one -------------------------------------------------------------------------------------------------


@triton.jit
def reverse(scratch_ptr, x_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(scratch_ptr + at, tl.load(x_ptr + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + at, tl.load(scratch_ptr + BLOCK - 1 - at))


@triton.jit
def overwrite(scratch_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(scratch_ptr + BLOCK - 1 - at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(scratch_ptr + at, x)
    tl.store(out_ptr + at, x)


@triton.jit
def all_at_one_place(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def beyond(out_ptr, BEHIND: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr + BEHIND + tl.arange(0, BLOCK), 1.0)


@triton.jit
def wrong_hint(x_ptr, out_ptr, offset, BLOCK: tl.constexpr):
    at = tl.max_contiguous(tl.multiple_of(offset + tl.arange(0, BLOCK), [16]), [16])
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + at))


@triton.jit
def copied(x_ptr, out_ptr, BLOCK: tl.constexpr, USE: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.where(at < USE, x, 0.0))


@triton.jit
def branch_on(x_ptr, out_ptr):
    if tl.load(x_ptr) > 0:
        tl.store(out_ptr, 1.0)


# --- PTX by hand ------------------------------------------------------------------------------------------------------

_ENTRY = """.visible .entry hand(.param .u64 .ptr .global hand_param_0) {
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
mov.u32 %r1, %tid.x; mov.b32 %r2, global_smem; mul.lo.s32 %r3, %r1, 4; add.s32 %r3, %r2, %r3; setp.lt.u32 %p1, %r1, 16;
ld.param.b64 %rd1, [hand_param_0]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2;
BODY
st.global.b32 [%rd2], {%r4};
ret;
}"""
_SWAPPED = """st.shared.b32 [%r3], %r1; SYNC xor.b32 %r5, %r1, LANE; mul.lo.s32 %r5, %r5, 4; add.s32 %r5, %r2, %r5;
ld.shared.b32 %r4, [%r5];"""
HAND = {  # what is wrong: the PTX
    "": _SWAPPED.replace("SYNC", "bar.sync 0;").replace("LANE", "33"),
    "race between warps": _SWAPPED.replace("SYNC", "").replace("LANE", "33"),
    "race between lanes of a warp": _SWAPPED.replace("SYNC", "").replace("LANE", "1"),
    "lanes ordered by a shuffle only": _SWAPPED.replace("SYNC", "shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;").replace(
        "LANE", "1"
    ),
    "lanes of one store disagree": "setp.lt.u32 %p2, %r1, 32; @%p2 st.shared.b32 [%r2], %r1; mov.b32 %r4, 0;",
    "undefined branch": "ld.shared.b32 %r4, [%r3]; setp.eq.b32 %p2, %r4, 1; @%p2 bra $L1; mov.b32 %r4, 0;\n$L1:\n",
    "undefined address": "ld.shared.b32 %r4, [%r3]; add.s32 %r4, %r4, %r3; ld.shared.b32 %r4, [%r4];",
    "shuffle of an inactive lane": "mov.b32 %r4, 0; @!%p1 bra $L1; shfl.sync.bfly.b32 %r4, %r1, 16, 31, 65535;\n$L1:\n",
    "barrier reached by a part of a warp": "mov.b32 %r4, 0; @%p1 bra $L1; bar.sync 0;\n$L1:\n",
    "deadlock": "mov.b32 %r4, 0; @%p1 bra $L1; bar.warp.sync -1; bra $L2;\n$L1:\nbar.warp.sync -1;\n$L2:\n",
    "does not end": "mov.b32 %r4, 0;\n$L1:\nbra $L1;",
    "out of bounds": "ld.global.b32 {%r4}, [%rd2+256];",
    "misaligned": "ld.shared.b32 %r4, [%r2+2];",
}


def _f(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


INSTRUCTIONS = [  # with %r4 as the result: (instruction, bits expected)
    (f"max.f32 %r4, 0f7FC00000, 0f{_f(1):08X};", _f(1)),
    (f"max.NaN.f32 %r4, 0f7FC00000, 0f{_f(1):08X};", 0x7FFFFFFF),
    ("min.f32 %r4, 0f00000000, 0f80000000;", 0x80000000),
    ("max.f32 %r4, 0f80000000, 0f00000000;", 0),
    ("sub.f32 %r4, 0f7F800000, 0f7F800000;", 0x7FFFFFFF),
    # (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24 with one rounding, 0 with two
    (f"fma.rn.f32 %r4, 0f{_f(1 + 2**-12):08X}, 0f{_f(1 + 2**-12):08X}, 0f{_f(-1 - 2**-11):08X};", _f(2**-24)),
    (f"ex2.approx.ftz.f32 %r4, 0f{_f(-126.5):08X};", 0),
    ("ex2.approx.ftz.f32 %r4, 0fFF800000;", 0),
    ("rcp.approx.ftz.f32 %r4, 0f00000001;", 0x7F800000),
    ("prmt.b32 %r4, 0x80112233, 0x44556677, 0xB704;", 0xFF448077 - 0x8077 + 0x3377),
    ("bfe.u32 %r4, 0xABCD1234, 8, 12;", 0xD12),
    ("bfe.s32 %r4, 2, 1, 1;", 0xFFFFFFFF),
    ("shl.b32 %r4, 1, 32;", 0),
    ("shr.s32 %r4, -5, 40;", 0xFFFFFFFF),
    ("shr.u32 %r4, -5, 40;", 0),
    ("mul.hi.u32 %r4, 0xFFFFFFFF, 0xFFFFFFFF;", 0xFFFFFFFE),
    ("lop3.b32 %r4, 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0xE8;", 0xE8E8E8E8),
    ("div.s32 %r4, -7, 2;", 0xFFFFFFFD),
    ("rem.s32 %r4, -7, 2;", 0xFFFFFFFF),
    ("popc.b32 %r4, 0xF1;", 5),
    (f"cvt.rn.bf16x2.f32 %r4, 0f{_f(1 + 2**-8):08X}, 0f{_f(1 + 3 * 2**-8):08X};", 0x3F803F82),
    ("redux.sync.add.s32 %r4, %r1, -1;", 31 * 16),
    ("redux.sync.max.s32 %r4, %r1, -1;", 31),
    ("shfl.sync.idx.b32 %r4, %r1, 7, 31, -1;", 7),
    ("shfl.sync.up.b32 %r4, %r1, 33, 0, -1;", 0),
    ("mov.b32 {%rs1, %rs2}, 0x12345678; mov.b32 %r4, {%rs2, %rs1};", 0x56781234),
    ("mov.b32 %r4, 5; @!%p1 mov.b32 %r4, 6;", 5),
]


def _by_hand(body: str, warps: int, memory: np.ndarray | None = None, noise: int = 0):
    """(what stands in memory then, (32 * warps,), what was found)"""
    kernel = emulator.Kernel(_ENTRY.replace("BODY", "\n" + body), warps, 512)
    out = np.zeros(32 * warps, np.uint32) if memory is None else memory.copy()
    told = emulator.Memory("out", out.ctypes.data, np.zeros(out.nbytes, np.uint8), 4)
    return out, kernel.run((1, 1, 1), [out.ctypes.data], [told], seed=1, noise=noise, limit=100000)


@pytest.mark.parametrize(("kind", "body"), HAND.items(), ids=[kind or "sound" for kind in HAND])
def test_faults_of_ptx(kind, body):
    assert {fault.kind for fault in _by_hand(body, 2)[1].faults} == ({kind} if kind else set())


@pytest.mark.parametrize(("instruction", "bits"), INSTRUCTIONS)
def test_instructions(instruction, bits):
    out, found = _by_hand(instruction, 1)
    assert not found.faults and out[0] == bits, (hex(out[0]), hex(bits), found.faults)


def test_an_unknown_instruction_is_refused():
    with pytest.raises(emulator.UnknownInstruction, match="wgmma"):
        emulator.Kernel(_ENTRY.replace("BODY", "wgmma.fence.sync.aligned;"), 1, 0)


@pytest.mark.parametrize(
    ("name", "exact", "most"),
    [
        ("ex2.approx.ftz.f32", np.exp2, lambda _, y: 2.0**-22 * y),
        ("lg2.approx.ftz.f32", np.log2, lambda x, y: np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * abs(y))),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, lambda _, y: 2.0**-23 * y),
        ("sqrt.approx.ftz.f32", np.sqrt, lambda _, y: 2.0**-23 * y),
    ],
    ids=str,
)
def test_approximate_instructions(name, exact, most):
    """Correctly rounded; or with errors nearly as large as PTX allows, and never larger, but for the last rounding."""
    x = np.linspace(0.1, 9.0, 256, dtype=np.float32)
    right = exact(x.astype(np.float64))
    body = "ld.global.b32 {%r5}, [%rd2]; " + name + " %r4, %r5;"
    for noise in (0, 7):
        found = _by_hand(body, 8, x, noise)[0].view(np.float32)
        rounding = np.spacing(abs(right).astype(np.float32)) / 2
        share = ((abs(found - right) - rounding * 1.01) / most(x, right)).max()  # of the error allowed
        assert 0.5 < share <= 1 if noise else share <= 0, (noise, share)


@pytest.fixture
def expect(device):
    """expect(kind, kernel, grid, arguments) launches a kernel, which has faults of that kind and no other, or none."""

    def launch(kind, kernel, grid, *arguments, warps=4, **constants):
        device.faults.clear()
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)
        assert {fault.kind for fault in device.faults} == ({kind} if kind else set()), device.faults
        device.faults.clear()

    with active(device):
        yield launch


def test_masks(expect):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    expect("", add, (8,), x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize(("warps", "R", "C"), [(1, 4, 16), (4, 32, 64), (8, 16, 128)])
def test_what_moves_between_threads(warps, R, C, expect):
    x = torch.randn(R, C)
    outs = [torch.empty(R), torch.empty(C), torch.empty(R, C), torch.empty(R, C), torch.empty(C, R)]
    expect("", rows, (1,), x, *outs, R=R, C=C, warps=warps)
    for mine, right in zip(outs, (x.sum(1), x.amax(0), x.cumsum(1), x.sort(1).values, x.t()), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_functions(expect):
    x = torch.randn(1024) * torch.tensor([1.0, 30.0, 1e-4, 80.0]).repeat(256)
    outs = [torch.empty(1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32)]
    expect("", functions, (1,), x, *outs, BLOCK=1024)
    exact = x.double()
    exact = exact.exp() + exact.abs().log() + exact.abs().sqrt() / (1.5 + exact * exact)
    torch.testing.assert_close(outs[0], exact.float(), rtol=2e-6 * 80, atol=1e-5)
    assert torch.equal(outs[1], x.bfloat16()) and torch.equal(outs[2], x.half())
    i = x.int()
    right = torch.div(i, 3, rounding_mode="trunc") ^ (torch.fmod(i, 5) + (i << 3) - (i >> 1) * 7)
    assert torch.equal(outs[3], right)


def test_loops_and_branches(expect):
    start, steps = torch.tensor([27, 1, 97, 6], dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    expect("", collatz, (4,), start, steps)
    assert steps.tolist() == [111, 0, 118, 8]


def test_races(expect):
    x, out, scratch = torch.randn(512), torch.empty(512), torch.empty(512)
    expect("", reverse, (1,), scratch, x, out, BLOCK=512, BARRIER=True)
    assert torch.equal(out, x.flip(0))
    expect("race between warps", reverse, (1,), scratch, x, out, BLOCK=512, BARRIER=False)
    expect("race between lanes of a warp", reverse, (1,), scratch, x, out, BLOCK=128, BARRIER=False, warps=1)
    expect("", overwrite, (1,), x.clone(), out, BLOCK=512, BARRIER=True)
    expect("race between warps", overwrite, (1,), x.clone(), out, BLOCK=512, BARRIER=False)
    expect("race between programs", all_at_one_place, (3,), torch.empty(1, dtype=torch.int32))
    expect("", all_at_one_place, (1,), torch.empty(1, dtype=torch.int32))


def test_bounds_and_alignment(expect):
    out = torch.empty(512)
    expect("out of bounds", beyond, (1,), out, BEHIND=4, BLOCK=512)
    expect("", beyond, (1,), out, BEHIND=0, BLOCK=512)
    expect("misaligned", wrong_hint, (1,), torch.randn(600), out, 17, BLOCK=512)


def test_what_was_never_written(expect, device):
    out = torch.empty(512)
    with device:
        hole = torch.empty(512)
        hole[:100] = 1.0
        expect("", copied, (1,), hole, out, BLOCK=512, USE=100)
        device.expect_written("out", out)
        assert not device.faults
        expect("", copied, (1,), hole, out, BLOCK=512, USE=101)
        device.expect_written("out", out)
        assert [fault.kind for fault in device.faults] == ["undefined result"]
        expect("undefined branch", branch_on, (1,), hole[200:], torch.empty(1))


def test_what_lies_beside_a_view(expect, device):
    out = torch.empty(512)
    with device:
        device.fence(wide := torch.randn(600)[:512])
        expect("", copied, (1,), wide, out, BLOCK=512, USE=512)
        device.fence(narrow := torch.randn(600)[:511])
        expect("outside of the view", copied, (1,), narrow, out, BLOCK=512, USE=100)
