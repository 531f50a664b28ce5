"""The project's GPU doors on the emulator."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from triton_driver import Emulator, active

from bench.speed.machine_code import TARGETS
from fused_losses import ops
from fused_losses.gpu import device as gpu
from fused_losses.gpu import doors


class Backend:
    """``fused_losses.gpu.doors`` on an emulated device. Every call raises what the device found, a result that was not
    written wholly, whatever else was written, and an access beside the elements of the arguments."""

    def __init__(self, device: Emulator):
        self.device, self.calls, self.faulty = device, Counter(), 0

    def __getattr__(self, name):
        door = getattr(doors, name)

        def checked(*args):
            self.calls[name] += 1
            with self.device as device:
                device.fence(*(x for x in args if isinstance(x, torch.Tensor)))
                outputs = door(*args)
                if name == "at_once_":
                    written = *outputs, args[1]
                else:
                    written = args[2:3] if name == "backward_" else outputs
                for place, output in enumerate(written if isinstance(written, tuple) else (written,)):
                    device.expect_written(f"result {place} of {name}", output)
            self.faulty += bool(device.faults)
            device.check()
            return outputs

        return checked

    @contextmanager
    def launched(self):
        """The kernels are launched on the device, with the plans of a real one."""
        with pytest.MonkeyPatch.context() as patches, active(self.device):
            patches.setattr(gpu, "profile", lambda _: TARGETS[self.device.target][1])
            yield self

    @contextmanager
    def serving(self):
        """CPU tensors take the way of CUDA tensors, through the doors of this backend."""
        keeps_picks, cuda = ops.keeps_picks, torch.device("cuda")
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(ops, "_triton_backend", lambda *_: self)
            for name in ("forward", "statistics", "finish", "backward", "backward_"):
                patches.setattr(ops, name, getattr(ops, f"_{name}_on_cuda"))
            patches.setattr(ops, "at_once_", self.at_once_)
            patches.setattr(ops, "keeps_picks", lambda _, *shape: keeps_picks(cuda, *shape))
            yield
