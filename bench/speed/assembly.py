"""Machine code as loops of instructions: what Triton's own disassembler and LLVM's listings say of a kernel."""

import itertools
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(re.search(r"REG:(\d+)", usage)[1])


def _text(cubin: bytes) -> bytes:
    """The machine code of the only kernel in an ELF file."""
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + place * size) for place in range(number)]
    found = []
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        if cubin[start : cubin.index(b"\0", start)].startswith(b".text."):
            found.append(cubin[offset : offset + length])
    assert len(found) == 1, f"{len(found)} kernels"
    return found[0]


def disassemble(cubins: list[bytes], target: str) -> list[list[tuple[int, str]]]:
    """(address, instruction) of the machine code of each kernel.

    All at once, one behind the other: the disassembler takes half a second to start and no time for a kernel.
    """
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        command = [_TOOLS / "nvdisasm", "-ndf", "-b", target.replace("_", "").upper(), file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = ((int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", listing))
    ends = list(itertools.accumulate(map(len, texts)))
    kernels: list[list[tuple[int, str]]] = [[] for _ in texts]
    place = 0
    for address, text in code:
        place += address >= ends[place]
        kernels[place].append((address, text))
    return kernels


def _innermost(spans: list[tuple[int, int]], code: list[tuple[int, str]]) -> list[list[str]]:
    """Instructions of the loops, (first address, last), that hold no other."""
    holds = lambda outer, inner: outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]  # noqa: E731
    spans = [span for span in spans if not any(holds(span, other) for other in spans)]
    return [[text for at, text in code if first <= at <= last] for first, last in spans]


def nvidia_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    places = {address: place for place, (address, _) in enumerate(code)}
    targets = {}  # of branches, by place
    for place, (_, text) in enumerate(code):
        branch = re.search(r"\bBRA(?:\.\S+)?\s.*?0x([0-9a-f]+)", text)
        if branch:
            targets[place] = places[int(branch[1], 16)]

    def returns(first: int, last: int) -> bool:
        """Whether the branch is reached from its own target: cold code behind the end branches back, too, only once."""
        reached, ahead = set(), [first]
        while ahead:
            place = ahead.pop()
            if place in reached or not first <= place <= last:
                continue
            if place == last:
                return True
            reached.add(place)
            text = code[place][1]
            if place in targets:
                ahead.append(targets[place])
            if not re.match(r"(BRA\S*\s+0x|EXIT|RET)", text):  # else under a condition, or no branch
                ahead.append(place + 1)
        return False

    backward = [(first, last) for last, first in targets.items() if first < last]
    spans = [(code[first][0], code[last][0]) for first, last in backward if returns(first, last)]
    return _innermost(spans, code)


def nvidia_access(text: str) -> str | None:
    """'load 16' for LDG.E.128."""
    found = re.search(r"\b(LDG|STG)\.(\S+)", text)
    if not found:
        return None
    modifiers = found[2].split(".")
    width = next((int(m) // 8 for m in modifiers if m in ("64", "128", "256")), 4)
    width = next(
        (1 for m in modifiers if m in ("U8", "S8")), next((2 for m in modifiers if m in ("U16", "S16")), width)
    )
    return f"{'load' if found[1] == 'LDG' else 'store'} {width}"


def amd_code(text: str) -> tuple[dict[str, int], list[tuple[int, str]], dict[str, int]]:
    usage = {
        name: int(n)
        for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count|group_segment_fixed_size):\s*(\d+)", text)
    }
    code, labels = [], {}
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if code and line.startswith(".section"):
            break
        if re.match(r"^\.?LBB\d+_\d+:", line):
            labels[line.rstrip(":")] = len(code)
        elif re.match(r"^[a-z]+_\w+", line):
            code.append((len(code), line))
    return usage, code, labels


def amd_loops(code: list[tuple[int, str]], labels: dict[str, int]) -> list[list[str]]:
    spans = []
    for address, text in code:
        branch = re.match(r"s_c?branch\w*\s+(\.?LBB\d+_\d+)", text)
        if branch and labels[branch[1]] <= address:
            spans.append((labels[branch[1]], address))
    return _innermost(spans, code)


def amd_access(text: str) -> str | None:
    found = re.match(r"(global|buffer|flat)_(load|store)_(\w+)", text)
    if not found:
        return None
    width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}.get(found[3].split()[0])
    return f"{found[2]} {width or (2 if '16' in found[3] or 'short' in found[3] else 1)}"
