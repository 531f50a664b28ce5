"""Rows of logits that a kernel could get wrong. A row is a case."""

import math

import torch
from gpu_doors import make
from torch import Tensor

INF, NAN = math.inf, math.nan


def special_rows(dtype: torch.dtype, classes: int) -> tuple[Tensor, Tensor]:
    """Edges, one per row: design of the family, section Edges; and where a row's vectors begin and end."""
    nan = torch.tensor(NAN, dtype=dtype)
    negative_nan = torch.tensor(-1, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    lowest = torch.finfo(dtype).min
    edits = [  # (class, logit), all classes where the class is None; the target is class 9
        [(9, -INF)],
        [(9, INF)],
        [(None, -INF)],
        [(None, -INF), (9, 1.5)],
        [(None, lowest)],
        [(None, lowest), (9, 2.0)],
        [(None, 6e4)],
        [(3, -INF), (40, -INF), (classes - 1, -INF)],
        [(0, INF)],
        [(classes - 1, INF), (4, -INF)],
        [(9, nan)],
        [(9, negative_nan)],
        [(0, nan)],
        [(classes // 2, negative_nan)],
        [(classes - 1, nan), (3, INF)],
        [(9, 80.0)],
        [(9, -80.0)],
        [(None, 0.0)],
    ]
    logits, _ = make(len(edits), classes, dtype, seed=7)
    for row, row_edits in zip(logits, edits, strict=True):
        for place, logit in row_edits:
            row[slice(None) if place is None else place] = logit
    return logits, torch.full((len(edits),), 9)


def rows_of_every_kind(classes: int, k: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(classes, generator=generator)  # noqa: E731
    places = torch.arange(classes)
    rows = {f"{n} values": torch.randint(n, (classes,), generator=generator) / 4 - 1 for n in (2, 5, 30)}
    rows |= {
        "normal": 3 * normal(),
        "wide": (normal() / normal()).clamp(-6e4, 6e4),
        "far from 0": 1000 + normal(),
        "ascending": normal().sort().values,
        "descending": normal().sort(descending=True).values,
        "all equal": torch.full((classes,), -1.5),
        "both zeros": torch.where(normal() > 0, 0.0, -0.0),
        "subnormal": normal().sign() * torch.finfo(torch.float16).smallest_normal / 4,
        "one-hot peak": torch.where(places == classes // 3, 9.0, 0.0),
        "hardest together": normal() + 20 * ((places >= classes // 4) & (places < classes // 4 + k)),
        "hardest at stride 8": normal() + 20 * (places % 8 == 3),
        "hardest at stride 16": normal() + 20 * (places % 16 == 0),
        "masked": normal().masked_fill(torch.rand(classes, generator=generator) < 0.7, -INF),
        "nearly all masked": torch.where(places == classes - 1, 0.5, -INF),
        "all masked": torch.full((classes,), -INF),
        "+inf": torch.where(places == classes // 2, INF, normal()),
        "NaN": torch.where(places == classes // 2, NAN, normal()),
        "-NaN at the end": torch.where(places == classes - 1, -NAN, normal()),
        "all NaN": torch.full((classes,), NAN),
        "hardest in front, the rest equal": torch.where(places < max(1, k // 2), 5.0, 0.0),
        "-0 above all": torch.where(normal() > 0, -0.0, -1.0),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def targets_for(logits: Tensor, seed: int = 0) -> Tensor:
    """Random classes; every third row's target is its largest logit, so that it stands among what is picked from."""
    target = torch.randint(logits.shape[1], (logits.shape[0],), generator=torch.Generator().manual_seed(seed))
    target[::3] = logits[::3].float().nan_to_num(nan=0.0).argmax(1)
    return target
