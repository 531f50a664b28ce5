"""Draws the pictures of README and docs/ from what was recorded: `python -m bench.charts`.

Accuracies come from bench/results/digits-*-runs.json, times and memory from bench/results/linear.json, bytes from the
formulas of bench.speed.scale, gradients from the losses themselves. Nothing is typed in.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

import fused_losses as fl
from bench.evidence import records
from bench.evidence.k_and_alpha import best
from bench.evidence.page import among_many, percent
from bench.speed import linear
from bench.speed.scale import Setup, amount

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
RESULTS = Path(__file__).parent / "results"

INK, PALE, LINE = "#24292f", "#6e7781", "#d0d7de"
COLOURS = {
    "CE": "#4269d0", "CRL": "#9467bd", "LR": "#d1495b", "HS-LR": "#1a7f37", "SS-LR": "#e08a00", "ours": "#1a7f37",
    "others": "#8c959f",
}  # fmt: skip
TINTS = {"ours": "#dafbe1", "others": "#f6f8fa", "logits": "#ddf4ff"}
STYLE = {
    "font.size": 10, "svg.hashsalt": "fused_losses", "text.color": INK, "axes.edgecolor": PALE, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10,
}  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------------------------------


def accuracies() -> dict[str, dict[int, list[float]]]:
    """By loss and number of classes, the test accuracy of each seed, in percent."""
    found: dict[str, dict[int, list[float]]] = {}
    for classes, record in among_many(RESULTS, "digits").items():
        for name, entry in record["losses"].items():
            found.setdefault(name, {})[classes] = percent(entry["test"]["accuracy"])
    return found


def costs(case: str) -> dict[str, dict[str, float]]:
    """Of each step its "ms" and "bytes", as python -m bench.speed.linear --write kept them."""
    return json.loads(linear.RESULTS.read_text())["cases"][case]


def pulls(classes: int, k: int) -> dict[str, Tensor]:
    """What the gradient of one row puts on its negatives, the hardest first: (classes - 1,) each, logits and target
    drawn once."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, generator=generator, dtype=torch.float64) * 2
    losses: dict[str, fl.modules.RowLoss] = {
        "CE": fl.CrossEntropyLoss(), f"CE, k = {k}": fl.CrossEntropyLoss(k=k), "LR": fl.LRLoss(),
        f"HS-LR, k = {k}": fl.HSLRLoss(k=k), "SS-LR": fl.SSLRLoss(),
    }  # fmt: skip
    order = logits[0, 1:].argsort(descending=True) + 1
    found = {}
    for name, loss in losses.items():
        leaf = logits.clone().requires_grad_()
        loss(leaf, torch.tensor([0])).backward()
        found[name] = leaf.grad[0, order]
    return found


# --- what all pictures share ------------------------------------------------------------------------------------------


def figure(width: float, height: float) -> Figure:
    """A card of its own: it reads on a dark page as on a white one."""
    made = Figure(figsize=(width, height), facecolor="white")
    edge = FancyBboxPatch(
        (0.002, 0.003), 0.996, 0.994, "round,pad=0,rounding_size=0.01", transform=made.transFigure, facecolor="none",
        edgecolor=LINE, linewidth=1.2,
    )  # fmt: skip
    made.add_artist(edge)
    return made


def note(made: Figure, text: str) -> None:
    made.text(0.015, 0.02, text, fontsize=8, color=PALE, va="bottom")


def bars(axes: Axes, values: dict[str, float], label: Callable[[float], str], ours: Callable[[str], bool]) -> None:
    """Horizontal, the first on top, each with its name on it and its number behind it."""
    places = range(len(values))[::-1]
    colours = [COLOURS["ours" if ours(name) else "others"] for name in values]
    axes.barh(list(places), list(values.values()), 0.42, color=colours)
    for place, (name, value) in zip(places, values.items(), strict=True):
        axes.text(0, place + 0.27, name, fontsize=9, va="bottom", transform=axes.transData)
        axes.text(value, place, f" {label(value)}", fontsize=9, va="center", fontweight="bold" if ours(name) else None)
    axes.set(yticks=[], xlim=(0, 1.22 * max(values.values())), ylim=(-0.5, len(values) - 0.3))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", labelbottom=False, length=0)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, tint: str, **how) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=1.2", facecolor=TINTS[tint], edgecolor=PALE)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=how.pop("fontsize", 9), **how)


