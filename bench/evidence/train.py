"""Train the same small network with each loss on the same schedule, and print what comes of it.

    python -m bench.evidence.train                              digits: table and curves, with the recorded settings
    python -m bench.evidence.train --data omniglot --root DIR   unseen characters; corel5k: photographs with keywords;
                                                                omniglot-swapped: the other alphabets unseen
    python -m bench.evidence.train --many-classes               digits among 1,000 to 100,000 classes, most distractors
    python -m bench.evidence.train ... --tune                   choose the settings on the validation split, record them
    python -m bench.evidence.train ... --record                 keep what the runs gave, for python -m bench.evidence
    torchrun --nproc-per-node 2 -m bench.evidence.train ... --class-parallel    the classifier sharded over processes

Every loss is given the same network, initial weights, batches, optimiser, schedule and number of tuning trials. The
test split is read once at the end of each reported run, and not at all while tuning. Omniglot and Corel5k train on the
validation rows as well once the settings are chosen. Files are read from DIR; nothing is downloaded.
"""

import argparse
import gc
import os
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import fused_losses as fl
from bench.evidence import figures, records
from bench.evidence.contenders import Case, cases
from bench.evidence.corel5k import corel5k
from bench.evidence.data import DataError, Dataset, padded
from bench.evidence.digits import digits
from bench.evidence.fit import Run, fit
from bench.evidence.mechanisms import probe_of
from bench.evidence.omniglot import omniglot, omniglot_swapped
from bench.evidence.records import RecordError
from bench.evidence.tables import counted, spell, spread, table
from bench.evidence.tuning import TUNING_SEEDS, tune

DATA = {"digits": digits}
FOLDERS = {"omniglot": omniglot, "omniglot-swapped": omniglot_swapped, "corel5k": corel5k}  # these need --root
MANY_CLASSES = (1_000, 10_000, 100_000)
AMONG_MANY = ("CE", "CRL", "LR", "HS-LR", "SS-LR", "CE, k hardest", "CE, 10 % random")  # the losses of --many-classes


def load(name: str, root: Path | None, hold_out: bool) -> Dataset:
    if name in DATA:
        if root is not None:
            raise DataError(f"{name} comes with scikit-learn and takes no --root")
        return DATA[name]()
    if root is None:
        raise DataError(f"{name} needs --root, the folder with its files")
    return FOLDERS[name](root, hold_out)


def choose(data: Dataset, chosen: list[Case], options: argparse.Namespace, command: str) -> None:
    """Tunes each loss and records it."""
    path = options.results / f"{data.name}.json"
    trials = options.trials or data.trials
    seeds = TUNING_SEEDS[: options.tuning_seeds or data.tuning_seeds]
    epochs = options.epochs or data.epochs
    budget = {"trials": trials, "seeds": list(seeds), "epochs": epochs}
    head = {"data": data.name, "command": f"{command} --tune", "versions": records.versions(), "budget": budget}
    records.check_budget(path, budget, [case.name for case in chosen])
    rows = []
    with tqdm(total=len(chosen) * trials * len(seeds) * epochs, unit="epoch") as progress:
        for case in chosen:
            progress.set_description(case.name)
            best = tune(data, case, trials, seeds, epochs, progress)
            records.write(path, head, case.name, best, [case.name for case in cases(data)])
            rows.append([case.name, spell(best["settings"]), spread([100 * score for score in best["validation"]])])
    print(f"\n{data.name}: best of {trials} settings by the validation split\n")
    print(table(["loss", "hyper-parameters", "validation, %"], rows))
    print(f"\nrecorded: {path}")


def entry(runs: list[Run], scores: list[dict[str, float]], settings: dict) -> dict:
    """What is kept of the runs of one loss: by metric, and by curve, one item per seed."""
    curves = {"train_loss": [run.train_loss for run in runs], "validation": [run.validation for run in runs]}
    curves |= {name: [run.mechanisms[name] for run in runs] for name in runs[0].mechanisms}

    def rounded(of_runs: list[list[float]], digits: int) -> list[list[float]]:
        return [[float(f"{value:.{digits}g}") for value in run] for run in of_runs]

    return {
        "settings": settings,
        "test": {metric: [score[metric] for score in scores] for metric in scores[0]},
        "loss_ms": statistics.median(run.loss_ms for run in runs),
        "step_ms": statistics.median(run.step_ms for run in runs),
        "first_losses": rounded([run.first_losses for run in runs], 8),
        "curves": {name: rounded(of_runs, 5) for name, of_runs in curves.items() if of_runs[0]},
    }


