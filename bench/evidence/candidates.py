"""How many candidates certified selection leaves of trained classifiers: their weights are no random numbers.

    python -m bench.evidence.candidates                 digits among 10,000 and 100,000 classes
    python -m bench.evidence.candidates --root DIR      Omniglot's characters among 100,000 too

Each network is trained with the recorded hyper-parameters of its loss (``train.py``), and its rows are those of the
training split. A row that has more than 4 k + 64 candidates is not certain, and is computed in float32.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from bench.evidence import records
from bench.evidence.contenders import cases
from bench.evidence.data import Dataset, padded
from bench.evidence.digits import digits
from bench.evidence.fit import fit
from bench.evidence.omniglot import omniglot
from bench.evidence.tables import table
from bench.speed.certified import count_candidates

LOSSES = ("CE", "HS-LR")
EDGES = (1.1, 1.25, 1.5, 2.0, 3.0)  # of the histogram, in units of k


def rows_of(data: Dataset, settings_of: str, ks: tuple[int, ...], epochs: int | None) -> list[list[str]]:
    found = []
    chosen = [case for case in cases(data) if case.name in LOSSES]
    settings = records.settings_of(records.RESULTS / f"{settings_of}.json", [case.name for case in chosen])
    for case in chosen:
        with tqdm(total=epochs or data.epochs, unit="epoch", disable=True) as progress:
            model = fit(data, case, settings[case.name], 0, epochs or data.epochs, progress, linear=True).model
        body, classifier = model[0], model[1]
        with torch.no_grad():
            x = torch.cat([body(part) for part in data.train.inputs.split(256)])
            for k in ks:
                counts = count_candidates(x, classifier.weight, classifier.bias, data.train.target, k)
                certain = counts[counts >= 0].double()
                shares, below = [], 0.0
                for edge in EDGES:
                    share = float((certain <= edge * k).double().sum() / len(counts))
                    shares.append(f"{100 * (share - below):.0f}")
                    below = share
                quantiles = (
                    ""
                    if len(certain) == 0
                    else "{:.0f}, {:.0f}, {:.0f}".format(
                        *certain.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
                    )
                )
                rest, left = len(certain) / len(counts) - below, 1 - len(certain) / len(counts)
                tail = [f"{100 * rest:.0f}", f"{100 * left:.0f}"]
                found.append([data.name, case.name, str(k), quantiles, *shares, *tail])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.candidates", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="the folder with Omniglot's files")
    parser.add_argument("--epochs", type=int, help="default: those of the data set")
    options = parser.parse_args(argv)
    rows = []
    for classes in (10_000, 100_000):
        rows += rows_of(padded(digits(), classes), f"digits-{classes}", (10, 100), options.epochs)
    if options.root is not None:
        rows += rows_of(padded(omniglot(options.root, False), 100_000), "omniglot", (10, 100), options.epochs)
    shares = [f"up to {edge:g} k" for edge in EDGES]
    print(table(["data", "loss", "k", "candidates: least, median, most", *shares, "more", "not certain"], rows))
    print("\nshares of the rows in %")


if __name__ == "__main__":
    main()