def arrow(axes: Axes, start: tuple[float, float], stop: tuple[float, float], text: str = "", **place) -> None:
    axes.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=11, color=PALE, shrinkA=1, shrinkB=1))
    if text:
        x, y = (start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2
        axes.text(x + place.get("dx", 0), y + place.get("dy", 1.2), text, ha=place.get("ha", "center"), va="bottom",
                  fontsize=8, color=PALE)  # fmt: skip


def canvas(made: Figure, width: float, height: float, bottom: float = 0.02) -> Axes:
    axes = made.add_axes((0.01, bottom, 0.98, 0.98 - bottom))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


# --- the pictures -----------------------------------------------------------------------------------------------------


def draw_accuracy(axes: Axes, names: list[str]) -> None:
    found = accuracies()
    ends = {}
    for name in names:
        classes = list(found[name])
        seeds = list(found[name].values())  # of each size
        mean = [statistics.mean(scores) for scores in seeds]
        axes.plot(classes, mean, marker="o", markersize=4, linewidth=2, color=COLOURS[name])
        axes.fill_between(
            classes, list(map(min, seeds)), list(map(max, seeds)), color=COLOURS[name], alpha=0.12, linewidth=0
        )
        ends[name] = mean[-1]
    last = 1000.0
    for name in sorted(ends, key=ends.get, reverse=True):  # labels at the ends of the lines, none over another
        place = min(ends[name], last - 6.5)
        axes.text(1.25 * classes[-1], place, name, color=COLOURS[name], va="center", fontweight="bold", fontsize=9)
        last = place
    axes.set(
        xscale="log", ylim=(0, 104), ylabel="test accuracy, %", xlabel="classes (log)", xlim=(800, 1.1 * classes[-1])
    )
    axes.set_xticks(classes, [f"{number:,}" for number in classes])
    axes.minorticks_off()


def memory_of(case: str, names: list[str]) -> dict[str, float]:
    found = costs(case)
    return {name: found[name]["bytes"] / 2**20 for name in names}


HARDEST = ["ours, HS-LR", linear.CHUNKED_64, linear.EAGER, linear.PYTORCH_HS_LR]
ALL = ["ours, CE", "ours, CRL", linear.CHUNKED_64, linear.EAGER]


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def overview() -> Figure:
    made = figure(9, 3.7)
    left, right = made.add_axes((0.075, 0.25, 0.36, 0.6)), made.add_axes((0.56, 0.16, 0.41, 0.69))
    draw_accuracy(left, ["CE", "LR", "HS-LR"])
    left.set_title("Digits among more and more classes", loc="left")
    bars(right, memory_of("100k classes, k 100", HARDEST), lambda mib: f"{mib:.0f} MiB", is_ours)
    right.set_title("Memory of one step, 100,000 classes", loc="left")
    note(
        made,
        "bench/results: digits-*-runs.json (means over the seeds, bands from the lowest to the highest), linear.json",
    )
    return made


def accuracy() -> Figure:
    made = figure(7, 4.2)
    axes = made.add_axes((0.1, 0.2, 0.76, 0.68))
    draw_accuracy(axes, ["CE", "CRL", "LR", "HS-LR", "SS-LR"])
    axes.set_title("Digits among more and more classes", loc="left")
    note(
        made,
        "bench/results/digits-*-runs.json: tuned for each; means over the seeds, bands from lowest to highest",
    )
    return made


def linear_cost() -> Figure:
    made = figure(9, 6.2)
    cases = {
        "100k classes, k 100": ("over the 100 hardest", HARDEST),
        "100k classes, CRL and CE": ("over all negatives", ALL),
    }
    for row, (case, (said, names)) in enumerate(cases.items()):
        found, bottom = costs(case), 0.54 - 0.46 * row
        ours = max(found[name]["ms"] for name in names if is_ours(name))
        memory = made.add_axes((0.03, bottom, 0.45, 0.36))
        times = made.add_axes((0.53, bottom, 0.45, 0.36))
        bars(memory, memory_of(case, names), lambda mib: f"{mib:.0f} MiB", is_ours)
        bars(times, {name: found[name]["ms"] / ours for name in names}, lambda ratio: f"{ratio:.2f}", is_ours)
        memory.set_title(f"Peak memory, {said}", loc="left")
        times.set_title("Time, ours (the slower one) = 1", loc="left")
    note(
        made,
        "bench/results/linear.json: 256 rows, 128 features, 100,000 classes, fp32; one thread, processor time",
    )
    return made


def hardest() -> Figure:
    classes, k = 10_000, 100
    made = figure(9, 3.9)
    left, right = made.add_axes((0.085, 0.24, 0.37, 0.6)), made.add_axes((0.56, 0.2, 0.42, 0.64))
    found = pulls(classes, k)
    styles = {
        "CE": ("CE", "-"),
        f"CE, k = {k}": ("CE", "--"),
        "LR": ("LR", "-"),
        f"HS-LR, k = {k}": ("HS-LR", "-"),
        "SS-LR": ("SS-LR", "-"),
    }
    shown = torch.unique(torch.logspace(0, math.log10(classes - 1), 200).long())  # a point each, and no more
    for name, pull in found.items():
        colour, dashes = styles[name]
        ranks = shown[pull[shown - 1] > 0]
        left.plot(ranks, pull[ranks - 1], dashes, color=COLOURS[colour], linewidth=1.8, label=name)
    left.set(xscale="log", yscale="log", xlabel="negatives, the hardest first", ylabel="gradient", ylim=(1e-7, 3))
    left.axvline(k, color=PALE, linewidth=1, linestyle=":")
    left.set_title("One row: how hard each negative is pushed", loc="left")
    left.legend(fontsize=8, frameon=False, loc="lower left")
    share = {name: (100 * pull[:k].sum() / pull.sum()).item() for name, pull in found.items()}
    bars(right, share, lambda percent: f"{percent:.0f} %", lambda name: share[name] > 99.5)
    right.set_title(f"Share of that on the {k} hardest of {classes:,}", loc="left")
    note(
        made,
        f"python -m bench.charts: one row of {classes:,} logits, N(0, 2²); CE, LR and SS-LR over all negatives",
    )
    return made


def sharding() -> Figure:
    made = figure(9, 3.9)
    axes = canvas(made, 100, 60, bottom=0.05)
    for rank in range(3):
        y = 42 - 16 * rank
        box(axes, 1, y, 13, 10, f"rank {rank}\nits own images", "others", fontsize=8)
        box(axes, 20, y, 13, 10, "embeddings\nof all ranks", "logits", fontsize=8)
        box(axes, 39, y, 15, 10, f"classes of rank {rank}\nits logits stay", "ours", fontsize=8)
        arrow(axes, (14, y + 5), (20, y + 5))
        arrow(axes, (33, y + 5), (39, y + 5))
    axes.text(17, 55, "all-gather", ha="center", fontsize=8, color=PALE)
    axes.text(46.5, 55, "k best (class, logit)\nand 12 bytes a row travel", ha="center", fontsize=8, color=PALE)
    axes.text(1, 2, "The loss is that of one device: same picks, same values, ties included.", fontsize=9)
    right = made.add_axes((0.6, 0.15, 0.385, 0.7))
    rows = {
        "the loss, over all negatives": Setup(10_000_000, 8).loss_bytes(),
        "the loss, over the 100 hardest": Setup(10_000_000, 8, k=100).loss_bytes(),
        "embeddings and their gradient": Setup(10_000_000, 8).input_bytes(),
        "the logits, if they were gathered": Setup(10_000_000, 8).logits_bytes(),
    }
    bars(right, rows, lambda size: amount(size, "B"), lambda name: name.startswith("the loss"))
    right.set(xscale="log", xlim=(1e4, 1e13))
    for text in right.texts[::2]:
        text.set_x(1e4)
    right.set_title("Received by a rank in a step (log)", loc="left")
    made.text(0.6, 0.09, "10,000,000 identities, 8 ranks, 1024 rows, 512 features, bf16", fontsize=8, color=PALE)
    made.text(0.6, 0.04, "python -m bench.speed.scale: formulas, not measured", fontsize=8, color=PALE)
    return made


def steps() -> Figure:
    made = figure(9, 3.3)
    axes = canvas(made, 100, 40)
    box(axes, 2, 20, 17, 14, "logits\nN x C", "logits", fontsize=11)
    box(axes, 31, 20, 17, 14, "statistics\nN x 3 numbers:\nm, l or neg, z_y", "ours")
    box(axes, 60, 26, 14, 8, "loss", "ours", fontsize=11)
    box(axes, 60, 15, 14, 8, "coefficients\nN x 2: c and t", "ours")
    box(axes, 81, 13, 17, 14, "gradient\nN x C", "logits", fontsize=11)
    arrow(axes, (19, 27), (31, 27), "read once", dy=1)
    arrow(axes, (48, 28), (60, 30), "finish", dx=0, dy=1.6)
    arrow(axes, (48, 26), (60, 19))
    arrow(axes, (74, 19), (81, 19))
    axes.add_patch(
        FancyArrowPatch(
            (10, 20), (81, 15), connectionstyle="arc3,rad=0.22", arrowstyle="-|>", mutation_scale=11, color=PALE
        )
    )
    axes.text(
        45,
        5.2,
        "backward: logits and two numbers per row give every entry, written once",
        ha="center",
        fontsize=8,
        color=PALE,
    )
    axes.text(39.5, 36.5, "a walk over the row, the same for every loss", ha="center", fontsize=8, color=PALE)
    axes.text(67, 36.5, "where a loss is a formula", ha="center", fontsize=8, color=PALE)
    return made


def selection() -> Figure:
    made = figure(9, 3.3)
    axes = canvas(made, 100, 43)
    generator = torch.Generator().manual_seed(3)
    blocks, width, k = 8, 6, 4
    values = torch.randn(blocks, width, generator=generator)
    most = values.amax(1)
    again = set(most.topk(k + 1).indices.tolist())  # one more than k: a block may hold the target alone
    threshold = values.flatten().topk(k).values[-1]
    for number in range(blocks):
        x = 2 + 12.2 * number
        tint = "ours" if number in again else "others"
        box(axes, x, 20, 11, 16, "", tint)
        axes.text(
            x + 5.5,
            14.5,
            f"max {most[number]:.1f}",
            ha="center",
            fontsize=8,
            fontweight="bold" if number in again else None,
        )
        for place, value in enumerate(values[number]):
            picked = bool(value >= threshold)
            colour = COLOURS["ours"] if picked else COLOURS["others"]
            height = 1.0 + 2.9 * (value.item() + 2.4)
            axes.bar(x + 1.4 + 1.65 * place, height, 1.2, bottom=20.4, color=colour)
    axes.text(2, 39, "1  The row is read once, in blocks; the largest logit of each block is kept.", fontsize=9)
    axes.text(
        2,
        8,
        f"2  A block below the {k + 1} largest maxima holds none of the {k} hardest: only the green are read again.",
        fontsize=9,
    )
    axes.text(
        2,
        3,
        "3  Among these the picks are found: exactly k, the lowest class first among equals, the target left out.",
        fontsize=9,
    )
    return made


def sweep() -> Figure:
    record = json.loads((RESULTS / "sweep.json").read_text())
    heads = record["validation accuracy"]
    made = figure(9, 4.1)
    for number, (head, losses) in enumerate(heads.items()):
        axes = made.add_axes((0.075 + 0.31 * number, 0.31, 0.28, 0.57))
        for name, scores in losses.items():
            mean = [100 * sum(of_rate) / len(of_rate) for of_rate in scores]
            dashes = "--" if name.startswith(("CE,", "SS-LR,")) else "-"  # beside all negatives; HS-LR has no such
            colour = COLOURS[name.partition(",")[0]]
            axes.plot(record["rates"], mean, dashes, color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
        axes.set(xscale="log", ylim=(0, 104), xlabel="learning rate")
        axes.set_title(head.removesuffix(" -log(C - 1)"), loc="left", fontsize=10)
        if number == 0:
            axes.set(ylabel="validation accuracy, %")
        else:
            axes.tick_params(labelleft=False)
    made.legend(*axes.get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0.07), ncols=len(losses),
                fontsize=8, frameon=False, handlelength=3)  # fmt: skip
    note(made, f"bench/results/sweep.json: digits among 1,000 classes, {record['epochs']} epochs, mean of two seeds")
    return made


def retrieval() -> Figure:
    """Characters that training never saw, found by the cosine of their embeddings."""
    losses = records.read(RESULTS / "omniglot-runs.json")["losses"]
    found = {name: percent(of["test"]["mAP"]) for name, of in losses.items() if name != "CRL, k hardest"}
    made = figure(8, 4.9)
    plain = {name: scores for name, scores in found.items() if "scale" not in losses[name]["settings"]}
    for place, (title, of_head) in enumerate(
        (("a linear classifier", plain), ("cosines", {name: found[name] for name in found if name not in plain}))
    ):
        axes = made.add_axes((0.03 + 0.49 * place, 0.1, 0.46, 0.78))
        best_first = sorted(of_head, key=lambda name: -statistics.mean(of_head[name]))
        means = {name: statistics.mean(of_head[name]) for name in best_first}
        bars(axes, means, lambda score: f"{score:.1f}", lambda name: name in OURS_ALONE or "hardest" in name)
        axes.set_xlim(0, 80)
        axes.set_title(f"mAP, %, with {title}", loc="left")
    note(made, "bench/results/omniglot-runs.json: each tuned alike, means of five seeds; green: what this package adds")
    return made


OURS_ALONE = ("CRL", "NLLR", "HS-LR", "SS-LR", "HS-LR, cosines", "SS-LR, cosines")


def k_and_alpha() -> Figure:
    """What SS-LR's alpha must be among more and more classes, and HS-LR's k and alpha among 1,000."""
    sizes = json.loads((RESULTS / "k-and-alpha.json").read_text())["data"]
    made = figure(9, 3.9)
    left, right = made.add_axes((0.075, 0.27, 0.39, 0.6)), made.add_axes((0.57, 0.27, 0.39, 0.6))
    for of in sizes.values():
        negatives = of["classes"] - 1
        found = {
            1 / negatives if name == "alpha 1" else float(name.split()[1]): best(of_rates)[0]
            for name, of_rates in of["scores"]["SS-LR"].items()
        }
        shares = sorted(found)
        left.plot(
            shares, [found[share] for share in shares], marker="o", markersize=3, label=f"{negatives + 1:,} classes"
        )
    lines: dict[str, dict[int, float]] = {}
    for name, of_rates in sizes["digits-1000"]["scores"]["HS-LR"].items():
        k, alpha = name.removeprefix("k ").split(", ")
        lines.setdefault(alpha, {})[int(k)] = best(of_rates)[0]
    for alpha, line in lines.items():
        right.plot(list(line), list(line.values()), marker="o", markersize=3, label=alpha)
    left.set(xscale="log", ylim=(0, 104), xlabel="alpha / (C - 1)", ylabel="validation accuracy, %")
    left.set_title("SS-LR: alpha", loc="left")
    right.set(xscale="log", ylim=(0, 104), xlabel="k")
    right.set_title("HS-LR among 1,000 classes: k and alpha", loc="left")
    for axes in (left, right):
        axes.legend(loc="lower right" if axes is left else "lower left", fontsize=8, frameon=False)
    note(made, "bench/results/k-and-alpha.json: digits, best of three learning rates, means of two seeds")
    return made


PICTURES = {
    "overview": overview, "accuracy": accuracy, "linear": linear_cost, "hardest": hardest, "sharding": sharding,
    "steps": steps, "selection": selection, "sweep": sweep,
    "retrieval": retrieval, "k_and_alpha": k_and_alpha,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.charts", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="which of them (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they go (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        with matplotlib.rc_context(STYLE):
            path = options.folder / f"{name}.svg"
            PICTURES[name]().savefig(
                path, metadata={"Date": None, "Creator": None}
            )  # the same bytes from the same record
            print(path)


if __name__ == "__main__":
    main()
