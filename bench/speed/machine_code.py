"""What the GPU kernels compile to, on a machine without a GPU: ``python -m bench.speed.machine_code``.

The doors are called with a recorder in the place of the launch, so every kernel is compiled with exactly the tile,
warps and arguments that the launcher gives it; Triton's own ptxas and disassembler do the rest. The table counts, for
every loop that walks a row, the instructions per logit and thread, and the widths of its loads and stores. With
``--gates`` the run fails where a loop spills, an access of a loop is narrower than 16 bytes, a row base is computed in
32 bits, or cross-entropy is above its budget.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.speed.assembly import (
    amd_access,
    amd_code,
    amd_loops,
    disassemble,
    nvidia_access,
    nvidia_loops,
    registers,
)
from fused_losses.gpu import device, doors
from fused_losses.losses import LossSpec

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), device.Device(108, 32, nvidia=True)),
    "sm_90": (GPUTarget("cuda", 90, 32), device.Device(132, 32, nvidia=True)),
    "sm_100": (GPUTarget("cuda", 100, 32), device.Device(148, 32, nvidia=True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), device.Device(304, 64, nvidia=False)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BUDGET = {
    ("forward_kernel", "cross_entropy"): 10.0, ("backward_kernel", "cross_entropy"): 12.0,
    ("forward_kernel", "cross_entropy, labels smoothed"): 11.5, ("forward_kernel", "lr"): 11.0,
    ("backward_kernel", "cross_entropy, labels smoothed"): 13.5, ("forward_kernel", "ss_lr"): 24.5,
    ("at_once_kernel", "cross_entropy"): 10.0, ("at_once_kernel", "lr"): 11.0,
}  # fmt: skip
BUDGET_OF_16_BITS = {("backward_kernel", "ss_lr"): 22.5, ("at_once_kernel", "ss_lr"): 24.5}
LABELS = {
    "label": (1, 0.0),
    "label smoothed": (1, 0.1),
    "labels": (3, 0.0),
    "labels smoothed": (3, 0.1),
}  # P, smoothing
TARGET_KINDS = ("index", "multi_hot", *LABELS)
LOSSES = {  # family, hyper-parameters, weight of the mean over the negatives
    "cross_entropy": ("softmax", [], None),
    "nllr": ("softmax", [], None),
    "crl": ("softmax", [1.5, 1.0], None),
    "lr": ("logistic", [], None),
    "ss_lr": ("logistic", [2.0], 1.0),
    "ss_lr, gamma 1.5": ("logistic", [1.5], 1.0),
}
# Rows, classes, k, compact: registers; the row read again; blocks of 8, 16 and 32; a row split over programs. Few and
# many rows have programs of their own.
HARDEST = (
    (4096, 751, 75, False), (4096, 2048, 20, True), (256, 21841, 2184, False), (4096, 21841, 2184, False),
    (256, 21841, 218, True), (4096, 21841, 218, True), (512, 100003, 1000, True), (512, 100003, 100, False),
    (8, 1000003, 1000, True),
)  # fmt: skip
READ_BUDGET = 3.8  # of block maxima, 16-bit logits
_TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8",
}  # fmt: skip
_BATCH = 24  # kernels per call of the disassembler


@dataclass(frozen=True)
class Launched:
    """One kernel as the launcher asked for it."""

    kernel: object
    warps: int
    arguments: tuple
    constexprs: dict
    options: dict  # of the compiler
    grid: tuple[int, ...]

    def source(self) -> ASTSource:
        """What Triton's JIT would compile for these arguments."""
        names = self.kernel.arg_names
        signature = dict.fromkeys(self.constexprs, "constexpr")
        attributes, constexprs = {}, dict(self.constexprs)
        for place, (name, value) in enumerate(zip(names, self.arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + _TRITON_TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value is None:
                signature[name], constexprs[name] = "constexpr", None
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        return ASTSource(self.kernel, {name: signature[name] for name in names}, constexprs, attributes)

    def key(self) -> str:
        return f"{self.warps} {self.options} {self.source().hash()}"


@dataclass
class Loop:
    instructions: int
    per_logit: float
    spills: int
    accesses: dict[str, int]  # "load 16": how many instructions that read 16 bytes of global memory


@dataclass
class Report:
    kernel: str
    losses: list[str]  # that share it; with their targets and selection, in words
    dtype: str
    target: str
    classes: list[int]
    warps: int
    registers: int
    spills: int
    shared: int
    loops: list[Loop] = field(default_factory=list)
    narrow_rows: bool = False  # a row base in 32 bits
    hardest: bool = False
    listed: int = 16  # bytes of a list that a thread takes at a time

    @property
    def loss(self) -> str:
        return "; ".join(self.losses)

    def failures(self) -> list[str]:
        where = f"{self.kernel} [{self.loss}] {self.dtype} {self.target}"
        found = [f"{where}: a row base in 32 bits"] if self.narrow_rows else []
        if not self.loops and self.kernel not in ("merge_kernel", "finish_kernel"):
            found.append(f"{where}: no loop over the row was found")
        if self.target == "gfx942":
            return found
        for loop in self.loops:
            if loop.spills:
                found.append(f"{where}: {loop.spills} LDL/STL inside a loop")
        return found + (self._failures_of_lists(where) if self.hardest else self._failures_of_walks(where))

    def _failures_of_walks(self, where: str) -> list[str]:
        found = []
        wide = [loop for loop in self.loops if any(access.endswith(" 16") for access in loop.accesses)]
        for loop in wide if "label" in self.loss and wide else self.loops:  # the others are over labels
            narrow = [access for access in loop.accesses if not access.endswith(" 16")]
            if "multi_hot" in self.loss:  # multi-hot targets have narrower elements than the logits
                narrow = [access for access in narrow if access.startswith("store")]
            if narrow or not any(access.endswith(" 16") for access in loop.accesses):
                found.append(f"{where}: a loop with {', '.join(loop.accesses)} bytes")
            budgets = BUDGET if self.dtype == "fp32" else BUDGET | BUDGET_OF_16_BITS
            budget = min(budgets.get((self.kernel, loss), float("inf")) for loss in self.losses)
            if self.target == "sm_90" and loop.per_logit > budget:
                found.append(f"{where}: {loop.per_logit:.2f} loop instructions per logit, budget {budget}")
        return found

    def _failures_of_lists(self, where: str) -> list[str]:
        """A pick's own place in a row, in the gradient and in the list of picks is anywhere, and a thread takes as
        little of a list as there is for it: only those accesses may be narrow."""
        reading = [loop for loop in self.loops if any(access.startswith("load") for access in loop.accesses)]
        narrow = [loop for loop in reading if not {"load 16", f"load {self.listed}"} & loop.accesses.keys()]
        if "multi_hot" in self.loss or "label" in self.loss:  # labels are read one by one in between
            narrow = []
        elif self.kernel in ("scatter_kernel", "row_kernel"):
            narrow = narrow[1:]
        found = [f"{where}: a loop with {', '.join(loop.accesses)} bytes" for loop in narrow]
        # Block maxima come from several vectors at a time, lists from one.
        writing = [loop for loop in reading if any(access.startswith("store") for access in loop.accesses)]
        maxima = [loop for loop in writing if loop.accesses.get("load 16", 0) > 1]
        if self.kernel == "maxima_kernel" and not maxima:
            found.append(f"{where}: no loop over the row was found")
        if self.kernel in ("blocks_kernel", "maxima_kernel") and self.target == "sm_90" and self.dtype != "fp32":
            found += [
                f"{where}: block maxima take {loop.per_logit:.2f} instructions per logit, budget {READ_BUDGET}"
                for loop in maxima
                if loop.per_logit > READ_BUDGET
            ]
        return found


# --- what the launcher asks for ---------------------------------------------------------------------------------------


def record(
    on: device.Device, shape: tuple[int, int], dtype: torch.dtype, loss: str, target: str, reduction: str, k: int = 0,
    compact: bool = False,
) -> list[Launched]:  # fmt: skip
    """The launches of one step, forward and backward, without a GPU and without running them."""
    _, params, alpha = LOSSES[loss]
    launches: list[Launched] = []

    def recorder(kernel, grid, *arguments):
        function, constants = kernel.function, kernel.constants
        constexprs = {name: value for name, value in constants.items() if name in function.arg_names}
        options = {name: value for name, value in constants.items() if name not in function.arg_names}
        arguments = tuple(x.new_empty(0) if isinstance(x, torch.Tensor) else x for x in arguments)  # not gigabytes
        launches.append(Launched(function, kernel.warps, arguments, constexprs, options, grid))

    logits = torch.empty(shape, dtype=dtype)
    num_labels, smoothing = LABELS.get(target, (0, 0.0))
    if target == "index":
        y = torch.zeros(shape[0], dtype=torch.int64)
    elif num_labels:
        y = torch.zeros((shape[0], num_labels), dtype=torch.int64)
    else:
        y = torch.zeros(shape, dtype=torch.bool)
    ignored = -1 if num_labels else -100
    spec = LossSpec(
        loss.split(",")[0], params, alpha, k, ignored, 0, shape[1], compact, num_labels > 0, smoothing
    )  # fmt: skip
    honest = device.profile, device.launch
    device.profile, device.launch = lambda _: on, recorder
    try:
        if num_labels:
            kept = doors.statistics(logits, y, *spec)
            value, coefficients = kept[0].new_empty(shape[0]), kept[0].new_empty((shape[0], 2 + num_labels))
        else:
            value, coefficients, *kept = doors.forward(logits, y, None, reduction, *spec)
        given = None if compact and target != "multi_hot" else logits
        doors.backward(torch.empty_like(value), coefficients, given, y, *kept, shape[1], *spec)
        if target == "index" and k == 0 and reduction == "none":
            doors.at_once_(torch.empty_like(value), logits, y, None, *spec)
    finally:
        device.profile, device.launch = honest
    return launches


def kernels(target: str, dtypes: list[str], losses: list[str], kinds: Sequence[str] = TARGET_KINDS):
    """Every distinct kernel of a target: (kernel, the losses and the class counts that share it, dtype)."""
    _, on = TARGETS[target]
    shapes = [(4096, 1000), (4096, 751), (4096, 32768), (4096, 21841), (8, 262144), (8, 262143)]
    steps = [(*shape, 0, False) for shape in shapes] + list(HARDEST)
    for dtype in dtypes:
        found: dict[str, tuple[Launched, list[str], list[int]]] = {}
        for loss, (rows, classes, k, compact), kind, reduction in itertools.product(
            losses, steps, kinds, ("none", "mean")
        ):
            if kind == "multi_hot" and LOSSES[loss][0] == "softmax":
                continue
            if (kind in LABELS and reduction == "mean") or ("smoothed" in kind and LOSSES[loss][2] is not None):
                continue
            name = loss + ("" if kind == "index" else f", {kind}") + (", hardest" if k else "")
            for launched in record(on, (rows, classes), DTYPES[dtype], loss, kind, reduction, k, compact):
                _, names, counts = found.setdefault(launched.key(), (launched, [], []))
                if name not in names:
                    names.append(name)
                if classes not in counts:
                    counts.append(classes)
        for launched, names, counts in found.values():
            yield launched, names, dtype, counts


# --- what comes out ---------------------------------------------------------------------------------------------------


def _narrow_rows(ttir: str, launched: Launched) -> bool:
    """Whether any (rows, classes) argument is addressed by a 32-bit offset from its first byte."""
    signature = re.search(r"tt\.func public @\w+\((.*?)\)\s*attributes", ttir, re.S)[1]
    names = re.findall(r"(%\w+): ", signature)
    matrices = [place for place, name in enumerate(launched.kernel.arg_names) if name in ("logits_ptr", "dlogits_ptr")]
    return any(re.search(rf"tt\.addptr {re.escape(names[place])}, .*: !tt\.ptr<\w+>, i32", ttir) for place in matrices)


@dataclass
class Compiled:
    """What a compiler process hands back."""

    report: Report
    lanes: int  # logits per trip of a loop over tiles and thread, 0 where the kernel walks no row
    code: bytes | str  # cubin, or AMD's assembly


def compile_kernel(launched: Launched, losses: list[str], dtype: str, target: str, classes: list[int]) -> Compiled:
    gpu, _ = TARGETS[target]
    options = {"num_warps": launched.warps, "enable_fp_fusion": True, **launched.options}
    compiled = triton.compile(launched.source(), target=gpu, options=options)
    hardest = all(loss.endswith("hardest") for loss in losses)
    report = Report(
        launched.kernel.__name__, losses, dtype, target, sorted(classes), launched.warps, 0, 0,
        compiled.metadata.shared, narrow_rows=_narrow_rows(compiled.asm["ttir"], launched), hardest=hardest,
    )  # fmt: skip
    if "LISTED" in launched.constexprs:
        report.listed = launched.constexprs["LISTED"] * DTYPES[dtype].itemsize
    lanes = 0  # the merge of parts walks no row
    if "ROWS" in launched.constexprs:
        lanes = launched.constexprs["ROWS"] * launched.constexprs["LANES"] // (launched.warps * gpu.warp_size)
    if gpu.backend == "cuda":
        report.registers = registers(compiled.asm["cubin"])
        return Compiled(report, lanes, compiled.asm["cubin"])
    return Compiled(report, lanes, compiled.asm["amdgcn"])


def reports_of(batch: list[Compiled]) -> list[Report]:
    """Of kernels of one target."""
    target = batch[0].report.target
    nvidia = TARGETS[target][0].backend == "cuda"
    codes = disassemble([compiled.code for compiled in batch], target) if nvidia else [None] * len(batch)
    for compiled, code in zip(batch, codes, strict=True):
        report = compiled.report
        if nvidia:
            loops, access = nvidia_loops(code), nvidia_access
            report.spills = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code)
        else:
            usage, code, labels = amd_code(compiled.code)
            loops, access = amd_loops(code, labels), amd_access
            report.registers, report.spills = usage["vgpr_count"], usage["vgpr_spill_count"]
        for loop in loops if compiled.lanes else ():
            accesses = Counter(filter(None, map(access, loop)))
            if not accesses:  # not over logits
                continue
            logits = compiled.lanes
            if report.hardest:  # tiles of several sizes, unrolled or not: what the loop's vectors hold
                vectors = accesses["load 16"] or accesses["store 16"] or 1
                logits = vectors * 16 / DTYPES[report.dtype].itemsize
            inner_spills = sum(bool(re.search(r"\b(LDL|STL)\b|\bscratch_", text)) for text in loop)
            report.loops.append(Loop(len(loop), len(loop) / logits, inner_spills, dict(accesses)))
    return [compiled.report for compiled in batch]


_work: list[tuple] = []  # arguments of compile_kernel: forked processes inherit what cannot be pickled


def _compile_number(number: int) -> Compiled:
    return compile_kernel(*_work[number])


def compile_all(targets: list[str], dtypes: list[str], losses: list[str], kinds: list[str], processes: int):
    """Reports, in order, as batches of them are done."""
    _work[:] = [
        (launched, names, dtype, target, classes)
        for target in targets
        for launched, names, dtype, classes in kernels(target, dtypes, losses, kinds)
    ]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        batch: list[Compiled] = []
        for compiled in pool.imap(_compile_number, range(len(_work))):
            if batch and (compiled.report.target != batch[0].report.target or len(batch) == _BATCH):
                yield from reports_of(batch)
                batch = []
            batch.append(compiled)
        yield from reports_of(batch)


def row_of_table(report: Report) -> str:
    loops = "; ".join(
        f"{loop.per_logit:.1f} ({', '.join(f'{n} x {name}' for name, n in sorted(loop.accesses.items()))})"
        for loop in report.loops
    )
    cells = (
        report.kernel, report.loss, report.dtype, report.target, f"{min(report.classes)}-{max(report.classes)}",
        report.warps, report.registers, report.spills, report.shared, loops or "-",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--kinds", nargs="+", default=list(TARGET_KINDS), choices=TARGET_KINDS, help="of targets")
    parser.add_argument("--gates", action="store_true", help="exit with 1 where a gate does not hold")
    parser.add_argument("--json", type=Path, help="write every report to this file")
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=processors, help="compilers at a time (default: processors)")
    options = parser.parse_args(arguments)

    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    print(f"Triton {triton.__version__}\n")
    print("| kernel | loss | dtype | target | classes | warps | registers | spills | shared | loops: instr./logit |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    reports = []
    for report in compile_all(options.targets, options.dtypes, options.losses, options.kinds, options.processes):
        reports.append(report)
        print(row_of_table(report), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"triton": triton.__version__, "reports": [asdict(r) for r in reports]}, indent=1)
        )
    failures = [failure for report in reports for failure in report.failures()]
    print(f"\n{len(reports)} kernels, {len(failures)} gates broken", *failures, sep="\n")
    return int(bool(failures) and options.gates)


if __name__ == "__main__":
    sys.exit(main())