def report(data: Dataset, chosen: list[Case], options: argparse.Namespace, command: str) -> None:
    """Trains with the recorded settings, prints the table, draws the curves."""
    chosen_on = options.results / f"{data.settings_of or data.name}.json"
    all_settings = records.settings_of(chosen_on, [case.name for case in chosen])
    seeds, epochs = options.seeds or data.seeds, options.epochs or data.epochs
    shard = fl.ClassShard.split(data.num_classes) if options.class_parallel else None
    name = data.name + ("-class-parallel" if shard else "-linear" if options.linear else "")
    name += "" if options.dtype == "float32" else f"-{options.dtype}"
    path = options.results / f"{name}-runs.json"
    head = {
        "data": name,
        "command": f"{command} --record",
        "versions": records.versions(),
        "threads": torch.get_num_threads(),
        "budget": {"seeds": list(range(seeds)), "epochs": epochs, "device": options.device},
    }
    if options.record:
        records.check_budget(path, head["budget"], [case.name for case in chosen])
    probe = probe_of(data.train) if options.record else None
    linear = options.linear or options.class_parallel
    leads = shard is None or dist.get_rank() == 0  # of the ranks, which all have the same results, the one that tells
    done, rows = {}, []
    with tqdm(total=len(chosen) * seeds * epochs, unit="epoch", disable=not leads) as progress:
        for case in chosen:
            progress.set_description(case.name)
            settings = all_settings[case.name]
            runs = [fit(data, case, settings, s, epochs, progress, linear, probe, shard) for s in range(seeds)]
            done[case.name] = entry(runs, [data.metrics(run.model, data.test) for run in runs], settings)
            if options.record and leads:
                records.write(path, head, case.name, done[case.name], [case.name for case in cases(data)])
    if not leads:
        return
    for loss, found in done.items():
        by_metric = [spread([100 * score for score in scores]) for scores in found["test"].values()]
        times = [f"{found[ms]:.3f}" for ms in ("loss_ms", "step_ms")]
        rows.append([loss, spell(found["settings"]), *by_metric, *times])
    metrics = [f"test {metric}, %" for metric in found["test"]]
    loss_column = "classifier and loss, ms/step" if linear else "loss, ms/step"
    print(f"\n{name}: {counted(seeds, 'seed')}, mean ± standard deviation; settings chosen on the validation split\n")
    print(table(["loss", "hyper-parameters", *metrics, loss_column, "whole step, ms"], rows))
    figure = options.output / f"{name}.png"
    figures.curves(head | {"losses": done}, figure)
    print(f"\ncurves: {figure}")
    if options.record:
        print(f"recorded: {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=[*DATA, *FOLDERS], default="digits")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder with the files of omniglot or corel5k")
    parser.add_argument(
        "--many-classes", type=int, nargs="*", metavar="C",
        help=f"pad the classifier with distractors to C classes (default: {', '.join(map(str, MANY_CLASSES))})",
    )  # fmt: skip
    parser.add_argument("--linear", action="store_true", help="classifier and loss in one fl.LinearLoss")
    parser.add_argument("--class-parallel", action="store_true", help="that, its classes sharded over the processes")
    parser.add_argument("--tune", action="store_true", help="choose the hyper-parameters, record them and stop")
    parser.add_argument("--trials", type=int, help="settings tried per loss with --tune")
    parser.add_argument("--tuning-seeds", type=int, help=f"runs per setting tried, up to {len(TUNING_SEEDS)}")
    parser.add_argument("--record", action="store_true", help="keep the results of the runs beside the settings")
    parser.add_argument("--seeds", type=int, help="runs per loss")
    parser.add_argument("--epochs", type=int, help="like the four numbers above, by default what the data set asks for")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="rows of the table to run (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32",
        help="in float64 two ways to compute one training stay together: float32's rounding grows with the steps",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small networks gain nothing from more")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of what is recorded")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the curves (default out)")
    options = parser.parse_args(argv)
    for name, least in (("trials", 1), ("tuning_seeds", 1), ("seeds", 1), ("epochs", 1), ("threads", 1)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least {least}")
    for name in ("linear", "class_parallel"):
        if options.tune and getattr(options, name):
            parser.error(f"argument --{name.replace('_', '-')}: it trains with the settings chosen without it")

    torch.set_num_threads(options.threads)
    launcher = "python"
    if options.class_parallel:
        launcher = join_ranks(parser, options.device)
    command = f"{launcher} -m bench.evidence.train --data {options.data}" + (" --root DIR" if options.root else "")
    try:
        data = load(options.data, options.root, hold_out=options.tune).to(options.device, getattr(torch, options.dtype))
        variants = [data]
        if options.many_classes is not None:
            variants = [padded(data, number) for number in options.many_classes or MANY_CLASSES]
    except (DataError, ValueError) as error:
        parser.error(str(error))
    if options.tune and data.settings_of is not None:
        parser.error(f"argument --tune: {data.name} takes the settings of {data.settings_of}")
    for data in variants:
        known = {case.name: case for case in cases(data)}
        for name in options.losses or ():
            if name not in known:
                parser.error(f"argument --losses: invalid choice: {name!r} (choose from {', '.join(known)})")
        names = options.losses or (known if options.many_classes is None else AMONG_MANY)
        many = "" if options.many_classes is None else f" --many-classes {data.num_classes}"
        work = choose if options.tune else report
        linear = " --class-parallel" if options.class_parallel else " --linear" if options.linear else ""
        if options.dtype != "float32":
            linear += f" --dtype {options.dtype}"
        try:
            work(data, [known[name] for name in names], options, command + many + linear)
        except RecordError as error:
            raise SystemExit(str(error)) from error
    if options.class_parallel:
        gc.collect()  # gloo may abort a process whose modules outlive the group
        dist.destroy_process_group()


def join_ranks(parser: argparse.ArgumentParser, device: str) -> str:
    """Becomes a rank of those that torchrun has started; how they were."""
    if not dist.is_torchelastic_launched():
        parser.error(
            "argument --class-parallel: needs processes: torchrun --nproc-per-node 2 -m bench.evidence.train ..."
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return f"torchrun --nproc-per-node {dist.get_world_size()}"


if __name__ == "__main__":
    main()
