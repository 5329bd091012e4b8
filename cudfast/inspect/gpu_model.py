"""`python -m cudfast gpu-model`: a model of the kernels' times on GPUs, which need not be present.

Triton's kernels are compiled for the device; those in CUDA C++ were compiled when cudfast was built. Bytes,
instructions and exponentials per element are counted in the machine code of their main loops. A kernel takes at least
the longest of three times: its bytes over the memory's bandwidth, its instructions over the rate of float32
instructions, its exponentials over that of the special function units. Launches, latencies and the caches' own
bandwidth are not modelled. The second pass over a row costs no memory traffic if the rows in flight fit in L2, or if
they are staged in shared memory.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from ..backends import load
from ..backends.triton.compiled import DTYPES, TARGETS, VARIANTS, Variant, machine
from ..classes.arrays import progress
from .machine import Machine


class GPU(NamedTuple):
    """Rates of one GPU, from its vendor's data sheet or architecture white paper."""

    target: str  # the compilation target
    bandwidth: float  # bytes/s
    instructions: float  # float32 instructions of a thread/s: half of the FLOP/s of fused multiply-adds
    exponentials: float  # /s
    processors: int
    cache: float  # bytes of L2; of MI300X the Infinity Cache
    registers: int  # of a processor
    threads: int  # the most that run on a processor
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


# Bytes of a processor's shared memory, of which each block reserves a KiB, and the largest cluster, in blocks, that
# every device supports: CUDA C++ Programming Guide.
SHARED = {"sm_80": (164 << 10, 1), "sm_90": (228 << 10, 8), "sm_100": (228 << 10, 8)}


class Estimate(NamedTuple):
    """One kernel on one GPU, for a column of classes."""

    kernel: str
    gpu: str
    dtype: str
    classes: int
    registers: int
    programs: int  # that run on a processor at once
    bytes_per_element: float  # to and from memory
    instructions_per_element: float
    exponentials_per_element: float
    picoseconds: float  # per element of (N, V)
    bound: str  # the resource that limits the kernel


