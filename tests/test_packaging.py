"""What is published: the tags of the wheels, and what their papers say."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fused_losses as fl

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text()


@pytest.fixture
def sources(tmp_path):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fused_losses"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build_wheel(sources: Path, **environment: str) -> subprocess.CompletedProcess:
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    return subprocess.run(
        [sys.executable, "-c", build], capture_output=True, text=True, check=False, timeout=1800,
        env=os.environ | environment, cwd=sources,
    )  # fmt: skip


NO_COMPILER = {"CXX": "false", "CC": "false"}


@pytest.mark.parametrize(
    "environment", [{"FUSED_LOSSES_BUILD_EXT": "0"}, {"FUSED_LOSSES_BUILD_EXT": "auto", **NO_COMPILER}], ids=str
)
def test_wheel_without_the_extension_is_for_every_machine(sources, environment):
    stale = sources / "build" / f"lib.linux-x86_64-{sys.implementation.cache_tag}" / "fused_losses" / "_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    built = build_wheel(sources, **environment)
    assert built.returncode == 0, built.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name == f"fused_losses-{fl.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert b"Root-Is-Purelib: true" in file.read(f"fused_losses-{fl.__version__}.dist-info/WHEEL")
    assert not [name for name in names if name.endswith(".so") or ".data/" in name]
    assert {"fused_losses/py.typed", "fused_losses/gpu/doors.py"} <= set(names)


def test_no_wheel_without_an_extension_that_is_asked_for(sources):
    built = build_wheel(sources, FUSED_LOSSES_BUILD_EXT="1", **NO_COMPILER)
    assert built.returncode != 0
    assert not list((sources / "dist").glob("*.whl"))


@pytest.mark.slow
def test_wheel_with_the_extension_is_for_every_python(sources):
    built = build_wheel(sources, FUSED_LOSSES_BUILD_EXT="1")
    assert built.returncode == 0, built.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert re.fullmatch(rf"fused_losses-{re.escape(fl.__version__)}-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        assert [name for name in file.namelist() if re.fullmatch(r"fused_losses/_C\.abi3\.\w+", name)]


def test_one_version():
    (version,) = re.findall(r'^version = "(.+)"$', PROJECT, re.M)
    assert fl.__version__ == version
    cff = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", cff, re.M)[1] == version
    date = re.search(r"^date-released: (.+)$", cff, re.M)[1]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[:2] == ["[Unreleased]", f"[{version}] - {date}"]


def test_ci_runs_what_is_promised():
    """Every Python of the classifiers, the oldest torch, and the systems."""
    (oldest,) = re.findall(r'^requires-python = ">=(.+)"$', PROJECT, re.M)
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert pythons[0] == oldest
    assert set(re.findall(r'python(?:-version)?: "(3\.\d+)"', CI)) == set(pythons)
    (oldest_torch,) = re.findall(r'^    "torch>=(.+)",$', PROJECT, re.M)
    assert f'torch: "{oldest_torch}.*"' in CI
    systems = {"Linux": "ubuntu", "MacOS": "macos", "Windows": "windows"}
    for classifier in re.findall(r'"Operating System :: (?:.+ :: )?(\w+)"', PROJECT):
        assert systems.pop(classifier) in CI
    assert not systems
    assert "run: .ci/run" in CI


def test_nothing_that_is_installed_imports_numpy():
    for path in Path(fl.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) numpy", path.read_text(), re.M), path
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", PROJECT, re.M | re.S)[1]
    assert "numpy" not in dependencies


def test_the_page_of_a_package_index_has_no_relative_links(tmp_path, monkeypatch):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    script = runpy.run_path(str(ROOT / ".github" / "address.py"))
    text = (
        tmp_path / "README.md"
    ).read_text() + '\n![a](docs/a.svg) <img alt="b" src="docs/b.png"> [c](d.md#e) [f](#g)\n'
    (tmp_path / "README.md").write_text(text)
    relative = [link["path"] for link in script["LINK"].finditer(text)]
    assert {"docs/a.svg", "docs/b.png", "d.md#e"} <= set(relative)
    for path in relative[:-3]:
        assert (ROOT / path.partition("#")[0]).exists(), path
    monkeypatch.chdir(tmp_path)
    script["main"]("https://host.example/owner/name/", "v1.2.3")
    written = Path("README.md").read_text()
    assert not list(script["LINK"].finditer(written))
    end = '![a](https://host.example/owner/name/raw/v1.2.3/docs/a.svg) <img alt="b" '
    end += 'src="https://host.example/owner/name/raw/v1.2.3/docs/b.png"> '
    assert written.endswith(f"{end}[c](https://host.example/owner/name/blob/v1.2.3/d.md#e) [f](#g)\n")
    assert (
        'Changelog = "https://host.example/owner/name/blob/v1.2.3/CHANGELOG.md"' in Path("pyproject.toml").read_text()
    )


def test_a_report_of_a_bug_has_the_configuration():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "fused_losses.show_config()" in form
