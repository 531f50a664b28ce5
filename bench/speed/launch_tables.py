"""Which launch table is the fastest on this GPU: ``python -m bench.speed.launch_tables --out FILE``.

Every kernel of the k hardest and of all negatives with tiles of several sizes, forward and gradient in one launch, and
the search for the k hardest with blocks of several widths, beside what the tables of ``fused_losses/gpu`` have: median
milliseconds with the caches flushed, and the share of a device copy's speed. They are replayed as CUDA graphs: what the
processor does is left out.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton

from bench.speed import cases, gpu
from fused_losses import ops
from fused_losses.gpu import device, doors, hardest
from fused_losses.gpu.device import Tile
from fused_losses.losses import LossSpec

TILES = (Tile(8, 4), Tile(4, 4), Tile(4, 8), Tile(8, 2), Tile(16, 2))
SHORT_TILES = (Tile(1, 4), Tile(2, 2))
WIDTHS = (0, 8, 16, 32, 64)  # logits per block
LOSSES = {"CE": ("cross_entropy", []), "LR": ("lr", []), "SS-LR": ("ss_lr", [2.0])}
SHAPES = (
    cases.Shape(4096, 1000), cases.Shape(256, 21841), cases.Shape(4096, 21841), cases.Shape(512, 100003),
    cases.Shape(2048, 100003), cases.Shape(8192, 32768),
)  # fmt: skip
PICKED = (
    (cases.Shape(4096, 1000), 10), (cases.Shape(4096, 1000), 100), (cases.Shape(256, 21841), 218),
    (cases.Shape(256, 21841), 2184), (cases.Shape(4096, 21841), 218), (cases.Shape(4096, 21841), 2184),
    (cases.Shape(512, 100003), 100), (cases.Shape(512, 100003), 1000), (cases.Shape(512, 100003), 10000),
    (cases.Shape(256, 1000000), 1000),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    loss: str
    shape: cases.Shape
    k: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.loss}, k {self.k} | {self.shape} | {self.dtype}"

    def spec(self) -> LossSpec:
        name, params = LOSSES[self.loss]
        device, dtype = torch.device("cuda"), cases.DTYPES[self.dtype]
        compact = ops.keeps_picks(device, dtype, self.shape.classes, self.k, False)
        return LossSpec(name, params, None, self.k, -100, 0, self.shape.classes, compact)


def every_cell() -> Iterator[Cell]:
    for dtype in cases.DTYPES:
        for shape in SHAPES:
            for loss in LOSSES:
                yield Cell(loss, shape, 0, dtype)
        for shape, k in PICKED:
            for loss in ("CE", "LR"):
                yield Cell(loss, shape, k, dtype)


@contextlib.contextmanager
def table_of(change: Tile | int | None):
    """A tile for all, or a width of blocks, or the tables as they are. Where a row is held its tile is the row."""
    names = (device, "_TILES"), (device, "_LONG"), (device, "_SMALL"), (hardest, "_FEW_ROWS"), (hardest, "_MANY_ROWS")
    with contextlib.ExitStack() as stack:
        if isinstance(change, Tile):
            for module, name in names:
                stack.enter_context(patch.object(module, name, () if name == "_TILES" else change))
        elif change is not None:
            stack.enter_context(patch.object(hardest, "block_width", lambda num_classes, k: change))
        yield


def runs(cell: Cell) -> Iterator[tuple[str, object]]:
    """forward and backward, and both at once, by name."""
    logits, target = cases.make(cell.shape, cases.DTYPES[cell.dtype], "cuda")
    logits, spec = logits.detach(), cell.spec()
    kept = doors.forward(logits, target, None, "mean", *spec)
    grad = torch.ones((), device="cuda")
    given = None if spec.compact else logits
    yield "forward", lambda: doors.forward(logits, target, None, "mean", *spec)
    yield "backward", lambda: doors.backward(grad, kept[1], given, target, *kept[2:], cell.shape.classes, *spec)
    if spec.k == 0:
        grads, over = torch.ones(cell.shape.rows, device="cuda"), logits.clone()
        yield "at once", lambda: doors.at_once_(grads, over, target, None, *spec)


def changes_for(cell: Cell) -> dict[str, Tile | int | None]:
    """By name, what is tried instead of the tables' own, which comes first."""
    tiles = SHORT_TILES if cell.shape.classes <= 2048 else TILES
    found = {"now": None} | {f"{tile.warps} x {tile.rows}": tile for tile in tiles}
    if cell.k and cell.shape.classes > 2048:
        own = hardest.block_width(cell.shape.classes, cell.k)
        most = cell.shape.classes / cell.k  # wider blocks of the k winners would be the whole row
        found |= {f"width {width}": width for width in WIDTHS if width != own and width <= most}
    return found


def measure(cells: list[Cell], out: Path) -> None:
    copy = gpu.copy_speed(gpu.Clock("cuda", 100))
    found = gpu.header("cuda") | {"copy GB/s": copy, "rows": {}}
    for cell in cells:
        nbytes = cell.shape.nbytes(cases.DTYPES[cell.dtype])
        for change, value in changes_for(cell).items():
            with table_of(value):
                for name, run in runs(cell):
                    if name != "forward" and isinstance(value, int):
                        continue
                    replay = gpu.replayed(run)
                    milliseconds = triton.testing.do_bench(replay, warmup=3, rep=20, return_mode="median")
                    found["rows"].setdefault(f"{cell} | {name}", {})[change] = milliseconds
        for name, passes in (("forward", 1), ("backward", 1 if cell.spec().compact else 2), ("at once", 3)):
            of_cell = found["rows"].get(f"{cell} | {name}")
            if of_cell is None:
                continue
            best = min(of_cell, key=of_cell.get)
            share = passes * nbytes / of_cell["now"] / 1e6 / copy
            print(
                f"{cell} | {name:8} {of_cell['now']:8.3f} ms {100 * share:4.0f} % of a copy; "
                + " ".join(f"{name} {ms / of_cell['now']:.2f}" for name, ms in of_cell.items() if name != "now")
                + f"; {best}",
                flush=True,
            )
        out.write_text(json.dumps(found, indent=1))


def compile_share(cells: list[Cell], turn: int, turns: int) -> None:
    everything = [(cell, change) for cell in cells for change in changes_for(cell).values()]
    for cell, change in everything[turn::turns]:
        with table_of(change):
            for _, run in runs(cell):
                run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=12, help="that compile side by side (default: 12)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose name it finds")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cells = [cell for cell in every_cell() if re.search(options.only, str(cell))]
    if options.compile is not None:
        compile_share(cells, options.compile, options.processes)
        return
    command = [sys.executable, "-m", "bench.speed.launch_tables", *sys.argv[1:], "--compile"]
    for process in [subprocess.Popen([*command, str(turn)]) for turn in range(options.processes)]:
        process.wait()
    measure(cells, options.out)


if __name__ == "__main__":
    main()
