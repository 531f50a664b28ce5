"""What a step must take on a GPU that is not at hand: ``python -m bench.speed.roofline``.

The time that its bytes need, or the time that its instructions need to be issued, whichever is longer, and what four
launches in a CUDA graph take. Bytes: the logits read twice and their gradient written once, at the share of the
datasheet's bandwidth that a copy reached on an H200. Instructions: those of the machine code for the GPU's
architecture, the loop over a row as often as a row has tiles and everything else once (an upper bound: rare branches
count), four warps per clock and multiprocessor. No latency, and nothing lost between programs.
"""

import argparse
import math
from dataclasses import dataclass

import torch
import triton

from bench.evidence.tables import table
from bench.speed import cases
from bench.speed.assembly import disassemble, nvidia_access, nvidia_loops
from bench.speed.machine_code import TARGETS, Launched, record

COPY = 4.219 / 4.8  # of the datasheet's bandwidth: bench/results/h200
LAUNCHES = 10e-6  # seconds: 256 x 1000, whose bytes take a tenth of a microsecond, in bench/results/h200-b60a669


@dataclass(frozen=True)
class GPU:
    target: str
    bandwidth: float  # bytes per second, NVIDIA's datasheets
    clock: float  # Hz; H200: under load by Nsight Compute, the others' by datasheet or taken to be the same

    def seconds(self, nbytes: float, warp_instructions: float) -> tuple[float, float]:
        """For the bytes, and for the instructions."""
        multiprocessors = TARGETS[self.target][1].multiprocessors
        return nbytes / (COPY * self.bandwidth), warp_instructions / (4 * multiprocessors * self.clock)


GPUS = {
    "A100 80 GB": GPU("sm_80", 2.04e12, 1.41e9),
    "H100": GPU("sm_90", 3.35e12, 1.96e9),
    "H200": GPU("sm_90", 4.8e12, 1.96e9),
    "B200": GPU("sm_100", 8.0e12, 1.96e9),
}
SHAPES = (cases.Shape(4096, 1000), cases.Shape(256, 21841), cases.Shape(512, 100003), cases.Shape(256, 1000000))
LOSSES = {"cross_entropy": "CE", "lr": "LR", "ss_lr": "SS-LR"}


def executed(launched: Launched, num_classes: int, target: str) -> float:
    """Instructions of warps of a launch that walks rows; of another, 0."""
    if "ROWS" not in launched.constexprs:
        return 0
    gpu, _ = TARGETS[target]
    options = {"num_warps": launched.warps, "enable_fp_fusion": True, **launched.options}
    compiled = triton.compile(launched.source(), target=gpu, options=options)
    (code,) = disassemble([compiled.asm["cubin"]], target)

    def vectors(loop: list[str]) -> tuple[int, int]:
        accesses = list(map(nvidia_access, loop))
        return accesses.count("load 16"), accesses.count("store 16")

    walk = max(nvidia_loops(code), key=vectors)  # reads most; in backward, not the one that only fills
    tiles = math.ceil(num_classes / (launched.constexprs["ROWS"] * launched.constexprs["LANES"]))
    rows, *parts = launched.grid
    parts = math.prod(parts)
    turns = math.ceil(tiles / parts) - 2  # the loop stands in the code once, and the last tile beside it
    return rows * parts * launched.warps * (len(code) + turns * len(walk))


def estimates(shape: cases.Shape, loss: str) -> list[str]:
    """A row of the table."""
    logits = shape.rows * shape.classes
    nbytes = 3 * shape.nbytes(torch.bfloat16)
    of_target: dict[str, float] = {}
    per_logit: list[str] = []
    for target in dict.fromkeys(gpu.target for gpu in GPUS.values()):
        launches = record(TARGETS[target][1], (shape.rows, shape.classes), torch.bfloat16, loss, "index", "mean")
        counts = [executed(launched, shape.classes, target) for launched in launches]
        of_target[target] = sum(counts)
        if target == GPUS["H200"].target:
            per_logit = [f"{32 * count / logits:.1f}" for count in counts if count]
    row = [f"{shape} bf16", LOSSES[loss], " + ".join(per_logit)]
    for gpu in GPUS.values():
        of_bytes, of_issue = gpu.seconds(nbytes, of_target[gpu.target])
        bound = "bytes" if of_bytes >= of_issue else "issue"
        row.append(f"{1e3 * (max(of_bytes, of_issue) + LAUNCHES):.3f} ({bound})")
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    header = ["case", "loss", "instructions per logit, sm_90", *(f"{name}, ms" for name in GPUS)]
    print(f"Triton {triton.__version__}\n")
    print(table(header, [estimates(shape, loss) for shape in SHAPES for loss in LOSSES]))


if __name__ == "__main__":
    main()
