"""Puts the recorded results into docs/evidence.md and draws its figures: `python -m bench.evidence`.

The page marks the place of each table and figure with a pair of comments, `<!-- KIND NAME -->` and `<!-- end -->`; what
stands between is rewritten from bench/results. Where nothing was recorded it says so, and no number stands there.
"""

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from bench.evidence import extreme, figures, k_and_alpha, records
from bench.evidence.fit import FIRST
from bench.evidence.significance import paired
from bench.evidence.tables import counted, spell, spread, table
from bench.speed.linear import MIB

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
BLOCK = re.compile(r"(<!-- (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING = "*Not measured yet.*"
AGAINST = (
    ("HS-LR", "LR"), ("SS-LR", "LR"), ("CE, k hardest", "CE"), ("CE, k hardest", "CE, 10 % random"),
    ("HS-LR", "CE, 10 % random"), ("CE, cosines", "CE"), ("CosFace", "CE, cosines"), ("ArcFace", "CE, cosines"),
    ("CosFace, k hardest", "CosFace"), ("ArcFace, k hardest", "ArcFace"), ("LR, cosines", "LR"),
    ("HS-LR, cosines", "HS-LR"), ("SS-LR, cosines", "SS-LR"), ("LR, cosines", "CE, cosines"),
    ("LR, cosines", "ArcFace"), ("SS-LR", "CE, cosines"), ("HS-LR", "SS-LR"),
)  # fmt: skip
REACHED = 0.95
BASELINES = ("CE", "LR")  # what the others are compared with: the first of them that took part


def runs_of(results: Path, name: str) -> dict | None:
    """The record of the runs, or None."""
    record = records.read(results / f"{name}-runs.json")
    return record if record["losses"] else None


def among_many(results: Path, name: str) -> dict[int, dict]:
    """By number of classes, the records of a data set that was padded to several."""
    sizes = {}
    for path in results.glob(f"{name}-*-runs.json"):
        number = path.name.removeprefix(f"{name}-").removesuffix("-runs.json")
        if number.isdecimal():
            sizes[int(number)] = records.read(path)
    return dict(sorted(sizes.items()))


def conditions(record: dict) -> str:
    """Where the numbers come from."""
    budget = record["budget"]
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"`{record['command']}`: {counted(len(budget['seeds']), 'seed')}, {counted(budget['epochs'], 'epoch')}, "
        f"{budget['device']}, {counted(record['threads'], 'thread')}; {packages}."
    )


def percent(scores: list[float]) -> list[float]:
    return [100 * score for score in scores]


def result_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """Test metrics, and the difference of the first of them to the baseline."""
    record = runs_of(results, name)
    if record is None:
        return None
    losses = record["losses"]
    metrics = list(next(iter(losses.values()))["test"])
    baseline = next((loss for loss in BASELINES if loss in losses), None)
    header = ["loss", "hyper-parameters", *(f"{metric}, %" for metric in metrics)]
    tested = (
        paired({loss: percent(of["test"][metrics[0]]) for loss, of in losses.items()}, baseline) if baseline else {}
    )
    if tested:
        header += [f"{metrics[0]} less {baseline}'s", "p"]
    rows = []
    for loss, of in losses.items():
        row = [loss, spell(of["settings"]), *(spread(percent(scores)) for scores in of["test"].values())]
        if tested:
            difference, p = tested.get(loss, (None, None))
            row += ["", ""] if difference is None else [f"{difference:+.2f}", f"{p:.2g}"]
        rows.append(row)
    return f"{conditions(record)}\n\n{table(header, rows)}"


def against_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """What one change gives, all else alike: pairs that differ in it."""
    record = runs_of(results, name)
    if record is None:
        return None
    scores = {loss: percent(next(iter(of["test"].values()))) for loss, of in record["losses"].items()}
    pairs = [(one, other) for one, other in AGAINST if one in scores and other in scores]
    differences = {pair: [a - b for a, b in zip(scores[pair[0]], scores[pair[1]], strict=True)] for pair in pairs}
    tested = paired(differences | {"nothing": [0.0] * len(record["budget"]["seeds"])}, "nothing")
    metric = next(iter(next(iter(record["losses"].values()))["test"]))
    rows = [[one, other, f"{tested[one, other][0]:+.2f}", f"{tested[one, other][1]:.2g}"] for one, other in pairs]
    return table(["loss", "against", f"difference in {metric}, %", "p"], rows)


