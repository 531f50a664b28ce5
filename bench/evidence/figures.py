"""The figures of the training runs, from their records (`records.py`). Lines are means over seeds, bands run from the
lowest to the highest seed."""

import statistics
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    name: f"C{number}"
    for number, name in enumerate(
        ("CE", "NLLR", "CRL", "LR", "HS-LR", "SS-LR", "CE, k hardest", "CRL, k hardest", "LR, k hardest",
         "SS-LR, k hardest", "CE, smoothing", "CosFace", "ArcFace", "CosFace, k hardest", "ArcFace, k hardest",
         "LR, cosines", "HS-LR, cosines", "SS-LR, cosines", "CE, 10 % random", "CE, cosines")
    )
}  # fmt: skip


def style(name: str) -> dict:
    if "hardest" in name:
        dashes = "--"
    elif name.endswith(("cosines", "Face")):
        dashes = ":"
    else:
        dashes = "-." if name in ("CE, smoothing", "CE, 10 % random") else "-"
    return {"color": COLOURS[name], "linestyle": dashes, "label": name}


def line(axes: Axes, name: str, x: list[float], of_points: list[list[float]]) -> None:
    """of_points: at each x the values of the seeds."""
    axes.plot(x, [statistics.mean(values) for values in of_points], **style(name))
    axes.fill_between(x, list(map(min, of_points)), list(map(max, of_points)), color=COLOURS[name], alpha=0.1)


def by_point(of_seeds: list[list[float]]) -> list[list[float]]:
    return [list(values) for values in zip(*of_seeds, strict=True)]


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same bytes from the same record


def curves(record: dict, path: Path) -> None:
    """Training loss against epochs, and the validation error where there is a validation split."""
    validated = all("validation" in entry["curves"] for entry in record["losses"].values())
    figure = Figure(figsize=(13.5 if validated else 8.5, 5), layout="constrained")
    *error_axes, loss_axes = figure.subplots(1, 1 + validated, squeeze=False)[0]
    for name, entry in record["losses"].items():
        epochs = range(1, record["budget"]["epochs"] + 1)
        for axes in error_axes:
            error = [[100 - 100 * score for score in run] for run in entry["curves"]["validation"]]
            line(axes, name, epochs, by_point(error))
        loss = torch.tensor(entry["curves"]["train_loss"], dtype=torch.float64).mean(0)
        loss_axes.plot(epochs, loss, **style(name))
    for axes in error_axes:
        axes.set(title=f"{record['data']}: validation error, %", xlabel="epoch", yscale="log")
    loss_axes.set(title=f"{record['data']}: training loss, each in its own unit", xlabel="epoch")
    loss_axes.set_yscale("symlog", linthresh=0.1)
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside right center")
    save(figure, path)


def margins(record: dict, path: Path) -> None:
    """The mean over training rows of p_y minus the largest wrong p, against epochs, of the softmax losses."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in ("CE", "NLLR", "CRL"):
        if name in record["losses"]:
            margins = by_point(record["losses"][name]["curves"]["margin"])
            line(axes, name, range(record["budget"]["epochs"] + 1), margins)
    axes.set(title=f"{record['data']}: p of the target minus the largest other p, mean", xlabel="epoch")
    axes.legend()
    save(figure, path)


def against_classes(records: dict[int, dict], path: Path) -> None:
    """By number of classes: the share of the negatives' gradient from easy classes, mean over training, and the test
    metric."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    share_axes, metric_axes = figure.subplots(1, 2)
    first = next(iter(records.values()))
    names = [name for name in first["losses"] if all(name in record["losses"] for record in records.values())]
    metric = next(iter(first["losses"][names[0]]["test"]))
    for name in names:
        entries = [record["losses"][name] for record in records.values()]
        metrics = [[100 * score for score in entry["test"][metric]] for entry in entries]  # (sizes, seeds)
        line(metric_axes, name, list(records), metrics)
        if "easy share" in entries[0]["curves"]:
            shares = [[100 * sum(run) / len(run) for run in entry["curves"]["easy share"]] for entry in entries]
            line(share_axes, name, list(records), shares)
    share_axes.set(title="gradient of the negatives from easy classes, % (mean over training)", ylim=(0, 100))
    metric_axes.set(title=f"test {metric}, %")
    for axes in (share_axes, metric_axes):
        axes.set(xlabel="classes", xscale="log")
        axes.legend()
    save(figure, path)
