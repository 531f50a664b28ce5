"""Fixtures of the GPU backend's tests. They need a process of their own, ``pytest tests/gpu``: where there is no GPU
they run in Triton's interpreter, which must be asked for before Triton is imported."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from gpu_doors import INTERPRETED
from gpu_regimes import forced_plan
from torch import Tensor
from triton.runtime import interpreter

from fused_losses.gpu import device as gpu
from fused_losses.gpu import hardest


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """The interpreter patches the language again at every call of a jitted function: half of its time on small rows. It
    works out for every integer sum whether it overflows, and then asserts it only in debug mode: half of the rest."""
    patch, run, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        language = id(function.__globals__)
        if language in patched:
            return interpreter._LangPatchScope()
        patched.add(language)
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang", patch_once)
        patches.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        builder = interpreter.interpreter_builder
        assert not builder.options.debug
        patches.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


def _pairs(operation, element):
    """An operation on two elements of 16 bits, in each half of an int32."""

    def of_pairs(*words):
        halves = (_halves(word) for word in words)
        x = operation(*(_float32(half, element) for half in halves))
        if element == tl.bfloat16:
            bits = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy()
        else:
            bits = x.astype(np.float16).view(np.int16)
        bits = np.where(np.isnan(x), np.int16(0x7FFF), bits)  # as a GPU's arithmetic has it: without a sign
        return np.ascontiguousarray(bits).view(np.int32)

    return of_pairs


def _halves(word):
    return np.ascontiguousarray(np.atleast_1d(word.data)).view(np.int16)


def _float32(halves, element):
    kind = torch.bfloat16 if element == tl.bfloat16 else torch.float16
    return torch.from_numpy(halves.copy()).view(kind).float().numpy()


def _of_both(operation):
    return {"bf16x2": _pairs(operation, tl.bfloat16), "f16x2": _pairs(operation, tl.float16)}


def _signs(pairs):
    return (_halves(pairs) >> 15).view(np.int32)


def _number_of(bits):
    return np.array([int(x).bit_count() for x in bits.data.ravel().view(np.uint32)], np.int32).reshape(bits.data.shape)


# The inline-assembly instructions of the kernels, as the interpreter's builder would return them.
INSTRUCTIONS = {
    "rcp.approx.ftz.f32": lambda x: 1 / x.data,
    "lg2.approx.ftz.f32": lambda x: np.log2(x.data),
    "popc.b32": _number_of,
    "prmt.b32": _signs,
    **{f"fma.rn.{pair}": of for pair, of in _of_both(lambda a, b, c: a * b + c).items()},
    **{f"max.NaN.{pair}": of for pair, of in _of_both(np.maximum).items()},
    **{f"min.{pair}": of for pair, of in _of_both(np.fmin).items()},
}


class _Result:
    def __init__(self, data, dtype):
        self.data, self.dtype = data, dtype

    def get_result(self, _):
        return interpreter.TensorHandle(self.data, self.dtype)


def create_inline_asm(self, assembly, constraints, values, *_):
    with np.errstate(all="ignore"):
        return _Result(INSTRUCTIONS[assembly.split()[0]](*values), values[0].dtype)


@pytest.fixture(autouse=True)
def small_device(monkeypatch):
    """An NVIDIA device of one small multiprocessor: tiles of 64 classes, so that short rows have several, whole ones, a
    cut one and a rim. Whole rows, unless split."""
    if INTERPRETED:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
        monkeypatch.setattr(gpu, "profile", lambda _: gpu.Device(1, 4, nvidia=True))
        monkeypatch.setattr(gpu, "tile_for", lambda classes, itemsize, small: gpu.Tile(1, itemsize))


@pytest.fixture
def split_rows(monkeypatch):
    """Three programs for every row of three tiles or more."""
    monkeypatch.setattr(gpu, "parts_for", lambda device, rows, tiles: min(3, tiles))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty hands out NaN, so that an element which nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def shuffled_grid(monkeypatch):
    """Programs run in a random order: the interpreter's own order would hide a dependency between them."""
    if not INTERPRETED:
        return
    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order = {}

    def set_grid_dim(*dim):
        count = dim[0] * dim[1] * dim[2]
        order.update(dim=dim, places=torch.randperm(count).tolist())
        set_dim(*dim)

    def set_grid_idx(x, y, z):
        _, height, depth = order["dim"]
        place = order["places"][(x * height + y) * depth + z]
        set_idx(place // (height * depth), place // depth % height, place % depth)

    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)


@pytest.fixture
def force(monkeypatch):
    """force(regime) for every launch that follows."""
    return lambda regime: monkeypatch.setattr(hardest, "plan", lambda *of: forced_plan(regime, *of))


@pytest.fixture
def traffic(monkeypatch):
    """traffic(tensor) -> (elements read, elements written) of a tensor so far, by the addresses of active lanes."""
    if not INTERPRETED:
        pytest.skip("counts what the interpreter reads and writes")
    builder, reads, writes = interpreter.InterpreterBuilder, [], []
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self, pointers, mask, *rest):
        reads.append(pointers.data[mask.data].ravel())
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        writes.append(pointers.data[mask.data].ravel())
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)

    def counted(tensor: Tensor) -> tuple[int, int]:
        first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        return tuple(sum(int(((at >= first) & (at < first + size)).sum()) for at in found) for found in (reads, writes))

    counted.everything = lambda: (sum(map(len, reads)), sum(map(len, writes)))
    return counted
