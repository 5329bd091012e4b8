"""Machine code of kernels for NVIDIA GPUs, read with cuobjdump and nvdisasm."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Loop(NamedTuple):
    """One main loop: counts per iteration of a thread (a wave's lane), without code that is mostly skipped."""

    instructions: int
    exponentials: int
    bytes_read: int  # of global memory
    bytes_written: int
    narrowest: int  # bytes of the narrowest access of global memory, 0 where there is none
    bytes_staged: int = 0  # read from shared memory
    arithmetic: int = 0  # of the instructions: on the pipe of float32 multiply-adds
    half_rate: int = 0  # of the instructions: on the pipe of comparisons, selections and bits
    copied: bool = False  # what is read goes to shared memory, by asynchronous copies


class Machine(NamedTuple):
    """Resources and main loops of a compiled kernel."""

    registers: int
    stack: int  # bytes of local memory, spills among them
    shared: int  # bytes
    threads: int  # per program
    loops: tuple[Loop, ...]  # main loops: whole blocks of a row, without its remainder and without sets of classes


class Code(NamedTuple):
    """One kernel: instructions by address, and its jumps (from, to)."""

    instructions: list[tuple[int, str]]
    jumps: list[tuple[int, int]]


def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit, or of the copy in Triton's package.

    Raises:
        FileNotFoundError: neither exists.
    """
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    raise FileNotFoundError(f"{name} is neither on the PATH nor in Triton's package: pip install triton")


def run(name: str, *arguments: str, cwd: str | None = None) -> str:
    """The output of a tool."""
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True, cwd=cwd).stdout


def resources(cubin: str) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED and LOCAL of every kernel."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in run("cuobjdump", "-res-usage", cubin).splitlines():
        if function := re.match(r"\s*Function (\S+):", line):
            name = function[1]
        elif name and "REG:" in line:
            found[name] = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
    return found


def listings(cubin: str) -> dict[str, Code]:
    """The listing of every kernel, followed by the functions that only it calls."""
    found: dict[str, Code] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    targets: list[tuple[int, str]] = []
    code: list[tuple[int, str]] = []

    def close() -> None:
        jumps = [(at, labels[to]) for at, to in targets if to in labels]
        if code:
            found[name] = Code(list(code), jumps)
        for each in (labels, waiting, targets, code):
            each.clear()

    name = ""
    for line in run("nvdisasm", "-c", cubin).splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            close()
            name = section[1].strip('"')
        elif label := re.match(r"^(\.L_\S+):", line):
            waiting.append(label[1])
        elif instruction := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line):
            at = int(instruction[1], 16)
            labels |= dict.fromkeys(waiting, at)
            waiting.clear()
            code.append((at, instruction[2]))
            if branch := re.search(r"\bBRA\b.*?`\((\.L_\S+)\)", instruction[2]):
                targets.append((at, branch[1]))
    close()
    return found


def width(access: str) -> int:
    """Bytes of an access such as LDG.E.128."""
    found = re.search(r"\.[US]?(8|16|64|128)\b", access)
    return int(found[1]) // 8 if found else 4


# CUDA C++ Programming Guide, throughput of arithmetic instructions; what is in neither list needs a slot to be issued.
ARITHMETIC = {"FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2"}
HALF_RATE = {
    "FMNMX", "FMNMX3", "FSETP", "FSET", "FSEL", "SEL", "LOP3", "PLOP3", "PRMT", "ISETP", "IADD3", "IADD", "VIADD",
    "LEA", "SHF", "IMNMX", "VIMNMX", "IABS", "F2FP", "HMNMX2", "HSETP2", "VOTE", "MOV",
}  # fmt: skip


def opcode(text: str) -> str:
    """Of an instruction, without its predicate and its variants."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def loop_of(body: list[str]) -> Loop:
    """Counts of a loop's instructions. LDGSTS copies from global to shared memory."""
    counts = Counter[str]()
    widths = []
    for text in body:
        if found := re.search(r"\b(LDGSTS|LDG|STG|LDS)\.\S+", text):
            bytes_ = width(found[0])
            counts[found[1]] += bytes_
            if found[1] in ("LDGSTS", "LDG", "STG"):
                widths.append(bytes_)
        counts["EX2"] += "MUFU.EX2" in text
    return Loop(
        len(body),
        counts["EX2"],
        counts["LDG"] + counts["LDGSTS"],
        counts["STG"],
        min(widths, default=0),
        counts["LDS"],
        sum(opcode(text) in ARITHMETIC for text in body),
        sum(opcode(text) in HALF_RATE for text in body),
        counts["LDGSTS"] > 0,
    )
