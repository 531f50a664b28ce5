"""Draws the JSON of the pytest-benchmark suite: ``python -m bench.speed.chart out/bench.json out/bench.png``."""

import argparse
import json
import math
from pathlib import Path

from matplotlib.figure import Figure

Times = dict[str, dict[str, dict[str, float]]]  # milliseconds of a step, by case, loss and provider

COLOURS = {
    "ours": "C2", "ours, compact": "C8", "ours, threshold": "C5", "eager": "C0", "compiled": "C9", "authors": "C7",
    "topk": "C3", "liger": "C1", "quack": "C4",
}  # fmt: skip


def times(record: dict) -> Times:
    """Of forward and backward together, from a record of pytest-benchmark."""
    found: Times = {}
    for row in record["benchmarks"]:
        info = row["extra_info"]
        if info["pass"] == "both":
            found.setdefault(info["case"], {}).setdefault(info["loss"], {})[info["provider"]] = (
                1e3 * row["stats"]["median"]
            )
    return found


def draw(found: Times, path: Path, caption: str = "") -> None:
    """Bars of one case per row of the figure."""
    present = {provider for losses in found.values() for providers in losses.values() for provider in providers}
    colours = {provider: colour for provider, colour in COLOURS.items() if provider in present}
    width = 0.8 / len(colours)
    figure = Figure(figsize=(11, 2.6 * len(found) + 0.4), layout="constrained")
    figure.suptitle(caption, fontsize="medium")
    for axes, (case, losses) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True):
        for number, (provider, colour) in enumerate(colours.items()):
            measured = ((place, of.get(provider, math.nan)) for place, of in enumerate(losses.values()))
            bars = {place: value for place, value in measured if not math.isnan(value)}
            places = [place + (number - (len(colours) - 1) / 2) * width for place in bars]
            axes.bar(places, list(bars.values()), width, color=colour, label=provider)
        axes.set_xticks(range(len(losses)), [loss.replace(", ", "\n") for loss in losses], fontsize="small")
        axes.set(title=case, ylabel="ms, forward + backward", yscale="log" if axes.patches else "linear")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.chart", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args(arguments)
    draw(times(json.loads(options.record.read_text())), options.figure)
    print(f"chart: {options.figure}")


if __name__ == "__main__":
    main()
