"""HS-LR's k and alpha, and SS-LR's alpha, against the number of classes.

    python -m bench.evidence.k_and_alpha                          the digits among 10, 1,000 and 10,000 classes
    python -m bench.evidence.k_and_alpha --classes 100000 --seeds 1 --quick
    python -m bench.evidence.k_and_alpha --omniglot DIR           validation characters, which training never sees

Every pair is trained at three learning rates; what counts is the best of their means over the seeds, on the validation
split. Kept in bench/results/k-and-alpha.json; `python -m bench.charts k_and_alpha` draws it. SS-LR's mean runs over all
C - 1 negatives, so its alpha is given as a share of them.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import fused_losses as fl
from bench.evidence import records
from bench.evidence.contenders import Case, Choice
from bench.evidence.data import Dataset, padded
from bench.evidence.digits import digits
from bench.evidence.fit import fit
from bench.evidence.omniglot import omniglot
from bench.evidence.tables import table
from bench.evidence.tuning import TUNING_SEEDS

RATES = (0.03, 0.1, 0.3)
KS = (1, 3, 10, 30, 100, 300)
ALPHAS = (0.3, 1.0, 3.0, 10.0)
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # alpha / (C - 1)
HS_LR = Case("HS-LR", fl.HSLRLoss, {"k": Choice(KS), "alpha": Choice(ALPHAS)})
SS_LR = Case("SS-LR", fl.SSLRLoss, {"alpha": Choice(SHARES), "gamma": Choice((2.0,))})


def grid(num_classes: int, quick: bool) -> Iterator[tuple[Case, str, dict]]:
    """Case, what the setting is called, and the setting."""
    negatives = num_classes - 1
    for k in KS:
        for alpha in ALPHAS:
            if k < negatives and not (quick and (k in (1, 3, 300) or alpha in (0.3, 10.0))):
                yield HS_LR, f"k {k}, alpha {alpha:g}", {"k": k, "alpha": alpha}
    yield SS_LR, "alpha 1", {"alpha": 1.0, "gamma": 2.0}
    for share in SHARES:
        if not (quick and share in (0.003, 0.03)):
            yield SS_LR, f"alpha {share:g} (C - 1)", {"alpha": share * negatives, "gamma": 2.0}


def sweep(data: Dataset, rates: tuple[float, ...], seeds: int, epochs: int, quick: bool) -> dict:
    """By loss, setting and learning rate the scores of the seeds."""
    settings = list(grid(data.num_classes, quick))
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tqdm(total=len(settings) * len(rates) * seeds * epochs, unit="epoch", desc=data.name) as progress:
        for case, name, setting in settings:
            of_rates = found.setdefault(case.name, {})[name] = {}
            for rate in rates:
                chosen = setting | {"lr": rate, "prior_bias": not data.open_set}
                runs = [fit(data, case, chosen, seed, epochs, progress) for seed in TUNING_SEEDS[:seeds]]
                of_rates[f"{rate:g}"] = [round(run.validation[-1], 4) for run in runs]
    return found


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def best(of_rates: dict[str, list[float]]) -> tuple[float, str]:
    """In percent, and the learning rate."""
    rate = max(of_rates, key=lambda rate: statistics.mean(of_rates[rate]))
    return 100 * statistics.mean(of_rates[rate]), rate


def ss_lr_table(record: dict) -> str:
    sizes = record["data"]
    names = list(dict.fromkeys(name for of in sizes.values() for name in of["scores"]["SS-LR"]))
    rows = []
    for name in names:
        row = [name]
        for of in sizes.values():
            of_rates = of["scores"]["SS-LR"].get(name)
            row.append("{:.1f}, lr {}".format(*best(of_rates)) if of_rates else "")
        rows.append(row)
    return table(["SS-LR, gamma 2", *(titled(of) for of in sizes.values())], rows)


def hs_lr_table(of: dict) -> str:
    """One data set: k down, alpha across."""
    scores = of["scores"]["HS-LR"]
    rows = []
    for k in KS:
        cells = [scores.get(f"k {k}, alpha {alpha:g}") for alpha in ALPHAS]
        if any(cells):
            rows.append([str(k), *("{:.1f}, lr {}".format(*best(cell)) if cell else "" for cell in cells)])
    return table([f"{titled(of)}: k", *(f"alpha {alpha:g}" for alpha in ALPHAS)], rows)


def titled(of: dict) -> str:
    return f"{of['name'].partition('-')[0]}, {of['classes']:,} classes"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=(10, 1_000, 10_000), metavar="C")
    parser.add_argument("--omniglot", type=Path, metavar="DIR", help="instead of the digits: folder of its files")
    parser.add_argument("--epochs", type=int, help="by default what the data set asks for")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each setting and rate (default 2)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--quick", action="store_true", help="a third of the settings, for very many classes")
    parser.add_argument("--results", type=Path, default=records.RESULTS / "k-and-alpha.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.omniglot:
        chosen = [omniglot(options.omniglot, hold_out=True)]
    else:
        chosen = [digits() if number == 10 else padded(digits(), number) for number in options.classes]
    for data in chosen:
        epochs = options.epochs or data.epochs
        scores = sweep(data, tuple(options.rates), options.seeds, epochs, options.quick)
        record = read(options.results) or {"data": {}}
        record["versions"] = records.versions()
        record["data"][data.name] = {
            "name": data.name, "classes": data.num_classes, "epochs": epochs, "seeds": options.seeds, "scores": scores,
        }  # fmt: skip
        record["data"] = dict(sorted(record["data"].items(), key=lambda item: item[1]["classes"]))
        options.results.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\n{hs_lr_table(record['data'][data.name])}")
    print(f"\n{ss_lr_table(record)}\n\nrecorded: {options.results}")


if __name__ == "__main__":
    main()
