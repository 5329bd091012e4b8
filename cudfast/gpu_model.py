"""`python -m cudfast gpu-model`: what the Triton kernels should take on GPUs that need not be there. A model.

The kernels are compiled for the device; bytes, instructions and exponentials per element come from the machine code of
their main loops. A kernel takes at least the longest of three times: its bytes over the memory's bandwidth, its
instructions over the rate of float32 instructions, its exponentials over that of the special function units. Launches,
latencies and the caches' own bandwidth are left out. The second look at a row is free while the rows in flight fit in
L2.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from .backends.triton.compiled import DTYPES, TARGETS, VARIANTS, Machine, Variant, machine


class GPU(NamedTuple):
    """Rates of one GPU, from its vendor's data sheet or architecture white paper."""

    target: str  # what it is compiled for
    bandwidth: float  # bytes/s
    instructions: float  # float32 instructions of a thread/s: half of the FLOP/s of fused multiply-adds
    exponentials: float  # /s
    processors: int
    cache: float  # bytes of L2; of MI300X the Infinity Cache
    registers: int  # of a processor
    threads: int  # that a processor holds at most
    source: str


GPUS = {
    "A100": GPU("sm_80", 2.039e12, 19.5e12 / 2, 19.5e12 / 8, 108, 40e6, 65536, 2048, "NVIDIA A100 80GB SXM data sheet"),
    "H100": GPU("sm_90", 3.35e12, 67e12 / 2, 67e12 / 16, 132, 50e6, 65536, 2048, "NVIDIA H100 SXM data sheet"),
    "H200": GPU("sm_90", 4.8e12, 67e12 / 2, 67e12 / 16, 132, 50e6, 65536, 2048, "NVIDIA H200 SXM data sheet"),
    "B200": GPU("sm_100", 8e12, 75e12 / 2, 75e12 / 16, 148, 126e6, 65536, 2048, "NVIDIA HGX B200 data sheet, per GPU"),
    "MI300X": GPU(
        "gfx942", 5.3e12, 163.4e12 / 4, 163.4e12 / 16, 304, 256e6, 131072, 2048,
        "AMD Instinct MI300X data sheet and CDNA 3 white paper; its FLOP/s count packed pairs",
    ),
}  # fmt: skip


class Estimate(NamedTuple):
    """One kernel on one GPU, for a column of classes."""

    kernel: str
    gpu: str
    dtype: str
    classes: int
    registers: int
    programs: int  # that a processor holds at once
    bytes_per_element: float  # to and from memory
    instructions_per_element: float
    exponentials_per_element: float
    picoseconds: float  # per element of (N, V)
    bound: str  # by what


def programs(found: Machine, gpu: GPU) -> int:
    """Programs that a processor holds at once, by registers and threads; registers come in groups of 8."""
    per_thread = -(-found.registers // 8) * 8
    return max(1, min(gpu.registers // (per_thread * found.threads), gpu.threads // found.threads))


def estimate(variant: Variant, found: Machine, dtype: str, classes: int, name: str) -> Estimate:
    """The model's answer for rows of `classes` columns, N large."""
    gpu, size = GPUS[name], DTYPES[dtype]
    resident = programs(found, gpu)
    looks = len(found.loops)
    arrays = variant.rows_read // looks
    in_flight = gpu.processors * resident * classes * size * arrays
    read = arrays * (1 if in_flight <= gpu.cache else looks)
    moved = size * (read + variant.rows_written)
    # Columns per iteration of a thread, from what it reads.
    instructions = sum(loop.instructions * arrays * size / loop.bytes_read for loop in found.loops)
    exponentials = sum(loop.exponentials * arrays * size / loop.bytes_read for loop in found.loops)
    times = {
        "memory": moved / gpu.bandwidth,
        "instructions": instructions / gpu.instructions,
        "exponentials": exponentials / gpu.exponentials,
    }
    bound = max(times, key=lambda key: times[key])
    return Estimate(
        variant.name, name, dtype, classes, found.registers, resident,
        moved, instructions, exponentials, times[bound] * 1e12, bound,
    )  # fmt: skip


def estimates(
    dtypes: tuple[str, ...] = ("bf16", "fp32"), widths: tuple[int, ...] = (32_000, 128_256)
) -> list[Estimate]:
    """Every kernel on every GPU."""
    code = {
        (variant.name, dtype, target): machine(variant, dtype, target)
        for variant in VARIANTS
        for dtype in dtypes
        for target in TARGETS
    }
    return [
        estimate(variant, code[variant.name, dtype, gpu.target], dtype, classes, name)
        for name, gpu in GPUS.items()
        for dtype in dtypes
        for classes in widths
        for variant in VARIANTS
    ]


def table(found: list[Estimate]) -> str:
    """Markdown, the sources under it."""
    head = (
        "GPU",
        "dtype",
        "V",
        "kernel",
        "registers",
        "programs",
        "bytes",
        "instructions",
        "exponentials",
        "ps",
        "bound by",
    )
    rows = [
        (
            e.gpu, e.dtype, f"{e.classes:,}", e.kernel, str(e.registers), str(e.programs), f"{e.bytes_per_element:g}",
            f"{e.instructions_per_element:.1f}", f"{e.exponentials_per_element:.1f}", f"{e.picoseconds:.2f}", e.bound,
        )
        for e in found
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sources = [f"- {name}: {gpu.source}" for name, gpu in GPUS.items()]
    return "\n".join(
        [
            "A model, not a measurement: per element of (N, V), from machine code and data sheets.",
            "",
            *lines,
            "",
            "Rates:",
            *sources,
        ]
    )


def main(as_json: bool) -> str:
    """The text of the command."""
    found = estimates()
    return json.dumps([e._asdict() for e in found], indent=1) if as_json else table(found)
