"""Draws the JSON of the pytest-benchmark suite: ``python -m bench.chart out/bench.json out/bench.png``."""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {"ours": "C2", "eager": "C0", "compiled": "C9", "authors": "C7"}


def times(record: dict) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of forward and backward together, by case, loss and provider."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in record["benchmarks"]:
        info = row["extra_info"]
        if info["pass"] == "both":
            found.setdefault(info["case"], {}).setdefault(info["loss"], {})[info["provider"]] = (
                1e3 * row["stats"]["median"]
            )
    return found


def draw(record: dict, path: Path) -> None:
    found = times(record)
    figure = Figure(figsize=(11, 2.6 * len(found)), layout="constrained")
    for axes, (case, losses) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True):
        for place, providers in enumerate(losses.values()):
            width = 0.8 / len(COLOURS)
            for number, (provider, colour) in enumerate(COLOURS.items()):
                if provider in providers:
                    at = place + (number - (len(COLOURS) - 1) / 2) * width
                    axes.bar(at, providers[provider], width, color=colour, label=provider if place == 4 else None)
        axes.set_xticks(range(len(losses)), losses)
        axes.set(title=case, ylabel="ms, forward + backward", yscale="log")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="upper right", ncols=len(COLOURS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args(arguments)
    draw(json.loads(options.record.read_text()), options.figure)
    print(f"chart: {options.figure}")


if __name__ == "__main__":
    main()
