"""`python -m cudfast gpu-model`: a model of the kernels' speed on GPUs, which need not be present.

Triton's kernels are compiled for the device; those in CUDA C++ were compiled when cudfast was built. Bytes and
instructions per element come from the machine code of their main loops. A loop needs at least the longest of these
times: its bytes over the bandwidth that it can use, its instructions over the rate at which they are issued, and those
of each pipe over that pipe's rate. It uses a part of the bandwidth if too few bytes are in flight (Little's law).
Registers, shared memory and threads limit the number of programs that run on a processor at once. If there are several,
loads of one overlap with arithmetic of another, and the time is the longest sum over the loops; if there is one, it is
the sum of the longest times. The second pass over a row costs no memory traffic if the rows in flight fit in L2, or if
they are staged in shared memory. The share is the rate over that of torch.add, which moves the same bytes; at 100% a
kernel is as fast as memory.

Launches and the work per row (barriers, merges, float64) are not modelled. Shares measured on a GPU should therefore be
at most those of the model.
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


# Issue slots, and lanes for comparisons and bits, for each lane that does float32 multiply-adds: CUDA C++ Programming
# Guide. AMD's vector units do all of them at one rate.
PIPES = {"sm_80": (2.0, 1.0), "sm_90": (1.0, 0.5), "sm_100": (1.0, 0.5), "gfx942": (1.0, 1.0)}
REACHED = 0.9  # of a data sheet's bandwidth, by torch.add. An assumption, to be replaced by a measurement on a GPU
AHEAD = 4  # iterations whose asynchronous copies are in flight: csrc/cuda/kernels.h
LATENCY = 0.8e-6  # seconds from a load to its bytes, under load. An assumption

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
    half_rate_per_element: float  # instructions on the pipe of comparisons and bits
    in_flight: float  # bytes of loads in flight on a processor, over those that its share of the bandwidth needs
    share: float  # of torch.add's rate, or of torch.neg's for one matrix


def programs(found: Machine, gpu: GPU) -> int:
    """Programs that run on a processor at once, by registers, threads and staged rows; registers come in groups of
    8."""
    limits = [gpu.registers // (-(-found.registers // 8) * 8 * found.threads), gpu.threads // found.threads]
    if gpu.target in SHARED:
        limits.append(SHARED[gpu.target][0] // (found.shared + 1024))
    return max(1, min(limits))


class Kernel(NamedTuple):
    """The properties of a kernel that the model needs besides its machine code."""

    name: str
    arrays: int  # of logits
    looks: int  # number of times they are read from memory if they do not fit in L2
    columns: tuple[float, ...]  # of a thread's iteration, for each loop
    written: tuple[float, ...]  # bytes per element, by each loop
    cluster: int = 1  # programs that share a row


def _bytes(kernel: Kernel, found: Machine, size: int, cached: bool) -> list[tuple[int, float]]:
    """(read, written) per element, for each loop."""
    moved = []
    for index, loop in enumerate(found.loops):
        again = index > 0 and (cached or kernel.looks == 1)
        moved.append((kernel.arrays * size if loop.bytes_read and not again else 0, kernel.written[index]))
    return moved


def estimate(kernel: Kernel, found: Machine, dtype: str, classes: int, name: str) -> Estimate:
    """The model's result for rows of `classes` columns, N large."""
    gpu, size = GPUS[name], DTYPES[dtype]
    resident = programs(found, gpu)
    rows = gpu.processors * resident / kernel.cluster
    moved = _bytes(kernel, found, size, rows * classes * size * kernel.arrays <= gpu.cache)
    bandwidth, (issue, half) = REACHED * gpu.bandwidth, PIPES[gpu.target]
    needed, fewest = bandwidth * LATENCY / gpu.processors, 1.0
    times: list[dict[str, float]] = []
    for loop, columns, (read, written) in zip(found.loops, kernel.columns, moved):
        ahead = loop.bytes_read * (AHEAD if loop.copied else 1) * found.threads * resident
        usable = min(1.0, ahead / needed) if read else 1.0
        fewest = min(fewest, usable)
        slot = 1 / (columns * gpu.instructions)
        times.append({
            "memory": (read + written) / bandwidth,
            "bytes in flight": (read / usable + written) / bandwidth if usable < 1 else 0.0,
            "instructions": loop.instructions * slot / issue,
            "arithmetic": loop.arithmetic * slot,
            "half-rate instructions": loop.half_rate * slot / half,
            "exponentials": loop.exponentials / columns / gpu.exponentials,
        })  # fmt: skip
    sums = {what: sum(each[what] for each in times) for what in times[0]}
    bound = max(sums, key=lambda what: sums[what])
    seconds = sums[bound] if resident > 1 else sum(max(each.values()) for each in times)
    least = (kernel.arrays + any(kernel.written)) * size

    def per_element(what: str) -> float:
        return sum(float(getattr(loop, what)) / columns for loop, columns in zip(found.loops, kernel.columns))

    return Estimate(
        kernel.name, name, dtype, classes, found.registers, resident, sum(map(sum, moved)),
        per_element("instructions"), per_element("exponentials"), seconds * 1e12, bound, per_element("half_rate"),
        fewest, min(1.0, least / bandwidth / seconds),  # equal times may round to more
    )  # fmt: skip


def _cuda(dtype: str, classes: int, name: str) -> Iterator[Estimate]:
    """The fused CUDA C++ kernels, if they were built for this GPU: rows are staged if they fit, else swept twice."""
    if isinstance(load("cuda"), str):
        return
    from ..backends.cuda import compiled as cuda

    gpu = GPUS[name]
    if gpu.target not in cuda.targets():
        return
    for variant in (*cuda.VARIANTS, *cuda.PROJECTED):
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
        columns = float(variant.columns or 16 // DTYPES[dtype])
        looks, written = 1 if variant.staged else 2, (0, DTYPES[dtype])
        about = Kernel(kernel, variant.arrays, looks, (columns,) * 2, written, cluster)
        yield estimate(about, found, dtype, classes, name)


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
    columns = tuple(loop.bytes_read / (arrays * DTYPES[dtype]) for loop in found.loops)
    written = tuple(loop.bytes_written / each for loop, each in zip(found.loops, columns))
    return estimate(Kernel(variant.name, arrays, variant.looks, columns, written), found, dtype, classes, name)


def table(found: list[Estimate]) -> str:
    """The table in Markdown, with the sources below it."""
    head = (
        "GPU", "dtype", "V", "kernel", "registers", "programs", "in flight", "bytes", "instructions", "half rate",
        "exponentials", "ps", "bound by", "of torch.add",
    )  # fmt: skip
    rows = [
        (
            e.gpu, e.dtype, f"{e.classes:,}", e.kernel, str(e.registers), str(e.programs), f"{e.in_flight:.0%}",
            f"{e.bytes_per_element:g}", f"{e.instructions_per_element:.1f}", f"{e.half_rate_per_element:.1f}",
            f"{e.exponentials_per_element:.1f}", f"{e.picoseconds:.2f}", e.bound, f"{e.share:.0%}",
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
