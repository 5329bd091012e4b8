"""The machine code of the CUDA kernels: nvcc's main loops, read from the module that was built."""

from __future__ import annotations

import functools
import heapq
import itertools
import tempfile
from pathlib import Path
from typing import NamedTuple

import cudfast._cuda as _cuda

from ...inspect.machine import Code, Loop, Machine, listings, loop_of, resources, run

DTYPES = {"fp32": 0, "bf16": 2, "fp16": 3}  # csrc/launch.h
HEADER: int = _cuda.HEADER  # bytes of shared memory besides staged rows
THREADS = 512


class Variant(NamedTuple):
    """A row kernel."""

    name: str
    symbol: str  # of its C++ type; {} is the dtype
    exponentials: int  # of the method per element, forward and backward
    arrays: int  # of logits
    staged: bool
    columns: int = 0  # of a thread's iteration; 0: as many as 16 bytes hold


VARIANTS = tuple(
    Variant(f"CUDA {loss}, {how}", f"{symbol}ELb{int(staged)}E", exponentials, arrays, staged)
    for loss, symbol, exponentials, arrays in (
        ("student", "7StudentILi2ELi{}EfE", 4, 2),
        ("student, any temperature", "7StudentILi0ELi{}EfE", 6, 2),
        ("teacher", "7TeacherILi{}EfE", 2, 1),
    )
    for how, staged in (("staged", True), ("two sweeps", False))
)
# Bounds on masses. The dtype is known when they run: of the ways through their loops, the shortest is read.
PROJECTED = tuple(
    Variant(f"CUDA projected, {how}", f"15ProjectedKernelIfLb{int(staged)}E", 7, 2, staged, 8)
    for how, staged in (("staged", True), ("two sweeps", False))
)


def targets() -> tuple[str, ...]:
    """Architectures for which the module contains code."""
    return tuple(f"sm_{arch}" for arch in _cuda.ARCHITECTURES.split())


class _Kernel(NamedTuple):
    usage: dict[str, int]
    code: Code


@functools.cache
def _kernels(target: str) -> dict[str, _Kernel]:
    found: dict[str, _Kernel] = {}
    assert _cuda.__file__ is not None
    with tempfile.TemporaryDirectory() as folder:
        run("cuobjdump", "-xelf", "all", "-arch", target, str(Path(_cuda.__file__).resolve()), cwd=folder)
        for cubin in sorted(Path(folder).glob(f"*.{target}.cubin")):
            usage, code = resources(str(cubin)), listings(str(cubin))
            found |= {name: _Kernel(usage[name], code[name]) for name in code if name in usage}
    return found


def _paths(code: Code) -> list[list[str]]:
    """The shortest path with a 16-byte read through each innermost loop that has such reads.

    This is the path of a chunk of whole lines that raises no maximum and contains no -inf, including a copy and a write
    if there are any.
    """
    texts = dict(code.instructions)
    addresses = [at for at, _ in code.instructions]
    after = dict(itertools.pairwise(addresses))
    jump = dict(code.jumps)

    def next_of(at: int) -> list[int]:
        text = texts[at]
        always = not text.startswith("@")
        ends = always and ("EXIT" in text or "RET" in text or (at in jump and ".DIV" not in text))
        steps = [jump[at]] if at in jump and ".DIV" not in text else []
        return steps + ([after[at]] if at in after and not ends else [])

    def walk(start: int, goal: int) -> list[int] | None:
        queue: list[tuple[int, int, tuple[int, ...]]] = [(0, start, (start,))]
        seen: set[int] = set()
        while queue:
            length, at, path = heapq.heappop(queue)
            if at == goal:
                return list(path)
            if at in seen:
                continue
            seen.add(at)
            for step in next_of(at):
                heapq.heappush(queue, (length + 1, step, (*path, step)))
        return None

    def reads(text: str) -> bool:
        return "128" in text and ("LDG.E" in text or "LDS." in text)

    found = []
    spans = sorted(((to, at) for at, to in code.jumps if to <= at), key=lambda span: span[1] - span[0])
    kept: list[tuple[int, int]] = []
    for low, high in spans:
        if any(low <= a and b <= high for a, b in kept):
            continue
        wide = [at for at in addresses if low <= at <= high and reads(texts[at])]
        if not wide:
            continue
        kept.append((low, high))
        copies = [at for at in addresses if low <= at <= high and "LDGSTS" in texts[at]]
        writes = [at for at in addresses if low <= at <= high and "STG.E" in texts[at] and "128" in texts[at]]
        stops = [low, *copies[:1], wide[0], *writes[:1], high]
        legs = [walk(a, b) for a, b in itertools.pairwise(stops)]
        if all(legs):
            found.append((low, [texts[low], *(texts[at] for leg in legs for at in (leg or [])[1:])]))
    return [body for _, body in sorted(found, key=lambda each: each[0])]


def kernels_of(symbol: str, target: str) -> list[tuple[dict[str, int], tuple[Loop, ...]]]:
    """Registers, stack, memory and main loops of the kernels whose C++ types have this symbol."""
    found = (kernel for name, kernel in _kernels(target).items() if symbol in name)
    return [(kernel.usage, tuple(loop_of(body) for body in _paths(kernel.code))) for kernel in found]


def machine(variant: Variant, dtype: str, target: str) -> Machine:
    """The machine code of a kernel in the module. Its main loops are the sums and the gradient; in a projected kernel,
    those that have exponentials and read or write memory. Of its two loops of sums, one is for the student's entropy,
    which few losses need: the other is shorter.
    """
    ((usage, loops),) = kernels_of(variant.symbol.format(DTYPES[dtype]), target)
    if variant.columns:
        sums = [loop for loop in loops if loop.exponentials and loop.bytes_read and not loop.bytes_written]
        maps = [loop for loop in loops if loop.exponentials and loop.bytes_written]
        loops = (min(sums, key=lambda loop: loop.instructions), *maps)
    return Machine(usage["REG"], usage["STACK"] + usage["LOCAL"], HEADER, THREADS, loops)
