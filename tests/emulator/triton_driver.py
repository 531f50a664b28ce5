"""A Triton driver whose device is ``machine.cpp``, so that ``kernel[grid](...)`` compiles as for a GPU and runs here.

Nothing of Triton's just-in-time compiler is replaced: specialisation of arguments, options, cache and the assembler's
check of the PTX are those of a launch on a GPU. ``Emulator`` is the device; used as a context it also follows which
bytes of the tensors made meanwhile have been written.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

import emulator


class Faulty(AssertionError):
    """What a GPU would not forgive."""


class _Utils:
    def load_binary(self, name, cubin, shared, device):
        return object(), None, 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448 if device >= 90 else 166912, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    """Stands where Triton's C launcher would: it is called with the grid and all arguments, constants included."""

    def __init__(self, src, metadata):
        if metadata.num_ctas != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise emulator.UnknownInstruction("clusters or scratch memory of the compiler")
        self.arguments = list(src.signature.items())
        self.ptx = Path(get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.ptx"))
        self.resources = metadata.num_warps, metadata.shared
        self.kernels: dict[Callable[[str], str], emulator.Kernel] = {}

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        device = triton.runtime.driver.active
        if device.edit not in self.kernels:
            self.kernels[device.edit] = emulator.Kernel(device.edit(self.ptx.read_text()), *self.resources)
        given = [
            (name, value) for (name, kind), value in zip(self.arguments, arguments, strict=True) if kind != "constexpr"
        ]
        device.run(self.kernels[device.edit], (x, y, z), given)


def _unchanged(ptx: str) -> str:
    return ptx


class Emulator(DriverBase, TorchDispatchMode):
    """The device. ``faults`` holds what was found. ``edit`` may put other PTX in the place of the compiler's.

    Outside of ``with emulator:`` every byte counts as written. Inside, what torch.empty and its like return counts as
    undefined until a kernel or an operator writes it.
    """

    def __init__(self, target: str = "sm_90", seed: int = 0, noise: int = 0):
        TorchDispatchMode.__init__(self)
        self.target, self.seed, self.noise = target, seed, noise
        self.arch = int(target.removeprefix("sm_"))
        self.edit = _unchanged
        self.utils, self.launcher_cls = _Utils(), _Launcher
        self.faults: list[emulator.Fault] = []
        self.instructions = 0
        self.launches: Counter = Counter()  # by kernel
        self.binaries: set[emulator.Kernel] = set()
        self._states: dict[int, tuple[torch.UntypedStorage, np.ndarray]] = {}
        self._fresh: set[int] = set()

    # --- what Triton asks of a driver ---

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return self.arch  # kernels of different targets are cached apart

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise NotImplementedError

    # --- what memory holds ---

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            storage = result.untyped_storage()
            self._states[storage.data_ptr()] = storage, np.full(storage.nbytes(), emulator.UNDEFINED, np.uint8)
            self._fresh.add(storage.data_ptr())
        elif self._states:
            for argument, value in zip(function._schema.arguments, args, strict=False):
                written = argument.alias_info and argument.alias_info.is_write and isinstance(value, torch.Tensor)
                if written and value.untyped_storage().data_ptr() in self._states:
                    bytes_of(value, self.states(value))[...] &= ~np.uint8(emulator.UNDEFINED)
        return result

    def __enter__(self):
        self._states.clear(), self._fresh.clear()
        return super().__enter__()

    def __exit__(self, *error):
        self._states.clear(), self._fresh.clear()
        return super().__exit__(*error)

    def states(self, tensor: torch.Tensor) -> np.ndarray:
        storage = tensor.untyped_storage()
        known = self._states.get(storage.data_ptr())
        if known is None or known[1].size != storage.nbytes():
            known = storage, np.zeros(storage.nbytes(), np.uint8)
            if self in _get_current_dispatch_mode_stack():
                self._states[storage.data_ptr()] = known
        return known[1]

    def fence(self, *tensors: torch.Tensor) -> None:
        """From now on any access to the storage of these tensors outside of their elements is a fault."""
        for tensor in tensors:
            self.states(tensor)[...] |= emulator.FENCED
        for tensor in tensors:
            bytes_of(tensor, self.states(tensor))[...] &= ~np.uint8(emulator.FENCED)

    def expect_written(self, name: str, tensor: torch.Tensor) -> None:
        """A fault unless every element was written with a defined value, and nothing around them."""
        states = self.states(tensor)
        undefined = int((bytes_of(tensor, states) & emulator.UNDEFINED).astype(bool).sum())
        if undefined:
            self.faults.append(_fault("undefined result", name, f"{undefined} bytes of {name} {tuple(tensor.shape)}"))
        if tensor.untyped_storage().data_ptr() in self._fresh and tensor.numel():
            around = states.copy()
            bytes_of(tensor, around)[...] = emulator.UNDEFINED
            if not (around & emulator.UNDEFINED).all():
                where = np.flatnonzero(~around & emulator.UNDEFINED)[:4].tolist()
                self.faults.append(_fault("written around a result", name, f"bytes {where} of {name}"))

    # --- launches ---

    def run(self, kernel: emulator.Kernel, grid: tuple[int, int, int], given: list) -> None:
        memories = {}
        for name, value in given:
            if not isinstance(value, torch.Tensor):
                continue
            base = value.untyped_storage().data_ptr()
            if base in memories:
                memories[base].granule = min(memories[base].granule, value.element_size())
                memories[base].name += f" = {name}"
            elif value.untyped_storage().nbytes():
                label = f"{name} {tuple(value.shape)}"
                memories[base] = emulator.Memory(label, base, self.states(value), value.element_size())
        params = [value.data_ptr() if isinstance(value, torch.Tensor) else value for _, value in given]
        params += [0] * (len(kernel.params) - len(params))  # scratch memory of the compiler: none
        self.seed = self.seed and self.seed + 1
        run = kernel.run(grid, params, list(memories.values()), self.seed, self.noise)
        self.faults += run.faults
        self.instructions += run.instructions
        self.launches[kernel.name] += 1
        self.binaries.add(kernel)

    def check(self) -> None:
        """Raises what was found since the last check."""
        found, self.faults = self.faults, []
        if found:
            raise Faulty("\n".join(map(str, found)))


def _fault(kind: str, name: str, where: str) -> emulator.Fault:
    return emulator.Fault(kind, name, "the end of the door", "", where, 1)


def bytes_of(tensor: torch.Tensor, states: np.ndarray) -> np.ndarray:
    """The states of the bytes of a tensor's elements, as a view of the states of its storage."""
    size = tensor.element_size()
    strides = (*(stride * size for stride in tensor.stride()), 1)
    if 0 in tensor.shape:
        return states[:0]
    return np.lib.stride_tricks.as_strided(states[tensor.storage_offset() * size :], (*tensor.shape, size), strides)


@contextmanager
def active(device: Emulator):
    """Triton launches on this device."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(device)
    try:
        yield device
    finally:
        triton.runtime.driver._active = before
