"""The JSON files under bench/results: hyper-parameters chosen, NAME.json, and what the runs with them gave,
NAME-runs.json. Each loss is written when it is done, so that processes may share the losses of a file among them."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


class RecordError(Exception):
    """A record is missing, or was made under other conditions."""


def versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def read(path: Path) -> dict:
    """The record, or one without losses where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"losses": {}}


def check_budget(path: Path, budget: dict, names: list[str]) -> None:
    """Before anything is run: the other losses of the file must have had the same budget."""
    record = read(path)
    others = [name for name in record["losses"] if name not in names]
    if others and record.get("budget") != budget:
        raise RecordError(
            f"{path} holds {', '.join(others)} with another budget, {record.get('budget')}, than {budget}: "
            "run these too, or give another folder with --results"
        )


def write(path: Path, head: dict, name: str, entry: dict, order: list[str]) -> None:
    """Puts one loss into the file, or in the place of what it held; what had another budget goes. `order`: the losses
    of the table."""
    old = read(path)
    losses = old["losses"] if old.get("budget") == head["budget"] else {}
    losses[name] = entry
    rank = {name: number for number, name in enumerate(order)}
    losses = {name: losses[name] for name in sorted(losses, key=lambda name: rank.get(name, len(rank)))}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(head | {"losses": losses}, indent=2) + "\n")
    whole.replace(path)


def settings_of(path: Path, names: list[str]) -> dict[str, dict]:
    """The hyper-parameters recorded for each of the losses."""
    losses = read(path)["losses"]
    missing = [name for name in names if name not in losses]
    if missing:
        raise RecordError(f"{path} has no hyper-parameters for {', '.join(missing)}: run with --tune first")
    return {name: losses[name]["settings"] for name in names}
