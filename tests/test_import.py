"""Importing the package: quiet, quick, without Triton and without a driver; and what it offers."""

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_losses as fl
from fused_losses import ops

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
    "RowLoss",
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
    assert dir(fl) == sorted([*fl.__all__, "__version__"])


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


def test_version_is_that_of_the_metadata():
    assert fl.__version__ == importlib.metadata.version("fused_losses")


def lines_of(text: str) -> dict[str, str]:
    """What show_config says, by the first word of the line."""
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}


def test_show_config_tells_what_serves_what(capsys):
    said = fl.show_config()
    text = capsys.readouterr().out
    assert text == said + "\n"
    assert torch.__version__ in text
    assert fl.__version__ in text.splitlines()[0]
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
    line = lines_of(run(code).stdout)["triton"]
    assert line.startswith("not installed")
    assert 'pip install "triton>=3.6"' in line or "Linux alone" in line


@pytest.mark.parametrize("why", ["the C++ extension was not built", "the C++ extension does not load: symbol"])
def test_show_config_names_the_cure_where_the_extension_is_missing(monkeypatch, why):
    monkeypatch.setattr(ops, "_extension_failure", why)
    line = lines_of(fl.show_config())["CPU"]
    assert line.startswith(f"reference (plain PyTorch): {why}; ")
    assert "FUSED_LOSSES_BUILD_EXT=1 pip install" in line


@pytest.mark.parametrize("built", [False, True])
def test_show_config_says_why_there_is_no_device(monkeypatch, built):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = lines_of(fl.show_config())["CUDA"]
    assert line.startswith("none: torch sees no device" if built else "none: this torch is built without CUDA")
    assert ("nvidia-smi" if built else "https://pytorch.org") in line


@pytest.mark.parametrize("why", ["Triton is not usable (No module named 'triton')", "Tesla V100 is older", ""])
def test_show_config_says_why_a_device_is_not_served(monkeypatch, why):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops, "_import_triton_backend", lambda: (SimpleNamespace(unserved=lambda *_: why), ""))
    line = lines_of(fl.show_config())["CUDA"]
    assert line.startswith(f"reference (plain PyTorch): {why}" if why else "Triton kernels")
    assert ("triton>=3.6" in line or "Linux alone" in line) == ("Triton is" in why)


def test_show_config_tells_what_there_is_to_shard_with(monkeypatch):
    for gloo, nccl in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda there=gloo: there)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda there=nccl: there)
        said = f"gloo {'yes' if gloo else 'no'}, nccl {'yes' if nccl else 'no'}"
        assert lines_of(fl.show_config())["sharding"] == said
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    line = lines_of(fl.show_config())["sharding"]
    assert line.startswith("none: ")
    assert "https://pytorch.org" in line


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