def tuning_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """What was chosen, from what, with which budget."""
    record = records.read(results / f"{name}.json")
    if not record["losses"]:
        return None

    def searched(axis: dict) -> str:
        return f"{axis['low']:g} to {axis['high']:g}" if "low" in axis else ", ".join(map(str, axis["options"]))

    rows = []
    for loss, of in record["losses"].items():
        space = "; ".join(f"{name} {searched(axis)}" for name, axis in of["space"].items() if name != "prior_bias")
        rows.append([loss, space, spell(of["settings"]), spread(percent(of["validation"]))])
    budget = record["budget"]
    runs = f"{counted(len(budget['seeds']), 'seed')} for {counted(budget['epochs'], 'epoch')}"
    said = (
        f"`{record['command']}`: for every loss {budget['trials']} settings, each run with {runs}. "
        "Every loss could also choose whether to start from the prior bias."
    )
    return f"{said}\n\n{table(['loss', 'searched', 'chosen', 'validation, %'], rows)}"


def many_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """Test metric and time of the loss against the number of classes."""
    sizes = among_many(results, name)
    if not sizes:
        return None
    names = list(dict.fromkeys(loss for record in sizes.values() for loss in record["losses"]))
    rows = []
    for loss in names:
        row = [loss]
        for record in sizes.values():
            of = record["losses"].get(loss)
            row.append(
                "" if of is None else f"{spread(percent(next(iter(of['test'].values()))))}, {of['loss_ms']:.3g} ms"
            )
        rows.append(row)
    said = "\n".join(f"- {conditions(record)}" for record in sizes.values())
    return f"{said}\n\n{table(['loss', *(f'{number:,} classes' for number in sizes)], rows)}"


def epochs_until(of: dict, score: float) -> list[int | None]:
    """Of each seed, the first epoch behind which the validation split is scored so, or None."""
    return [
        next((epoch for epoch, found in enumerate(run, 1) if found >= score), None)
        for run in of["curves"]["validation"]
    ]


def costs_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """Accuracy per step, per second of the classifier and its loss, and per byte."""
    record, costs = runs_of(results, name), records.read(results / f"{name}-costs.json")
    if record is None or not costs["losses"]:
        return None
    rows = []
    for loss, of in record["losses"].items():
        cost, epochs = costs["losses"][loss], epochs_until(of, REACHED)
        there = [epoch for epoch in epochs if epoch is not None]
        steps = costs["steps_per_epoch"] * statistics.median(there) if len(there) == len(epochs) else None
        partly = f"{len(there)} of {len(epochs)} runs"
        rows.append([
            loss, spread(percent(next(iter(of["test"].values())))), f"{cost['ms']:.0f}", f"{cost['bytes'] / MIB:.0f}",
            *((partly, "") if steps is None else (f"{steps:.0f}", f"{steps * cost['ms'] / 1000:.1f}")),
        ])  # fmt: skip
    said = f"`{costs['command']}`: {costs['shape']}, float32, one thread; torch {costs['versions']['torch']}."
    reached = f"{100 * REACHED:.0f} % on the validation split"
    header = ["loss", "accuracy, %", "ms a step", "MiB", f"steps until {reached} (median)", "seconds of these"]
    return f"{said}\n\n{table(header, rows)}"


def extreme_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """Precision on made rows with very many labels; what is tested is the precision at five."""
    record = records.read(results / f"{name}.json")
    losses = record["losses"]
    if not losses:
        return None
    header, rows = extreme.result_rows(losses)
    baseline = next(iter(losses))
    tested = paired({loss: percent(of["test"]["P@5"]) for loss, of in losses.items()}, baseline)
    for row in rows:
        difference, p = tested.get(row[0], (None, None))
        row += ["", ""] if difference is None else [f"{difference:+.2f}", f"{p:.2g}"]
    return f"{conditions(record)}\n\n{table([*header, 'P@5 less the first', 'p'], rows)}"


def shares_of_alpha(results: Path, name: str, figures_folder: Path) -> str | None:
    """SS-LR's alpha against the number of classes."""
    record = k_and_alpha.read(results / f"{name}.json")
    return record and k_and_alpha.ss_lr_table(record)


def pairs_of_k_and_alpha(results: Path, name: str, figures_folder: Path) -> str | None:
    """HS-LR's k and alpha on one data set."""
    record = k_and_alpha.read(results / "k-and-alpha.json")
    return k_and_alpha.hs_lr_table(record["data"][name]) if record and name in record["data"] else None


def over_training(of: dict) -> list[float]:
    """Of each seed, the mean over training of the easy share, in percent."""
    return [100 * sum(run) / len(run) for run in of["curves"]["easy share"]]


def shares_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """The share of the gradient on negatives that easy classes bear, against the number of classes."""
    sizes = among_many(results, name)
    if not sizes:
        return None
    names = dict.fromkeys(
        loss for record in sizes.values() for loss, of in record["losses"].items() if "easy share" in of["curves"]
    )
    rows = [
        [loss, *(spread(over_training(record["losses"][loss])) if loss in record["losses"] else "" for record in
                 sizes.values())]
        for loss in names
    ]  # fmt: skip
    return table(["easy classes' share, %", *(f"{number:,} classes" for number in sizes)], rows)


