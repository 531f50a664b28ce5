"""A user's file under the type checkers: they find every planted mistake, and nothing in what is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER = Path(__file__).with_name("typed_user.py")


def planted() -> list[int]:
    return [number for number, line in enumerate(USER.read_text().splitlines(), 1) if line.endswith("# wrong")]


def run(*command: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False, timeout=600, cwd=ROOT
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    return finished.stdout


def test_mypy(tmp_path):
    pytest.importorskip("mypy")
    options = ["--config-file=", "--python-version=3.10", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    said = run("mypy", *options, "--output=json", str(USER))
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert sorted({error["line"] for error in found if error["severity"] == "error"}) == planted(), said


def test_pyright():
    pytest.importorskip("pyright")
    said = run("pyright", "--outputjson", f"--pythonpath={sys.executable}", str(USER))
    found = json.loads(said[said.index("{") :])["generalDiagnostics"]
    lines = {error["range"]["start"]["line"] + 1 for error in found if error["severity"] == "error"}
    assert sorted(lines) == planted(), said
