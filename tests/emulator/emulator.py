"""Runs compiled PTX on the CPU and reports what a GPU would not forgive.

``Kernel(ptx, warps, shared)`` translates the PTX of one kernel for ``machine.cpp``, which ``Kernel.run`` then executes.
An instruction that the machine does not know is an error when the kernel is translated, never a guess.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SOURCES = [Path(__file__).with_name(name) for name in ("machine.cpp", "operations.h")]
_BUILT = Path(__file__).parents[2] / "out" / "emulator"
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")
_WORDS = 40  # of an instruction
_SHARED_BASE = 0x1000
GLOBAL, SHARED, SIGNED, READ_ONLY, TRANSPOSED = 1, 2, 4, 8, 16
UNDEFINED, FENCED = 1, 2  # states of a byte
_SPECIAL = {
    name: place
    for place, name in enumerate(
        ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x", "%laneid")
    )
}
FAULTS = (  # in the order of machine.cpp
    "out of bounds",
    "misaligned",
    "outside of the view",
    "race between warps",
    "race between programs",
    "race between lanes of a warp",
    "lanes ordered by a shuffle only",
    (HARMLESS := "unordered writes of the same value"),  # Triton's, where several threads hold a value
    "lanes of one store disagree",
    "undefined address",
    "undefined predicate of an access",
    "undefined branch",
    "barrier reached by a part of a warp",
    "warps meet at different barriers",
    "barrier after other warps have ended",
    "deadlock",
    "does not end",
    "shuffle of an inactive lane",
    "read-only load of what this launch wrote",
)


class UnknownInstruction(Exception):
    pass


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("granule", ctypes.c_uint64),
        ("state", ctypes.c_void_p),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("kind", "pc", "other_pc", "program", "thread", "other_program", "other_thread")
    ] + [("address", ctypes.c_uint64), ("count", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p),
        ("num_instructions", ctypes.c_int64),
        ("num_registers", ctypes.c_int64),
        ("constant_register", ctypes.c_void_p),
        ("constant_value", ctypes.c_void_p),
        ("num_constants", ctypes.c_int64),
        ("special", ctypes.c_int32 * 16),
        ("grid", ctypes.c_int64 * 3),
        ("num_warps", ctypes.c_int64),
        ("shared_size", ctypes.c_int64),
        ("buffers", ctypes.c_void_p),
        ("num_buffers", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("noise", ctypes.c_int64),
        ("limit", ctypes.c_int64),
        ("faults", ctypes.c_void_p),
        ("max_faults", ctypes.c_int64),
        ("num_faults", ctypes.c_int64),
        ("instructions", ctypes.c_uint64),
    ]


@functools.cache
def machine() -> tuple[ctypes.CDLL, dict[str, int]]:
    """The machine, built if there is none of this source for this processor, and the number of each operation by name.

    Several processes may build it at once: each puts a whole file in its place.
    """
    processor = Path("/proc/cpuinfo")
    flags = re.search(r"flags.*", processor.read_text())[0] if processor.exists() else platform.machine()
    parts = (*(source.read_text() for source in _SOURCES), *_FLAGS, flags)
    library = _BUILT / f"machine_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_BUILT) as folder:
            built = Path(folder) / library.name
            subprocess.run([compiler(), *_FLAGS, str(_SOURCES[0]), "-o", str(built)], check=True)
            built.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.names.restype = ctypes.c_char_p
    return loaded, {name: number for number, name in enumerate(loaded.names().decode().split())}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@dataclass
class Fault:
    kind: str
    kernel: str
    instruction: str
    other: str
    where: str
    count: int

    def __str__(self):
        beside = f"\n    against {self.other}" if self.other else ""
        return f"{self.kernel}: {self.kind}, {self.count} x: {self.where}\n    at {self.instruction}{beside}"


@dataclass
class Memory:
    """What a launch may touch: bytes from an address on, their states, and the size of the elements in it."""

    name: str
    base: int
    states: np.ndarray  # uint8, one per byte
    granule: int = 1


@dataclass
class Run:
    faults: list[Fault]
    instructions: int  # executed by warps


class Kernel:
    """The translation of one kernel. Registers, immediate numbers, parameters and special registers are all numbered
    registers of the machine."""

    def __init__(self, ptx: str, warps: int, shared: int):
        self.warps, self.shared = warps, shared
        self.name = re.search(r"\.entry\s+(\w+)", ptx)[1]
        self._registers: dict[str, int] = {}
        self._constants: dict[int, int] = {}  # register: value
        self.text: list[str] = []  # of each instruction, with its place in the source
        self._operations = machine()[1]
        self.params = re.findall(
            r"\.param\s+\.(\w+)[^,\n]*?\b(\w+_param_\d+)", ptx[: ptx.index("{", ptx.index(".entry"))]
        )
        self._param_values = {f"[{name}]": self._register(f"[{name}]") for _, name in self.params}
        self._translate(ptx)

    # --- translation ---

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def _constant(self, value: int) -> int:
        register = self._register(f"#{value & (2**64 - 1):x}")
        self._constants[register] = value & (2**64 - 1)
        return register

    def _operand(self, text: str) -> int:
        if text in _SPECIAL or re.fullmatch(r"%[a-z]+\d+", text):
            return self._register(text)
        if text == "_":
            return self._register("_")
        if text == "global_smem":
            return self._constant(_SHARED_BASE)
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            return self._constant(int(found[1] or found[2], 16))
        if found := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self._constant(int(found[2], 0) * (-1 if found[1] else 1))
        raise UnknownInstruction(f"operand {text}")

    def _translate(self, ptx: str) -> None:
        body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
        labels, pending, place, depth = {}, [], "", 0
        for raw in body.splitlines():
            line, _, comment = raw.partition("//")
            line = line.strip()
            if line.startswith(".loc"):
                place = comment.strip()
            elif line.startswith("}"):
                if depth == 0:
                    break
                depth -= 1
            elif line.startswith("{"):
                depth += 1
            elif found := re.match(r"([$\w]+):$", line):
                labels[found[1]] = len(pending)
            elif line.startswith(".reg"):
                if depth:
                    raise UnknownInstruction(f"registers of an inner scope: {line}")
            elif line.startswith((".pragma", ".section")) or not line:
                continue
            else:
                for statement in filter(None, map(str.strip, line.split(";"))):
                    pending.append((statement, place))
        code = np.zeros((len(pending) + 1, _WORDS), np.int32)
        for number, (statement, place) in enumerate(pending):
            self.text.append(f"{statement}   ({place})")
            try:
                self._instruction(code[number], statement, labels)
            except (KeyError, IndexError, ValueError, TypeError, UnknownInstruction) as error:
                raise UnknownInstruction(f"{self.name}: {statement}: {error}") from None
        code[len(pending), :2] = self._operations["ret"], -1
        self.text.append("end")
        self._code = code

    def _instruction(self, word: np.ndarray, statement: str, labels: dict[str, int]) -> None:
        guard, name, rest = re.match(r"(@!?%p\d+\s+)?([a-z][\w.:]*)\s*(.*)", statement).groups()
        word[1] = -1
        if guard:
            word[1:3] = self._register(guard.strip("@! \t")), "!" in guard
        operands = [text.strip() for text in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        operation, destinations, sources, extra, flags, target = self._parts(
            name.replace("::cta", ""), operands, labels
        )
        if operation not in self._operations:
            raise UnknownInstruction(operation)
        if len(destinations) > 8 or len(sources) > 16:
            raise UnknownInstruction("too many operands")
        word[0], word[3:8] = self._operations[operation], (target, len(destinations), len(sources), extra, flags)
        word[8 : 8 + len(destinations)] = destinations
        word[16 : 16 + len(sources)] = sources

    def _vector(self, text: str) -> list[int]:
        return [self._operand(part.strip()) for part in text.strip("{} ").split(",")]

    def _address(self, text: str) -> list[int]:
        base, *offset = (part.strip() for part in re.split(r"\+", text.strip("[] ")))
        return [self._operand(base), self._operand(offset[0] if offset else "0")]

    def _parts(self, name: str, operands: list[str], labels: dict[str, int]):
        """-> (operation, destinations, sources, bytes, flags, target)"""
        head, *modifiers = name.split(".")
        plain = name.replace(".", "_")
        if head == "bra":
            return "bra", [], [], 0, 0, labels[operands[0]]
        if head in ("ret", "exit"):
            return "ret", [], [], 0, 0, 0
        if head == "trap":
            return "trap", [], [], 0, 0, 0
        if head in ("membar", "fence", "nanosleep", "prefetch"):
            return "nothing", [], [], 0, 0, 0
        if head in ("bar", "barrier"):
            if "warp" in modifiers:
                return "bar_warp_sync", [], [self._operand(operands[0])], 0, 0, 0
            if "sync" not in modifiers or operands[0] != "0" or operands[1:] not in ([], [str(32 * self.warps)]):
                raise UnknownInstruction("a barrier of a part of the program")
            return "bar_sync", [], [], 0, 0, 0
        if head == "ld" and modifiers[0] == "param":
            kind = modifiers[-1]
            operation = f"param_{kind}" if kind[0] == "s" and kind != "s64" else f"mov_b{kind[1:]}"
            return (
                operation,
                [self._operand(operands[0].strip("{} "))],
                [self._param_values[operands[1].replace(" ", "")]],
                0,
                0,
                0,
            )
        if head in ("ld", "st"):
            space, kind = modifiers[0], modifiers[-1]
            if space not in ("global", "shared") or int(kind[1:]) % 8:
                raise UnknownInstruction(f"memory {space} {kind}")
            flags = (GLOBAL if space == "global" else SHARED) | (READ_ONLY if "nc" in modifiers else 0)
            address, values = (0, 1) if head == "st" else (1, 0)
            address, values = self._address(operands[address]), self._vector(operands[values])
            if head == "st":
                return "st", [], address + values, int(kind[1:]) // 8, flags, 0
            return "ld", values, address, int(kind[1:]) // 8, flags | (SIGNED if kind[0] == "s" else 0), 0
        if head in ("ldmatrix", "stmatrix"):
            if "m8n8" not in modifiers or "shared" not in modifiers or modifiers[-1] != "b16":
                raise UnknownInstruction(name)
            flags = SHARED | (TRANSPOSED if "trans" in modifiers else 0)
            if head == "ldmatrix":
                return head, self._vector(operands[0]), self._address(operands[1]), 2, flags, 0
            return head, [], self._address(operands[0]) + self._vector(operands[1]), 2, flags, 0
        if head == "mov":
            width = {"pred": 1}.get(modifiers[0]) or int(modifiers[0][1:]) // 8
            if operands[1].startswith("{"):
                parts = self._vector(operands[1])
                return f"pack_{len(parts)}", [self._operand(operands[0])], parts, width // len(parts), 0, 0
            if operands[0].startswith("{"):
                parts = self._vector(operands[0])
                return f"unpack_{len(parts)}", parts, [self._operand(operands[1])], width // len(parts), 0, 0
            operation = "mov_pred" if modifiers[0] == "pred" else f"mov_b{width * 8}"
            return operation, [self._operand(operands[0])], [self._operand(operands[1])], 0, 0, 0
        if head == "shfl":
            return f"shfl_{modifiers[1]}", *self._split(operands, 1), 0, 0, 0
        if head == "vote":
            return f"vote_{modifiers[1]}", *self._split(operands, 1), 0, 0, 0
        if head == "redux":
            operation = "_".join(("redux", *modifiers[1:]))
            if modifiers[1] in ("add", "and", "or", "xor"):
                operation = f"redux_{modifiers[1]}"
            return operation, *self._split(operands, 1), 0, 0, 0
        if head in ("min", "max") and len(operands) == 4:
            plain += "_3"
        return plain, *self._split(operands, 1), 0, 0, 0

    def _split(self, operands: list[str], count: int) -> tuple[list[int], list[int]]:
        destinations = [self._operand(part.strip()) for part in operands[0].split("|")]
        return destinations, [self._operand(text) for text in operands[count:]]

    # --- execution ---

    def run(
        self,
        grid: tuple[int, int, int],
        params: list[int | float],
        memories: list[Memory],
        seed: int = 0,
        noise: int = 0,
        limit: int = 10**9,
    ) -> Run:
        library, _ = machine()
        constants = dict(self._constants)
        for (kind, name), value in zip(self.params, params, strict=True):
            bits = struct.unpack("<I", struct.pack("<f", value))[0] if kind == "f32" else int(value) & (2**64 - 1)
            constants[self._param_values[f"[{name}]"]] = bits
        registers = np.fromiter(constants.keys(), np.int32, len(constants))
        values = np.fromiter(constants.values(), np.uint64, len(constants))
        memories = sorted(memories, key=lambda memory: memory.base)
        buffers = (_Buffer * max(1, len(memories)))(
            *((m.base, m.states.size, m.granule, m.states.ctypes.data) for m in memories)
        )
        faults = (_Fault * 64)()
        special = (ctypes.c_int32 * 16)(*[-1] * 16)
        for name, place in _SPECIAL.items():
            special[place] = self._registers.get(name, -1)
        launch = _Launch(
            self._code.ctypes.data,
            len(self._code),
            len(self._registers),
            registers.ctypes.data,
            values.ctypes.data,
            len(constants),
            special,
            (ctypes.c_int64 * 3)(*grid),
            self.warps,
            self.shared,
            ctypes.addressof(buffers),
            len(memories),
            seed,
            noise,
            limit,
            ctypes.addressof(faults),
            len(faults),
            0,
            0,
        )
        library.run_launch(ctypes.byref(launch))
        found = [self._fault(fault, grid, memories) for fault in faults[: launch.num_faults]]
        return Run([fault for fault in found if fault.kind != HARMLESS], launch.instructions)

    def _fault(self, fault: _Fault, grid: tuple[int, int, int], memories: list[Memory]) -> Fault:
        kind = FAULTS[fault.kind]
        place = lambda program: (program % grid[0], program // grid[0] % grid[1])  # noqa: E731
        where = f"program {place(fault.program)} thread {fault.thread}"
        if fault.other_thread >= 0:
            where += f", and program {place(fault.other_program)} thread {fault.other_thread}"
        if fault.address:
            where += f", {describe(fault.address, memories)}"
        other = self.text[fault.other_pc] if fault.other_pc >= 0 else ""
        return Fault(kind, self.name, self.text[fault.pc], other, where, fault.count)


def describe(address: int, memories: list[Memory]) -> str:
    if address < 2**32:
        return f"shared byte {address - _SHARED_BASE}"
    nearest = min(
        memories, key=lambda m: max(m.base - address, address - (m.base + m.states.size) + 1, 0), default=None
    )
    return f"byte {address - nearest.base} of the {nearest.states.size} of {nearest.name}" if nearest else hex(address)
