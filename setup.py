"""Builds the optional C++ extension (the CPU kernels); everything else about the package stands in pyproject.toml.

FUSED_LOSSES_BUILD_EXT=auto (default)  try; without a working compiler or torch, install without it, and plain PyTorch
                                       serves the CPU
FUSED_LOSSES_BUILD_EXT=1               a build that fails fails the install
FUSED_LOSSES_BUILD_EXT=0               do not try
FUSED_LOSSES_CXXFLAGS=...              more flags for the compiler, behind ours (not on Windows)
"""

import glob
import os
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import setup

if int(setuptools.__version__.split(".")[0]) < 77:  # pip checks that only where it builds in an environment of its own
    raise SystemExit(
        f"fused_losses is built by setuptools 77 or newer, and here is {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )

MODE = os.environ.get("FUSED_LOSSES_BUILD_EXT", "auto")
if MODE not in ("0", "1", "auto"):
    raise SystemExit(f"FUSED_LOSSES_BUILD_EXT must be 0, 1 or auto, got {MODE!r}")


def give_up(why: BaseException) -> None:
    if MODE == "1":
        raise why
    notice = f"installing WITHOUT the C++ extension, plain PyTorch will serve the CPU: {why}"
    print(f"\nfused_losses: {notice}\n", file=sys.stderr)


def extension() -> dict:
    """What setup() is told of the extension; nothing where it is not wanted or torch is not there to build against."""
    if MODE == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        give_up(error)
        return {}
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        give_up(RuntimeError(f"torch {torch.__version__} is older than 2.10"))
        return {}
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        give_up(RuntimeError("a Python without the GIL has no stable ABI to build for"))
        return {}

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                give_up(error)
                self.leave_out()

        def leave_out(self):
            """A wheel without the extension is one for every Python and machine, and its name says so."""
            for path in self.get_outputs():  # of an earlier build, whose sources were others
                Path(path).unlink(missing_ok=True)
            self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True

    if sys.platform == "win32":
        flags = ["/O2"]
    else:
        # Never -ffast-math: infinities and NaN have their meaning here. No contraction: left to its choice, the
        # compiler fuses a sum in one copy of an inlined function and not in another, and bits would depend on which
        # thread does what.
        flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
        flags += os.environ.get("FUSED_LOSSES_CXXFLAGS", "").split()  # last, so that they win
    module = CppExtension(
        "fused_losses._C",
        sorted(glob.glob("csrc/*.cpp")),
        depends=sorted(glob.glob("csrc/*.h")),
        extra_compile_args={"cxx": ["-DTORCH_TARGET_VERSION=0x020a000000000000", *flags]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