def mechanisms_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """The margin after training, and the easy share over training."""
    record = runs_of(results, name)
    if record is None:
        return None
    rows = [
        [
            loss,
            spread([run[-1] for run in of["curves"]["margin"]], ".3f") if "margin" in of["curves"] else "",
            spread(over_training(of)) if "easy share" in of["curves"] else "",
        ]
        for loss, of in record["losses"].items()
    ]
    return table(["loss", "margin after training", "easy classes' share over training, %"], rows)


def ways_table(results: Path, name: str, figures_folder: Path) -> str | None:
    """Through logits, through the linear loss, and that with its classes sharded: one training computed in three ways,
    over the seeds that all of them had."""
    logits, linear, sharded = (runs_of(results, name + suffix) for suffix in ("", "-linear", "-class-parallel"))
    if logits is None or linear is None:
        return None
    ways = {"from logits": logits, "LinearLoss": linear} | ({"class-parallel": sharded} if sharded else {})
    seeds = min(len(way["budget"]["seeds"]) for way in ways.values())
    pairs = {"float32": (linear, sharded)}
    pairs["float64"] = tuple(runs_of(results, f"{name}-{way}-float64") for way in ("linear", "class-parallel"))
    pairs = {dtype: pair for dtype, pair in pairs.items() if all(pair)}
    rows = []
    for loss in linear["losses"]:
        if loss in logits["losses"]:
            of_ways = [way["losses"].get(loss) for way in ways.values()]
            scores = ["" if of is None else next(iter(of["test"].values()))[:seeds] for of in of_ways]
            gaps = [[of["losses"].get(loss) for of in pair] for pair in pairs.values()]
            rows.append([
                loss, *(spread(percent(score)) if score else "" for score in scores),
                *(f"{largest_gap(*gap):.1e}" if all(gap) else "" for gap in gaps),
            ])  # fmt: skip
    metric = next(iter(next(iter(linear["losses"].values()))["test"]))
    header = ["loss", *(f"{metric}, %, {way}" for way in ways)]
    header += [f"first {FIRST} losses, one process to sharded, {dtype}" for dtype in pairs]
    others = [*list(ways.values())[1:], *pairs.get("float64", ())]
    said = [f"- {conditions(way)}" for way in others]
    return "\n".join([*said, "", f"Scores over {counted(seeds, 'seed')}.", "", table(header, rows)])


def largest_gap(one: dict, other: dict) -> float:
    """The largest difference between the losses of the first steps of runs with the same seed."""
    pairs = zip(one["first_losses"], other["first_losses"], strict=False)
    return max(abs(a - b) for run, twin in pairs for a, b in zip(run, twin, strict=True))


def figure(draw: Callable, record: dict, folder: Path, name: str, text: str) -> str:
    draw(record, folder / f"{name}.png")
    return f"![{text}]({folder.name}/{name}.png)"


def curves_figure(results: Path, name: str, folder: Path) -> str | None:
    record = runs_of(results, name)
    return record and figure(figures.curves, record, folder, f"{name}-curves", f"{name}: training loss")


def margin_figure(results: Path, name: str, folder: Path) -> str | None:
    record = runs_of(results, name)
    return record and figure(figures.margins, record, folder, f"{name}-margins", f"{name}: margins over training")


def classes_figure(results: Path, name: str, folder: Path) -> str | None:
    sizes = among_many(results, name)
    if len(sizes) < 2:
        return None
    return figure(figures.against_classes, sizes, folder, f"{name}-classes", f"{name}: against the number of classes")


BLOCKS = {
    "results": result_table, "against": against_table, "tuning": tuning_table, "many": many_table, "ways": ways_table,
    "shares": shares_table, "mechanisms": mechanisms_table, "extreme": extreme_table, "alphas": shares_of_alpha,
    "pairs": pairs_of_k_and_alpha, "costs": costs_table,
    "curves": curves_figure, "margins": margin_figure, "classes": classes_figure,
}  # fmt: skip


def render(page: str, results: Path, figures_folder: Path) -> str:
    """The page with every block rewritten."""

    def block(found: re.Match) -> str:
        opening, kind, name, closing = found.groups()
        if kind not in BLOCKS:
            raise SystemExit(f"no such block: {opening.strip()} (choose from {', '.join(BLOCKS)})")
        return f"{opening}{BLOCKS[kind](results, name, figures_folder) or NOTHING}\n{closing}"

    return BLOCK.sub(block, page)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of what was recorded")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; figures go to the folder beside it")
    options = parser.parse_args(arguments)
    page = options.page.read_text()
    rendered = render(page, options.results, options.page.parent / "figures")
    options.page.write_text(rendered)
    print(f"{options.page}: {'unchanged' if rendered == page else 'rewritten'}, {rendered.count(NOTHING)} not measured")
