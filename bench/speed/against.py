"""Two checkouts of this package in turns, on the CPU: what a change costs or gives, cell by cell.

    git worktree add ../before COMMIT    (and build its extension there)
    python -m bench.speed.against ../before
    python -m bench.speed.against ../before --only "HS-LR .* 21841"

Each checkout has a process of its own; they go through the cells side by side, one thread, and only their own processor
time counts. A cell's time is the 20th percentile of its calls, the ratio the median over the turns. Every turn has new
processes: where the pages of one happen to lie is worth 10 % of a large cell. A cell that the other checkout cannot run
is named and left out.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

OURS = Path(__file__).parents[2]
SHAPES = ((8, 10), (256, 100), (256, 1000), (256, 21841), (64, 100_000))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SHARES = (1000, 300, 100, 50, 30, 20, 15, 10, 8, 6, 5, 4, 3.5, 3, 2.6, 2.3, 2)  # classes / k
SECONDS = 0.15  # of a cell, in every turn

Call = Callable[[], object]


# Nothing here imports the rest of bench.speed while a checkout is measured: that knows this package from inside, and
# the other checkout is an older one.


# --- the cells --------------------------------------------------------------------------------------------------------


def step(loss: Callable, logits: Tensor, target: Tensor) -> Call:
    leaf = logits.requires_grad_()

    def call():
        leaf.grad = None
        loss(leaf, target).backward()

    return call


def forward(loss: Callable, logits: Tensor, target: Tensor) -> Call:
    def call():
        with torch.no_grad():
            loss(logits, target)

    return call


def draw(rows: int, classes: int, dtype: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).to(DTYPES[dtype])
    return logits, torch.randint(classes, (rows,), generator=generator)


def multi_hot_of(target: Tensor, classes: int) -> Tensor:
    hot = torch.zeros(len(target), classes, dtype=torch.bool)
    for shift in range(5):
        hot.scatter_(1, ((target + shift * 7919) % classes)[:, None], True)
    return hot


def rows_of_kind(kind: str, logits: Tensor) -> Tensor:
    """Rows that may defeat a selection."""
    rows, classes = logits.shape
    if kind == "ascending":
        return logits.sort(dim=1).values
    if kind == "descending":
        return logits.sort(dim=1, descending=True).values
    if kind == "clustered":  # the hardest side by side
        start = torch.arange(rows)[:, None] * 37 % (classes - classes // 50)
        return logits.scatter_add(1, start + torch.arange(classes // 50), torch.full((rows, classes // 50), 3.0))
    if kind == "two values":
        return (logits > 2.4).to(logits.dtype)
    if kind == "99 % masked":
        return logits.masked_fill(
            torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.99, -torch.inf
        )
    raise ValueError(kind)


def cells() -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names, and what makes the call; of the package that is imported."""
    import fused_losses as fl

    def hardest(loss: Callable, k: int) -> Callable:
        return lambda logits, target: loss(logits, target, k=k)

    plain = {
        "CE": fl.cross_entropy, "NLLR": fl.nllr_loss, "CRL": fl.crl_loss, "LR": fl.lr_loss, "SS-LR": fl.ss_lr_loss,
    }  # fmt: skip
    for dtype in DTYPES:
        for rows, classes in SHAPES:
            losses = plain | {"HS-LR": hardest(fl.hs_lr_loss, max(1, classes // (10 if classes <= 1000 else 100)))}
            for name, loss in losses.items():
                where = f"{name} {dtype} {rows} x {classes}"
                yield where, lambda loss=loss, of=(rows, classes, dtype): step(loss, *draw(*of))
                if classes <= 1000 and dtype == "fp32":
                    yield f"{where} no_grad", lambda loss=loss, of=(rows, classes, dtype): forward(loss, *draw(*of))
    for rows, classes in ((64, 1000), (32, 21841)):
        of_hot = {"LR": fl.lr_loss, "SS-LR": fl.ss_lr_loss, "HS-LR": hardest(fl.hs_lr_loss, classes // 100)}
        for name, loss in of_hot.items():

            def call(loss=loss, rows=rows, classes=classes) -> Call:
                logits, target = draw(rows, classes, "fp32")
                return step(loss, logits, multi_hot_of(target, classes))

            yield f"{name} multi-hot {rows} x {classes}", call
    for rows, classes in ((256, 1000), (64, 21841)):
        for kind in ("ascending", "descending", "clustered", "two values", "99 % masked"):

            def call(kind=kind, rows=rows, classes=classes) -> Call:
                logits, target = draw(rows, classes, "fp32")
                return forward(hardest(fl.hs_lr_loss, classes // 100), rows_of_kind(kind, logits), target)

            yield f"HS-LR forward, {kind} {rows} x {classes}", call
    for share in SHARES:
        k = int(21841 / share)
        yield (
            f"HS-LR step k = C/{share:g} 64 x 21841",
            lambda k=k: step(hardest(fl.hs_lr_loss, k), *draw(64, 21841, "fp32")),
        )

    def linear_hs_lr(*of: Tensor) -> Tensor:
        if hasattr(fl, "linear_hs_lr_loss"):  # as it was before 0.1.0
            return fl.linear_hs_lr_loss(*of, k=100)
        return fl.linear_loss(*of, loss=fl.HSLRLoss(k=100))

    for name, loss in {"CE": fl.linear_cross_entropy, "HS-LR": linear_hs_lr}.items():

        def call(loss=loss) -> Call:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(64, 128, generator=generator).requires_grad_()
            w = torch.randn(20_000, 128, generator=generator).requires_grad_()
            target = torch.randint(20_000, (64,), generator=generator)

            def call():
                x.grad = w.grad = None
                loss(x, w, target).backward()

            return call

        yield f"linear {name} 64 x 128 x 20000", call


def peers() -> Iterator[tuple[str, Callable[[], Call]]]:
    """F.cross_entropy beside every shape."""
    for dtype in DTYPES:
        for rows, classes in SHAPES:
            where = f"F.cross_entropy {dtype} {rows} x {classes}"
            yield where, lambda of=(rows, classes, dtype): step(F.cross_entropy, *draw(*of))
            if classes <= 1000 and dtype == "fp32":
                yield f"{where} no_grad", lambda of=(rows, classes, dtype): forward(F.cross_entropy, *draw(*of))


# --- a process of one checkout ----------------------------------------------------------------------------------------


def time_of(call: Call) -> float:
    """Microseconds of this thread."""
    call()
    times, started = [], time.thread_time()
    while len(times) < 5 or time.thread_time() - started < SECONDS:
        before = time.thread_time()
        call()
        times.append(time.thread_time() - before)
    return 1e6 * statistics.quantiles(times, n=5)[0]


def serve() -> None:
    """Reads the names of cells, answers with their times."""
    torch.set_num_threads(1)
    known = dict(cells()) | dict(peers())
    for line in sys.stdin:
        try:
            print(json.dumps(time_of(known[line.strip()]())), flush=True)
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)


def process_of(checkout: Path) -> subprocess.Popen:
    from bench.speed.cpu import MALLOC

    code = f"import sys; sys.path[:0] = [{str(checkout)!r}]; import fused_losses; sys.path[0] = {str(OURS)!r}; "
    code += "from bench.speed.against import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ask(process: subprocess.Popen, cell: str) -> float | str:
    process.stdin.write(cell + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def one_turn(before: Path, names: list[str]) -> dict[str, list[float | str]]:
    """By cell, the time of each checkout, or what went wrong."""
    processes = [process_of(before), process_of(OURS)]
    times = {}
    for name in names:
        times[name] = [ask(process, name) for process in processes]
        print(name, *times[name], file=sys.stderr, flush=True)
    for process in processes:
        process.stdin.close()
        process.wait()
    return times


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout, with its extension built")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="cells whose name this matches")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--write", type=Path, help="a file for the table")
    options = parser.parse_args(argv)
    from bench.evidence.tables import table

    names = [name for name, _ in (*peers(), *cells()) if options.only.search(name)]
    turns = [one_turn(options.before.resolve(), names) for _ in range(options.turns)]
    rows = []
    of_peer: dict[str, float] = {}
    for cell in names:
        answers = [turn[cell] for turn in turns]
        failed = next((answer for pair in answers for answer in pair if isinstance(answer, str)), None)
        if failed:
            print(f"{cell}: {failed}", file=sys.stderr)
            continue
        old, new = (statistics.median(times) for times in zip(*answers, strict=True))
        ratio = statistics.median(after / before for before, after in answers)
        if cell.startswith("F.cross_entropy"):
            of_peer[cell.removeprefix("F.cross_entropy ")] = new
            continue
        peer = of_peer.get(cell.partition(" ")[2])
        rows.append([cell, f"{old:.1f}", f"{new:.1f}", f"{ratio:.2f}", f"{new / peer:.2f}" if peer else ""])
    text = table(["cell", "before, us", "after, us", "after / before", "after / F.cross_entropy"], rows)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text + "\n")
    else:
        print(f"\n{text}")


if __name__ == "__main__":
    main()
