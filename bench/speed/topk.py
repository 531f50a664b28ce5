"""Time and peak memory of finding the k nearest of very many identities: LinearLoss.topk, in one process and sharded,
plain PyTorch, and faiss's exact index where it is installed.

    python -m bench.speed.topk
    python -m bench.speed.topk --classes 10000000 --ranks 4

Each has processes of its own, which take turns; the time is the median of all rounds, of the slowest rank. Memory is
what a search takes at its peak beyond the queries and the classes' vectors, of all ranks together: max RSS, on Linux
with glibc. Ranks share the threads. All must find logits that agree.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fused_losses as fl
from bench.speed.linear import MIB, peak_bytes

BLOCK = 65_536  # classes
Search = Callable[[Tensor], Tensor]  # queries (rows, features) -> their k largest logits (rows, k)


@dataclass(frozen=True)
class Case:
    classes: int = 1_000_003
    features: int = 64
    rows: int = 32
    k: int = 100

    def queries(self) -> Tensor:
        return torch.randn(self.rows, self.features, generator=torch.Generator().manual_seed(0))

    def vectors(self, start: int, stop: int) -> Tensor:
        """Of these classes: the same whoever asks, and never all of them beside them."""
        vectors = torch.empty(stop - start, self.features)
        for first in range(start - start % BLOCK, stop, BLOCK):
            block = torch.randn(BLOCK, self.features, generator=torch.Generator().manual_seed(1 + first // BLOCK))
            begin, end = max(first, start), min(first + BLOCK, stop)
            vectors[begin - start : end - start] = block[begin - first : end - first]
        return vectors


# --- who searches -----------------------------------------------------------------------------------------------------


def ours(case: Case, shard: fl.ClassShard | None = None) -> Search:
    head = fl.LinearLoss(case.features, case.classes, shard=shard)
    weight = head.weight.detach()
    mine = weight.to_local() if hasattr(weight, "to_local") else weight
    mine.copy_(case.vectors(0, case.classes) if shard is None else case.vectors(shard.start, shard.stop))
    return lambda x: head.topk(x, case.k).values


def at_once(case: Case) -> Search:
    w = case.vectors(0, case.classes)
    return lambda x: (x @ w.t()).topk(case.k).values


def in_blocks(case: Case) -> Search:
    """The best so far beside the logits of a block."""
    w = case.vectors(0, case.classes)

    def search(x: Tensor) -> Tensor:
        best = torch.full((x.shape[0], case.k), -torch.inf)
        index = torch.zeros(x.shape[0], case.k, dtype=torch.int64)
        for first in range(0, case.classes, BLOCK):
            logits = x @ w[first : first + BLOCK].t()
            found, where = logits.topk(min(case.k, logits.shape[1]))
            best, chosen = torch.cat((best, found), dim=1).topk(case.k)
            index = torch.cat((index, where + first), dim=1).gather(1, chosen)
        return best

    return search


def faiss_flat(case: Case) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(case.features)
    index.add(case.vectors(0, case.classes).numpy())
    return lambda x: torch.from_numpy(index.search(x.numpy(), case.k)[0])


OURS = "LinearLoss.topk"
ALONE: dict[str, Callable[[Case], Search]] = {
    OURS: ours,
    "(x @ W.T).topk(k)": at_once,
    "(x @ W.T).topk(k), in blocks": in_blocks,
}
if importlib.util.find_spec("faiss"):
    ALONE["faiss.IndexFlatIP"] = faiss_flat


# --- what is measured -------------------------------------------------------------------------------------------------


def forget_peak() -> None:
    """What was held while the classes were drawn is not the search's, nor may the search find it and not count it."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")


def measure(search: Search, case: Case, rounds: int) -> dict:
    x = case.queries()
    search(x[:1])  # libraries, their threads and buffers
    forget_peak()
    before, seconds = peak_bytes("cpu"), []
    for _ in range(rounds):
        started = time.perf_counter()
        found = search(x)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "bytes": peak_bytes("cpu") - before, "sum": found.double().sum().item()}


def on_ranks(case: Case, rank: int, ranks: int, store: str, rounds: int) -> dict:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = measure(ours(case, fl.ClassShard.split(case.classes)), case, rounds)
    gc.collect()  # gloo may abort a process whose modules outlive the group
    dist.barrier()
    dist.destroy_process_group()
    return found


def in_processes(name: str, case: Case, ranks: int, threads: int, rounds: int) -> dict:
    """Of the slowest rank each round's seconds, of all together the bytes."""
    with tempfile.TemporaryDirectory() as directory:
        setup = {"name": name, "ranks": ranks, "store": f"{directory}/store", "rounds": rounds}
        setup["threads"] = max(1, threads // ranks)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.speed.topk", "--of", json.dumps(setup | {"rank": rank} | asdict(case))],
                stdout=subprocess.PIPE, text=True,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{name}: a process failed")
    found = [json.loads(text) for text in said]
    return {
        "seconds": [max(of_round) for of_round in zip(*(one["seconds"] for one in found), strict=True)],
        "bytes": sum(one["bytes"] for one in found),
        "sum": found[0]["sum"],
    }


def one_process(setup: dict) -> dict:
    name, rank, ranks, store, rounds, threads = (
        setup.pop(key) for key in ("name", "rank", "ranks", "store", "rounds", "threads")
    )
    torch.set_num_threads(threads)
    case = Case(**setup)
    return on_ranks(case, rank, ranks, store, rounds) if ranks > 1 else measure(ALONE[name](case), case, rounds)


def report(case: Case, ranks: int, threads: int, rounds: int, turns: int) -> list[list[str]]:
    contenders = {name: (name, 1) for name in ALONE} | {f"{OURS}, {ranks} ranks": (OURS, ranks)}
    found: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, (of, on) in contenders.items():
            found[name].append(in_processes(of, case, on, threads, rounds))
    expected = found[OURS][0]["sum"]
    rows = []
    for name, runs in found.items():
        if any(abs(run["sum"] / expected - 1) > 1e-5 for run in runs):
            raise RuntimeError(f"{name} finds other logits than {OURS}")
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        rows.append([name, f"{1e3 * seconds:.0f}", f"{max(run['bytes'] for run in runs) / MIB:.0f}"])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Case()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, of all ranks together (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="searches of each process (default 5)")
    parser.add_argument("--turns", type=int, default=2, help="processes of each (default 2)")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.of:
        print(json.dumps(one_process(json.loads(options.of))))
        return

    from bench.evidence.tables import table  # the measured processes are spared its imports

    case = Case(options.classes, options.features, options.rows, options.k)
    fl.show_config()
    print(
        f"\nthe {case.k} nearest of {case.classes:,} classes, {case.features} features, {case.rows} queries, float32\n"
    )
    rows = report(case, options.ranks, options.threads, options.rounds, options.turns)
    print(table(["search", "ms", "peak beyond the vectors, MiB"], rows))


if __name__ == "__main__":
    main()
