"""What must not be an exception on the CPU: kinds of rows, numbers of picks, multi-hot targets, float64.

Each group is measured as one case of cpu.py is, interleaved, and its bars compare times of that one run.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl
from bench.speed import cases
from bench.speed.cases import Provider, Shape

Step = Callable[[], object]


class Bar(NamedTuple):
    """ours takes at most `most` times as long as each rival."""

    ours: str
    rivals: tuple[str, ...]
    most: float


class Group(NamedTuple):
    name: str
    shape: Shape
    steps: Callable[[], dict[str, Step]]  # made when their turn comes: the tensors are large
    unit: str  # the step that the others are shown as a share of
    bars: list[Bar]

    def __str__(self) -> str:
        return self.name


def step_of(provider: Provider, logits: Tensor, target: Tensor) -> Step:
    def step():
        logits.grad = None
        provider(logits, target).backward()

    return step


def hs_lr(k: int) -> Provider:
    return lambda logits, target: fl.hs_lr_loss(logits, target, k=k)


# --- kinds of rows ----------------------------------------------------------------------------------------------------

KINDS = ("trained head", "ascending", "side by side", "three values", "two values", "masked")


def rows_of(kind: str, shape: Shape, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor]:
    """Logits and class indices; beside those of cases.make, what a search for the k hardest may stumble on."""
    if kind in cases.INPUTS:
        return cases.make(shape, dtype, "cpu", inputs=kind)
    logits, target = cases.make(shape, dtype, "cpu")
    with torch.no_grad():
        if kind == "side by side":  # confusable classes are neighbours: those of one branch of WordNet
            hardest, others = logits.sort(1, descending=True).values.tensor_split([k], 1)
            logits.copy_(torch.cat([others[:, : shape.classes // 3], hardest, others[:, shape.classes // 3 :]], 1))
        elif kind == "two values":  # half of the picks, and all others
            logits.copy_(logits >= logits.topk(k // 2, 1).values[:, -1:])
        else:
            logits.masked_fill_(torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.99, -torch.inf)
    return logits, target


def kinds_of_rows(shape: Shape, dtype: str, k: int, most: float) -> Group:
    def steps() -> dict[str, Step]:
        kinds = {kind: rows_of(kind, shape, cases.DTYPES[dtype], k) for kind in ("normal", *KINDS)}
        return {kind: step_of(hs_lr(k), *row) for kind, row in kinds.items()}

    bars = [Bar(kind, ("normal",), most) for kind in KINDS]
    return Group(f"HS-LR, kinds of rows: {shape} {dtype}, k = {k}", shape, steps, "normal", bars)


# --- numbers of picks -------------------------------------------------------------------------------------------------

# On both sides of every number from which on the search goes another way, as shares of the classes: blocks of another
# length, denser candidates, the other form of the picks, all candidates.
BORDERS = (1 / 64, 1 / 24, 1 / 16, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 4 / 7)


def numbers_of_picks(shape: Shape, dtype: str) -> Group:
    pairs = [(round(0.99 * share * shape.classes), round(1.01 * share * shape.classes)) for share in BORDERS]

    def steps() -> dict[str, Step]:
        row = cases.make(shape, cases.DTYPES[dtype], "cpu")
        return {f"k = {k}": step_of(hs_lr(k), *row) for pair in pairs for k in pair}

    bars = [Bar(f"k = {above}", (f"k = {below}",), 1.15) for below, above in pairs]
    return Group(f"HS-LR, neighbouring k: {shape} {dtype}", shape, steps, f"k = {pairs[0][0]}", bars)


# --- multi-hot targets ------------------------------------------------------------------------------------------------


def multi_hot(shape: Shape, of_bce: float, lr: float, hs: float) -> Group:
    """Three positives a row; LR and HS-LR beside themselves with class indices, LR beside binary cross-entropy."""
    k = shape.classes // 100

    def steps() -> dict[str, Step]:
        logits, index = cases.make(shape, torch.float32, "cpu")
        several = torch.randint(shape.classes, (shape.rows, 3), generator=torch.Generator().manual_seed(1))
        dense = torch.zeros(shape.rows, shape.classes).scatter_(1, several, 1.0)
        of_dtype = {"float32": dense, "bool": dense.bool(), "int64": dense.long()}
        found = {
            "BCE": step_of(lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"), logits, dense),
            "LR, index": step_of(fl.lr_loss, logits, index),
            "HS-LR, index": step_of(hs_lr(k), logits, index),
        }
        for name, target in of_dtype.items():
            found |= {f"LR, {name}": step_of(fl.lr_loss, logits, target)}
            found |= {f"HS-LR, {name}": step_of(hs_lr(k), logits, target)}
        return found

    bars = [Bar("LR, float32", ("BCE",), of_bce)]
    for name in ("float32", "bool"):
        bars += [Bar(f"LR, {name}", ("LR, index",), lr), Bar(f"HS-LR, {name}", ("HS-LR, index",), hs)]
    return Group(f"Multi-hot targets: {shape}, k = {k}", shape, steps, "BCE", bars)


# --- float64 ----------------------------------------------------------------------------------------------------------


def double(shape: Shape, most: dict[str, float]) -> Group:
    eager = {loss: cases.eager_of(loss) for loss in cases.LOSSES}

    def steps() -> dict[str, Step]:
        row = cases.make(shape, torch.float64, "cpu")
        found = {}
        for loss, other in eager.items():
            name = cases.NAMES[loss]
            found |= {f"{name}, ours": step_of(getattr(fl, loss), *row), f"{name}, eager": step_of(other, *row)}
        return found

    bars = [Bar(f"{name}, ours", (f"{name}, eager",), bar) for name, bar in most.items()]
    return Group(f"float64: {shape}", shape, steps, "CE, eager", bars)


def groups() -> Iterator[Group]:
    yield kinds_of_rows(Shape(64, 21841), "fp32", 218, 1.2)
    yield kinds_of_rows(Shape(64, 21841), "bf16", 218, 1.2)
    yield kinds_of_rows(Shape(256, 1000), "fp32", 100, 1.2)
    yield kinds_of_rows(Shape(16, 100000), "fp32", 1000, 1.2)
    yield numbers_of_picks(Shape(64, 21841), "fp32")
    yield numbers_of_picks(Shape(64, 21841), "bf16")
    yield multi_hot(Shape(64, 1000), of_bce=0.8, lr=1.6, hs=1.6)
    yield multi_hot(Shape(64, 21841), of_bce=0.55, lr=1.7, hs=1.8)
    yield double(Shape(64, 1000), {"CE": 1.0, "NLLR": 0.8, "CRL": 0.75, "LR": 0.72, "SS-LR": 0.65})
    yield double(Shape(16, 21841), {"CE": 0.75, "NLLR": 0.75, "CRL": 0.72, "LR": 0.67, "SS-LR": 0.75})
