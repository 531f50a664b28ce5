"""The choice of hyper-parameters: on the validation split only, with one budget for all losses."""

import statistics

import torch
from tqdm import tqdm

from bench.evidence.contenders import Case
from bench.evidence.data import Dataset
from bench.evidence.fit import fit

TUNING_SEEDS = (100, 101, 102, 103, 104)  # apart from the seeds 0, 1, ... of the reported runs


def tune(data: Dataset, case: Case, trials: int, seeds: tuple[int, ...], epochs: int, progress: tqdm) -> dict:
    """The best of `trials` settings by the mean over `seeds` of the first metric on the validation split."""
    space = case.searched(data)
    # Sobol points cover a space of one to four settings more evenly than as many random draws.
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(trials).tolist()
    best = None
    for point in points:
        settings = {name: axis.at(u) for (name, axis), u in zip(space.items(), point, strict=True)}
        scores = [fit(data, case, settings, seed, epochs, progress).validation[-1] for seed in seeds]
        if best is None or statistics.mean(scores) > statistics.mean(best["validation"]):
            best = {"settings": settings, "validation": scores}
    return best | {"space": {name: vars(axis) for name, axis in space.items()}}
