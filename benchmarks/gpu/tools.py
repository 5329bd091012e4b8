"""Programs that come with the CUDA toolkit: compute-sanitizer, ncu, nvidia-smi. Those that are missing are left out."""

from __future__ import annotations

import csv
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from cudfast.inspect.info import describe, report

from .place import Place
from .report import FAILED, Log
from .steps import Item

ROOT = Path(__file__).parents[2]
SECONDS = 75.0  # that a program may take
KERNELS = {
    "cuda": ("row_kernel",),
    "triton": ("student_", "teacher_", "projected_rows", "temper_rows", "scale_rows"),
}
"""Parts of the kernels' names: PyTorch's own are not watched."""
FIRST = (
    *(("cuda", tool) for tool in ("memcheck", "racecheck", "synccheck")),
    *(("triton", tool) for tool in ("memcheck", "racecheck")),
)
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
METRICS = (
    "Duration", "Memory Throughput", "DRAM Throughput", "L2 Hit Rate", "Compute (SM) Throughput",
    "Registers Per Thread", "Theoretical Occupancy", "Achieved Occupancy", "Warp Cycles Per Issued Instruction",
)  # fmt: skip


def finished(command: Sequence[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Exit status and output of a program; None where it took too long and was ended, with all that it started."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def driver() -> str:
    """What nvidia-smi says of driver, clocks and power."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not on the PATH"
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    return finished([program, f"--query-gpu={asked}", "--format=csv"], 20)[1].strip().replace("\n", "; ")


def facts(place: Place, log: Log) -> str | None:
    """The machine, and what `cudfast info` says."""
    found = report()
    log.write("facts", **place.facts, driver=driver(), **{
        name: value for name, _, value in (line.partition("  ") for line in describe(found).splitlines()) if value
    })  # fmt: skip
    if not found["ok"]:
        raise AssertionError("a self-check of cudfast info failed")
    return None


def sanitized(backend: str, tool: str, dtype: str) -> str:
    """compute-sanitizer over every kernel. Every tensor has an allocation of its own, whose bounds are seen."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "left out: compute-sanitizer is not on the PATH"
    filters = [part for name in KERNELS[backend] for part in ("--kernel-name", f"kernel_substring={name}")]
    command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", *filters]
    command += [sys.executable, "-m", "benchmarks.gpu.kernels", backend, dtype]
    status, output = finished(command, SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status is None:
        return f"left out: it took more than {SECONDS:g} s"
    if status or not re.search(r"SUMMARY: 0 (errors|hazards)", output):
        return f"{FAILED}: {output[-500:].strip()}".replace("\n", " ")
    return "ok"


def sanitize(runs: Sequence[tuple[str, str]], dtype: str, log: Log) -> str | None:
    """Several at a time, each with a line of its own."""
    verdicts = []
    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        jobs = {pool.submit(sanitized, backend, tool, dtype): (backend, tool) for backend, tool in runs}
        for job in as_completed(jobs):
            backend, tool = jobs[job]
            verdicts.append(job.result())
            what = f"{backend}: compute-sanitizer {tool}, {dtype}"
            log.write("done", step="sanitizers", what=what, backend=backend, proves=True, verdict=verdicts[-1],
                      seconds=0.0)  # fmt: skip
    return None if any(verdict == "ok" for verdict in verdicts) else "left out: see the lines before"


def sanitizer_items(place: Place) -> Iterator[Item]:
    """The five that matter most, side by side; then the others."""
    there = place.backends()
    tools = [(b, t) for b, t in itertools.product(there, ("memcheck", "racecheck", "synccheck", "initcheck"))]
    first = [run for run in FIRST if run[0] in there]
    for runs, dtype in ((first, "bfloat16"), ([r for r in tools if r not in first], "bfloat16"), (tools, "float32")):
        what = f"{', '.join(' '.join(run) for run in runs)} in {dtype}"
        yield Item(what, partial(sanitize, runs, dtype), patience=SECONDS + 30)


def profile(backend: str, n: int, v: int, log: Log) -> str | None:
    """ncu over the kernels of one call."""
    program = shutil.which("ncu")
    if program is None:
        return "left out: ncu is not on the PATH"
    command = [program, "--csv", "--page", "details", *(part for name in SECTIONS for part in ("--section", name))]
    command += ["--kernel-name", f"regex:{'|'.join(KERNELS[backend])}", "--launch-count", "4"]
    command += [sys.executable, "-m", "benchmarks.gpu.kernels", backend, "bfloat16", str(n), str(v)]
    status, output = finished(command, SECONDS)
    found: dict[str, dict[str, str]] = {}
    table = output[output.find('"ID"') :].splitlines() if '"ID"' in output else []
    for row in csv.DictReader(table):
        if row.get("Metric Name") in METRICS:
            value = f"{row['Metric Value']} {row.get('Metric Unit') or ''}".strip()
            found.setdefault(row["Kernel Name"][:60], {})[row["Metric Name"]] = value
    for kernel, metrics in found.items():
        log.write("profile", what=f"{backend}, {n:,} x {v:,}", kernel=kernel, metrics=metrics)
    if not found:
        last = next((line for line in reversed(output.splitlines()) if line.startswith("==ERROR==")), output[-200:])
        return f"left out: ncu ended with {status}: {last.strip()}".replace("\n", " ")
    return None


def profile_items(place: Place) -> Iterator[Item]:
    """The fused kernels at two shapes."""
    for shape in place.peers:
        for backend in place.backends():
            run = partial(profile, backend, shape.rows, shape.classes)
            yield Item(f"{backend}, {shape}", run, backend, patience=SECONDS + 30)
