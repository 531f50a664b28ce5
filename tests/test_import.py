"""Importing the package: quiet, quick, without Triton and without a driver; and what it offers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_losses as fl

PUBLIC = {
    "cross_entropy",
    "nllr_loss",
    "crl_loss",
    "lr_loss",
    "hs_lr_loss",
    "ss_lr_loss",
    "CrossEntropyLoss",
    "NLLRLoss",
    "CRLLoss",
    "LRLoss",
    "HSLRLoss",
    "SSLRLoss",
    "show_config",
}

USE = """
import torch
logits = torch.randn(4, 100, requires_grad=True)
for k in (None, 2, 50):
    fused_losses.crl_loss(logits, torch.arange(4), k=k).backward()
    fused_losses.ss_lr_loss(logits, torch.arange(4), k=k).backward()
assert logits.grad.isfinite().all()
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def test_public_names():
    assert set(fl.__all__) >= PUBLIC
    assert all(hasattr(fl, name) for name in fl.__all__)
    assert list(fl.__all__) == sorted(fl.__all__)
    offered = {name for name in vars(fl) if not name.startswith("_")}
    modules = {name for name in offered if isinstance(getattr(fl, name), type(sys))}
    assert offered - modules == set(fl.__all__)


def test_import_and_use_are_quiet_without_a_driver():
    """Triton importable, no GPU: hidden from torch where there is one."""
    finished = run(f"import fused_losses\n{USE}", CUDA_VISIBLE_DEVICES="")
    assert finished.stdout == ""
    assert finished.stderr == ""


def test_works_without_triton():
    finished = run(f"import sys; sys.modules['triton'] = None\nimport fused_losses\n{USE}\nfused_losses.show_config()")
    assert finished.stderr == ""


def test_import_loads_no_triton_and_starts_no_cuda():
    finished = run(
        "import sys, torch\nbefore = set(sys.modules)\nimport fused_losses\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not {'triton', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'torch._dynamo'} & new, new\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert finished.stderr == ""


def test_import_is_quick():
    """Beside torch's own import it is nothing: it brings the modules of this package without those of the kernels, and
    no others."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fused_losses\n"
        "for name in sorted(set(sys.modules) - before): print(name)\n"
    )
    new = run(code).stdout.split()
    own = {f"fused_losses.{path.stem}" for path in Path(fl.__file__).parent.glob("*.py")} - {"fused_losses.__init__"}
    assert set(new) == own | {"fused_losses", "fused_losses.gpu", "fused_losses.gpu.layout"}


def test_show_config_tells_what_serves_what(capsys):
    fl.show_config()
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for word in ("fused_losses", "torch", "triton", "CPU", "CUDA"):
        assert word in text
    # a backend for each, or the reference and why
    for device in ("CPU", "CUDA"):
        line = next(line for line in text.splitlines() if device in line)
        assert "reference" not in line or ":" in line, line


def test_show_config_without_triton():
    code = (
        "import sys, importlib.metadata as m\nsys.modules['triton'] = None\nreal = m.version\n"
        "def version(name):\n"
        "    if name == 'triton': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\nimport fused_losses\nfused_losses.show_config()"
    )
    line = next(line for line in run(code).stdout.splitlines() if "triton" in line.lower())
    assert re.search(r"not (installed|found|importable)", line), line


@pytest.mark.parametrize("module", ["functional", "modules", "autograd", "ops", "reference", "losses"])
def test_imports_run_downward(module):
    """functional -> autograd -> ops -> reference: nobody climbs back up."""
    above = {
        "reference": {"ops", "autograd", "functional", "modules"},
        "losses": {"reference", "ops", "autograd", "functional", "modules"},
        "ops": {"autograd", "functional", "modules"},
        "autograd": {"functional", "modules"},
        "functional": {"modules"},
        "modules": set(),
    }[module]
    source = Path(sys.modules[f"fused_losses.{module}"].__file__).read_text()
    imported = set(re.findall(r"^from \.(\w+) import", source, re.M))
    for names in re.findall(r"^from \. import (.+)$", source, re.M):
        imported |= {name.strip() for name in names.split(",")}
    assert not imported & above
