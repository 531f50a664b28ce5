"""Tables and a chart of recorded measurements: ``python -m bench.speed.report [--device cpu] [--only TEXT ...]``.

From the JSON files that ``python -m bench.speed.gpu --part PART --out bench/results/DEVICE`` wrote on machines with a
GPU, or, with ``--device cpu``, from that of ``python -m bench.speed --write``. Prints Markdown with the device and the
versions above every table, and draws every step beside those of the other providers. Times are medians of forward and
backward together. A file of a GPU gives up to three tables: a step as it is called, the processor's work included; the
same step as a CUDA graph, which is the device's time; both with cold caches; and the time the processor needs for it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.speed import cases, chart

RESULTS = Path(__file__).parents[1] / "results"
PARTS = {
    "family": "All negatives",
    "hardest": "The k hardest negatives",
    "options": "Cross-entropy with options",
    "peers": "Cross-entropy beside other projects",
}
NOTED = ("of a copy's speed", "kernels", "memory, MB")


@dataclass
class Record:
    """What one file holds."""

    caption: str
    times: chart.Times = field(default_factory=dict)
    notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # of ours, by case and loss
    noted: tuple[str, ...] = ()  # what they are

    def add(self, case: str, loss: str, provider: str, milliseconds: float) -> None:
        self.times.setdefault(case, {}).setdefault(loss, {})[provider] = milliseconds


def as_timed(row: dict, name: str) -> tuple[float, list[str]]:
    """-> (milliseconds, notes)"""
    times, kernels, memory = row[name], row["kernels_per_step"], row.get("peak_bytes")
    return times["median"], [
        f"{100 * times['of_copy']:.0f} %",
        "-" if kernels is None else str(kernels),
        "-" if memory is None else f"{memory / 1e6:.1f}",
    ]


# How a step was timed: its name, what a row must hold, the notes, and the row's milliseconds with these.
Timing = tuple[str, str, tuple[str, ...], Callable[[dict], tuple[float, list[str]]]]
TIMINGS: dict[str, Timing] = {
    "": ("as called", "full cold", NOTED, lambda row: as_timed(row, "full cold")),
    "graph": ("as a CUDA graph", "full graph", NOTED, lambda row: as_timed(row, "full graph")),
    "processor": ("the processor's time", "processor", (), lambda row: (row["processor"] / 1000, [])),
}


def gpu_record(part: str, found: dict, timing: Timing) -> Record:
    name, field_of_row, noted, read = timing
    caption = f"{PARTS[part]}, {name}: {found['device']}, torch {found['torch']}, Triton {found['triton']}"
    if "copy GB/s" in found:
        caption += f", a copy moves {found['copy GB/s']:.0f} GB/s"
    record = Record(caption, noted=noted)
    for key, row in found["rows"].items():
        loss, shape, dtype, provider = key.split(" | ")
        name, _, rest = loss.partition(", ")
        case, loss = f"{shape} {dtype}", ", ".join(filter(None, (cases.NAMES.get(name, name), rest)))
        if "error" in row:
            record.add(case, loss, provider, float("nan"))
        elif field_of_row in row:
            milliseconds, notes = read(row)
            record.add(case, loss, provider, milliseconds)
            if provider == "ours":
                record.notes[case, loss] = notes
    return record


def cpu_record(found: dict) -> Record:
    caption = f"{found['processor']}, {found['threads']} threads, {found['kernels']}, torch {found['torch']}"
    record = Record(caption)
    for case, medians in found["cases"].items():
        for name, milliseconds in medians.items():
            loss, _, provider = name.partition(", ")
            if provider:  # else the floor, of no loss
                record.add(case, loss, provider, milliseconds)
    return record


def chosen(record: Record, only: list[str]) -> Record:
    """The rows whose case or loss holds each of the texts."""
    times: chart.Times = {}
    for case, losses in record.times.items():
        for loss, providers in losses.items():
            if all(text in f"{case} {loss}" for text in only):
                times.setdefault(case, {})[loss] = providers
    return Record(record.caption, times, record.notes, record.noted)


def table(record: Record) -> str:
    """Markdown: milliseconds, and how many times ours the others take."""
    rows = [(case, loss, of) for case, losses in record.times.items() for loss, of in losses.items()]
    others = [name for name in chart.COLOURS if name != "ours" and any(name in of for *_, of in rows)]

    def cell(of: dict[str, float], provider: str) -> str:
        if provider not in of:
            return "-"
        if of[provider] != of[provider]:
            return "failed"
        beside = "" if provider == "ours" or "ours" not in of else f" ({of[provider] / of['ours']:.2f}x)"
        return f"{of[provider]:.3f}{beside}"

    lines = [("case", "loss", "ours, ms", *record.noted, *others)]
    lines.append(("---",) * len(lines[0]))
    for case, loss, of in rows:
        notes = record.notes.get((case, loss), ["-"] * len(record.noted))
        lines.append((case, loss, cell(of, "ours"), *notes, *(cell(of, name) for name in others)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def records(device: str, folder: Path) -> dict[str, Record]:
    """By the name of the file within the folder and how it was timed; empty where there is none."""
    if device == "cpu":
        path = folder / "cpu.json"
        return {"cpu": cpu_record(json.loads(path.read_text()))} if path.exists() else {}
    found = {}
    for path in sorted(path for part in PARTS for path in folder.rglob(f"{part}.json")):
        of_file = json.loads(path.read_text())
        for name, timing in TIMINGS.items():
            if not name or any(timing[1] in row for row in of_file["rows"].values()):
                parts = (*path.relative_to(folder).with_suffix("").parts, name)
                found["-".join(filter(None, parts))] = gpu_record(path.stem, of_file, timing)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.report", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    parser.add_argument("--charts", type=Path, default=Path("out"), help="folder of the charts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose case or loss holds each TEXT")
    options = parser.parse_args(arguments)
    found = records(options.device, options.results)
    if not found:
        parser.error(
            f"nothing was measured on a GPU: {options.results} holds no {', '.join(f'{part}.json' for part in PARTS)} "
            "at any depth; "
            "run python -m bench.speed.gpu where there is one"
            if options.device == "gpu"
            else f"no cpu.json in {options.results}: run python -m bench.speed --write"
        )
    for name, record in found.items():
        record = chosen(record, options.only)
        if not record.times:
            print(f"{name}: no row holds {' and '.join(options.only)}\n" if options.only else f"{name}: no rows yet\n")
            continue
        path = options.charts / f"{name}.png"
        chart.draw(record.times, path, record.caption)
        print(f"{record.caption}\n\n{table(record)}\n\nchart: {path}\n")


if __name__ == "__main__":
    main()
