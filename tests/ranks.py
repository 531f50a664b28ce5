"""Processes that stand for the ranks of torch.distributed, on gloo: started once, given one function after another."""

import datetime
import multiprocessing
import traceback
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

MOST = 4
TIMEOUT = datetime.timedelta(minutes=5)  # of a machine that may be busy


def refusal(function, *args, **kwargs) -> str:
    """What it raises, as text: that every rank raises is a result here."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _serve(rank: int, store: str, jobs: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=MOST, timeout=TIMEOUT)
    groups = {size: dist.new_group(range(size), timeout=TIMEOUT) for size in range(1, MOST + 1)}
    while (job := jobs.recv()) is not None:
        size, function, args = job
        try:
            jobs.send((function(groups[size], *args), None))
        except Exception:
            jobs.send((None, traceback.format_exc()))


class Ranks:
    """Four processes; the first n of them are the group of size n."""

    def __init__(self, directory):
        # forked from one process that has imported torch, and what its optimisers import: that takes seconds
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
        pipes = [context.Pipe() for _ in range(MOST)]
        self.jobs = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, str(directory / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, size: int, function, *args) -> list:
        """function(group, *args) on each of the first ranks, at the same time: what they return, in their order."""
        for jobs in self.jobs[:size]:
            jobs.send((size, function, args))
        answers = []
        for rank, jobs in enumerate(self.jobs[:size]):
            assert jobs.poll(2 * TIMEOUT.total_seconds()), f"rank {rank} of {size} has not answered"
            answers.append(jobs.recv())
        errors = [f"rank {rank} of {size}: {error}" for rank, (_, error) in enumerate(answers) if error is not None]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for result, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
