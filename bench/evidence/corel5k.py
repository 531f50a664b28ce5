"""Corel5k: 5000 photographs, each with one to five of 374 keywords, as 499 binary features (visual words).

Duygulu et al., ECCV 2002, as distributed with Mulan (https://mulan.sourceforge.net/datasets-mlc.html).
"""

import re
from pathlib import Path

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from bench.evidence import networks
from bench.evidence.data import DataError, Dataset, Split
from bench.evidence.metrics import label_ranking

SOURCE = "https://mulan.sourceforge.net/datasets-mlc.html"
TRAIN, TRAIN_ROWS = "Corel5k-train-sparse.arff", 4500
TEST, TEST_ROWS = "Corel5k-test-sparse.arff", 500
FEATURES, LABELS = 499, 374  # the labels are the last attributes
ATTRIBUTE = re.compile(r"@attribute\s+(\S+|'[^']*'|\"[^\"]*\")\s+\{\s*0\s*,\s*1\s*\}", re.IGNORECASE)
ROW = re.compile(r"\{\s*(\d+\s+1(\s*,\s*\d+\s+1)*)?\s*\}")  # {index 1,index 1,...}: what is not named is 0


def read_sparse_arff(path: Path, rows: int) -> tuple[list[str], Tensor]:
    """Attribute names, and (rows, attributes) of 0 and 1. scipy.io.arff, which reads ARFF, refuses sparse files.

    Raises DataError for a file that is missing or not of this form and count.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: it comes from {SOURCE}")
    names: list[str] = []
    columns: list[list[int]] = []  # of the ones of each row
    in_data = False
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("%"):
            continue
        if in_data:
            columns.append(ones_of(path, number, line, len(names)))
        elif line.lower() == "@data":
            in_data = True
        elif attribute := ATTRIBUTE.fullmatch(line):
            names.append(attribute[1].strip("'\""))
        elif not line.lower().startswith("@relation"):
            raise DataError(f"{path}, line {number}: expected @relation, @data or a {{0,1}} @attribute, found {line!r}")
    if len(names) != FEATURES + LABELS:
        raise DataError(f"{path} should have {FEATURES} features and {LABELS} labels, found {len(names)} attributes")
    if len(columns) != rows:
        raise DataError(f"{path} should have {rows} rows, found {len(columns)}")
    table = torch.zeros(rows, len(names))
    for row, ones in zip(table, columns, strict=True):
        row[ones] = 1
    return names, table


def ones_of(path: Path, number: int, line: str, attributes: int) -> list[int]:
    if not ROW.fullmatch(line):
        raise DataError(f"{path}, line {number}: expected {{index 1,index 1,...}}, found {line[:60]!r}")
    ones = [int(pair.split()[0]) for pair in line.strip("{} ").split(",") if pair]
    if ones != sorted(set(ones)) or (ones and ones[-1] >= attributes):
        raise DataError(f"{path}, line {number}: indices should rise and stay below {attributes}")
    return ones


def read_split(path: Path, rows: int) -> tuple[list[str], Split]:
    names, table = read_sparse_arff(path, rows)
    return names, Split(table[:, :FEATURES].contiguous(), table[:, FEATURES:].contiguous())


def corel5k(root: Path, hold_out: bool) -> Dataset:
    """The usual 4500 photographs to train and 500 to test; `hold_out` makes 500 of the 4500 the validation split."""
    names, train = read_split(root / TRAIN, TRAIN_ROWS)
    test_names, test = read_split(root / TEST, TEST_ROWS)
    if names != test_names:
        raise DataError(f"{TRAIN} and {TEST} in {root} do not have the same attributes")
    validation = None
    if hold_out:
        kept, held_out = train_test_split(torch.arange(TRAIN_ROWS), test_size=500, random_state=0)
        train, validation = (Split(train.inputs[rows], train.target[rows]) for rows in (kept, held_out))
    return Dataset(
        name="corel5k",
        train=train,
        validation=validation,
        test=test,
        num_classes=LABELS,
        network=lambda: networks.regularised_perceptron(FEATURES, 256),
        features=256,
        metrics=label_ranking,
        hardest=(1, 4, 12, 40, 120),
        epochs=20,
        batch_size=64,
        trials=32,
        tuning_seeds=2,
        learning_rates=(1e-4, 1.0),
    )
