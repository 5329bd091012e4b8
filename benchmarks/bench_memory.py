"""Peak memory beyond the inputs, and what stays between forward and backward, in units of N V elements."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from cudfast.bench.cases import Forward, cud_cases, eager_cud, make, through, with_gradient
from cudfast.bench.memory import CLEAR, peak, reset, resident
from cudfast.bench.result import Table
from cudfast.bench.shapes import SHAPES

from . import peers


def between(forward: Forward) -> int:
    """Bytes that are held between forward and backward."""
    before = reset()
    held = forward()
    kept = resident("VmRSS") - before
    del held
    return kept


@pytest.mark.skipif(not CLEAR.exists(), reason="needs /proc/self/clear_refs (Linux)")
@pytest.mark.benchmark(group="memory (the time says nothing)")
def bench_memory(benchmark: BenchmarkFixture, tables: list[Table]) -> None:
    shape = SHAPES["Llama 2"]
    data = make(shape)
    forms = {**cud_cases(data), "eager PyTorch": through(eager_cud, data.student, data.teacher, data.labels)}
    unit = data.plain.nbytes
    found: dict[str, dict[str, float]] = {}

    def run() -> None:
        for name, forward in forms.items():
            call = with_gradient(forward)
            call()  # loads what is loaded on first use
            most = peak(call)
            assert most is not None
            found[name] = {"peak": most / unit, "between": between(forward) / unit}
        for peer in peers.distillation(data)[0]:
            peer.call()
            most = peak(peer.call)
            assert most is not None
            found[peer.name] = {"peak": most / unit}

    benchmark.pedantic(run)  # type: ignore[no-untyped-call]
    memory = {"title": "CUDLoss", "rows": shape.rows, "classes": shape.classes, "unit": unit, "cases": found}
    benchmark.extra_info["memory"] = memory
    rows: list[tuple[str, ...]] = [
        (case, f"{m['peak']:.2f}", f"{m['between']:.2f}" if "between" in m else "") for case, m in found.items()
    ]
    title = f"CUDLoss, {shape} float32: memory beyond the inputs, 1 = N V elements = {unit / 1e6:.4g} MB"
    tables.append(Table(title, ("", "peak", "between forward and backward"), rows))
