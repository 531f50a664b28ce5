"""Whether one loss is better than another, or its seeds luckier."""

import math
import statistics

from scipy.stats import ttest_rel


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
