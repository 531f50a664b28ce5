"""Markdown tables, and how numbers stand in them."""

import math
import statistics

from scipy.stats import ttest_rel


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean ± standard deviation; of one value, the value."""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def spell(settings: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if name != "prior_bias") + (
        ", prior bias" if settings["prior_bias"] else ""
    )


def paired(scores: dict[str, list[float]], baseline: str) -> dict[str, tuple[float, float]]:
    """By loss: its mean difference to the baseline, and the p-value of the paired t-test over the seeds, two-sided.

    Runs of one seed have initial weights and batches in common: that is the pairing. Holm's step-down correction covers
    all comparisons made here. The test knows of the spread over seeds only, not of that over test rows.
    """
    differences = {
        name: [ours - theirs for ours, theirs in zip(values, scores[baseline], strict=True)]
        for name, values in scores.items()
        if name != baseline
    }
    p = {
        name: math.nan if len(difference) < 2 else float(ttest_rel(scores[name], scores[baseline]).pvalue)
        for name, difference in differences.items()
    }
    corrected, floor = dict(p), 0.0
    known = [name for name in p if not math.isnan(p[name])]  # one seed, or no spread at all: nothing can be said
    for rank, name in enumerate(sorted(known, key=p.get)):
        floor = corrected[name] = max(floor, min(1.0, (len(known) - rank) * p[name]))
    return {name: (statistics.mean(difference), corrected[name]) for name, difference in differences.items()}