def programs(found: Machine, gpu: GPU) -> int:
    """Programs that run on a processor at once, by registers, threads and staged rows; registers come in groups of
    8."""
    limits = [gpu.registers // (-(-found.registers // 8) * 8 * found.threads), gpu.threads // found.threads]
    if gpu.target in SHARED:
        limits.append(SHARED[gpu.target][0] // (found.shared + 1024))
    return max(1, min(limits))


def estimate(
    kernel: str, found: Machine, arrays: int, walks: int, dtype: str, classes: int, name: str, cluster: int = 1
) -> Estimate:
    """The model's result for rows of `classes` columns, N large; walks: number of times the arrays are read from
    memory."""
    gpu, size = GPUS[name], DTYPES[dtype]
    resident = programs(found, gpu)
    in_flight = gpu.processors * resident / cluster * classes * size * arrays
    read = arrays * (1 if in_flight <= gpu.cache else walks)
    # Per element: a loop's counts over the columns of a thread's iteration, which follow from the bytes that it reads.
    per_element = [arrays * size / (loop.bytes_staged or loop.bytes_read) for loop in found.loops]
    moved = size * read + sum(loop.bytes_written * each for loop, each in zip(found.loops, per_element))
    instructions = sum(loop.instructions * each for loop, each in zip(found.loops, per_element))
    exponentials = sum(loop.exponentials * each for loop, each in zip(found.loops, per_element))
    times = {
        "memory": moved / gpu.bandwidth,
        "instructions": instructions / gpu.instructions,
        "exponentials": exponentials / gpu.exponentials,
    }
    bound = max(times, key=lambda key: times[key])
    return Estimate(
        kernel, name, dtype, classes, found.registers, resident,
        moved, instructions, exponentials, times[bound] * 1e12, bound,
    )  # fmt: skip


def _cuda(dtype: str, classes: int, name: str) -> Iterator[Estimate]:
    """The fused CUDA C++ kernels, if they were built for this GPU: rows are staged if they fit, else swept twice."""
    if isinstance(load("cuda"), str):
        return
    from ..backends.cuda import compiled as cuda

    gpu = GPUS[name]
    if gpu.target not in cuda.targets():
        return
    for variant in cuda.VARIANTS:
        found = cuda.machine(variant, dtype, gpu.target)
        cluster = 1
        if variant.staged:
            row = classes * DTYPES[dtype] * variant.arrays
            shared, clusters = SHARED[gpu.target]
            fitting = [c for c in (1, 2, 4, 8) if c <= clusters and row // c + cuda.HEADER <= shared - 1024]
            if not fitting:
                continue
            cluster = fitting[0]
            found = found._replace(shared=row // cluster + cuda.HEADER)
        kernel = f"{variant.name}{f' by {cluster} blocks' if cluster > 1 else ''}"
        yield estimate(kernel, found, variant.arrays, 1 if variant.staged else 2, dtype, classes, name, cluster)


def liger() -> tuple[Variant, ...]:
    """Liger's kernels of the same kind, with the blocks and threads that it launches; none if it is not installed.

    Its divergences take log probabilities, which must be computed first: a read and a write of each side. Modelled for
    NVIDIA only: on AMD its masked accesses are branches, which `compiled` would count as rarely executed code.
    """
    try:
        ops = [importlib.import_module(f"liger_kernel.ops.{name}") for name in ("kl_div", "jsd", "cross_entropy")]
    except ImportError:
        return ()
    kl, jsd, ce = ops
    names = ("y_ptr", "gt_ptr", "target_ptr", "new_grads_ptr", "X_ptr", "Y_ptr", "dX_ptr")
    types = {**dict.fromkeys(names, "*logits"), "loss_ptr": "*fp32", "label_ptr": "*i64", "eps": "fp32"}
    divergence: dict[str, object] = {"BLOCK_SIZE": 8192, "log_target": True}
    joint: dict[str, object] = {"BLOCK_SIZE": 32768, "beta": 0.5, "ignore_index": -100, "HAS_LABEL": False}
    labels: dict[str, object] = {
        "BLOCK_SIZE": 32768, "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean",
        "RETURN_Z_LOSS": False, "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False,
        "HAS_WEIGHT": False, "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True,
    }  # fmt: skip
    without = ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")
    of_labels = {**types, "Y_ptr": "*i64", "sum_non_ignore_weight": "fp32", "weight_sum": "fp32"}
    forward = {**divergence, "reduction": 3}
    return (
        Variant("Liger KL, forward", kl._kldiv_kernel_forward, forward, (), 1, 2, 0, 1, types, 512),
        Variant("Liger KL, backward", kl._kldiv_kernel_backward, divergence, (), 1, 1, 1, 1, types, 512),
        Variant("Liger JSD, fused", jsd._jsd_kernel, joint, without, 2, 2, 1, 1, types, 1024),
        Variant("Liger CE, fused", ce.liger_cross_entropy_kernel, labels, without, 2, 2, 1, 2, of_labels, 1024),
    )


@functools.cache
def _variants(backend: str) -> dict[str, Variant]:
    return {v.name: v for v in (VARIANTS if backend == "hip" else (*VARIANTS, *liger()))}


def _compiled(case: tuple[str, str, str]) -> Machine:
    name, dtype, target = case
    return machine(_variants(TARGETS[target].backend)[name], dtype, target)


def estimates(gpus: Sequence[str] = ()) -> list[Estimate]:
    """Every kernel on the given GPUs, or on all; the compiler runs on every core.

    Raises:
        ValueError: the name of a GPU that is not in GPUS.
    """
    if unknown := [name for name in gpus if name not in GPUS]:
        raise ValueError(f"--gpu {unknown[0]}: expected some of {', '.join(GPUS)}")
    asked = {name: gpu for name, gpu in GPUS.items() if name in gpus or not gpus}
    dtypes, widths = ("bf16", "fp32"), (32_000, 128_256)
    variants = {name: _variants(TARGETS[name].backend) for name in dict.fromkeys(gpu.target for gpu in asked.values())}
    cases = [(name, dtype, target) for target, found in variants.items() for name in found for dtype in dtypes]
    # Not forked: this process may have threads.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_compiled, case) for case in cases]
        code = {cases[i]: jobs[i].result() for i in progress(range(len(cases)), "compiling")}
    return [
        each
        for name, gpu in asked.items()
        for dtype in dtypes
        for classes in widths
        for found in (
            (_triton(v, code[v.name, dtype, gpu.target], dtype, classes, name) for v in variants[gpu.target].values()),
            _cuda(dtype, classes, name),
        )
        for each in found
    ]


def _triton(variant: Variant, found: Machine, dtype: str, classes: int, name: str) -> Estimate:
    arrays = variant.rows_read // variant.looks
    return estimate(variant.name, found, arrays, variant.looks, dtype, classes, name)


def table(found: list[Estimate]) -> str:
    """The table in Markdown, with the sources below it."""
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
    sources = [f"- {name}: {GPUS[name].source}" for name in dict.fromkeys(e.gpu for e in found)]
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


def main(as_json: bool, gpus: Sequence[str] = ()) -> str:
    """The text of the command."""
    found = estimates(gpus)
    return json.dumps([e._asdict() for e in found], indent=1) if as_json else table(found)
