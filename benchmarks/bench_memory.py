"""Peak memory beyond the inputs, each case in a process of its own: what one case freed would serve the next."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .bench_cud import LARGE
from .cases import Inputs, cud_cases, eager_cud, make, through
from .measure import Shape, Table

CASES = ("given gradient", "in place", "fresh gradient", 'save="state"', "eager PyTorch")
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def resident(field: str) -> int:
    """VmRSS: resident now. VmHWM: the most since the last reset; getrusage would count the parent's, too."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _step(case: str, data: Inputs) -> int:
    """Forward and backward of one case; returns what is resident between them."""
    cases = {**cud_cases(data), "eager PyTorch": through(eager_cud, data.student, data.teacher, data.labels)}
    loss, logits = cases[case]()
    between = resident("VmRSS")
    torch.autograd.grad(loss, logits)
    return between


def measure(case: str, shape: Shape) -> dict[str, float]:
    """Memory beyond the inputs in units of N V elements, at its peak and between forward and backward."""
    _step(case, make(Shape(64, 1000)))  # starts threads and loads what is loaded on first use
    data = make(shape)
    before = resident("VmRSS")
    CLEAR.write_text("5")  # resets VmHWM to VmRSS
    between = _step(case, data)
    unit = data.plain.nbytes
    return {"peak": (resident("VmHWM") - before) / unit, "between": (between - before) / unit}


@pytest.mark.skipif(not CLEAR.exists(), reason="needs /proc/self/clear_refs (Linux)")
@pytest.mark.benchmark(group="memory (the time is that of the whole process)")
def bench_memory(benchmark: BenchmarkFixture, tables: list[Table]) -> None:
    shape = LARGE[0]
    found: dict[str, dict[str, float]] = {}

    def run() -> None:
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.bench_memory", case, str(shape.rows), str(shape.classes)]
            root = Path(__file__).parents[1]
            found[case] = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout)

    benchmark.pedantic(run)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(rows=shape.rows, classes=shape.classes, unit="N V elements", cases=found)
    rows: list[tuple[str, ...]] = [(case, f"{m['peak']:.2f}", f"{m['between']:.2f}") for case, m in found.items()]
    unit = shape.rows * shape.classes * torch.float32.itemsize / 1e6
    title = f"CUDLoss, {shape} float32: memory beyond the inputs, 1 = N V elements = {unit:.4g} MB"
    tables.append(Table(title, ("", "peak", "between forward and backward"), rows))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Shape(int(sys.argv[2]), int(sys.argv[3])))))
