"""The output of `python -m cudfast gpu-model`, beside the measurements: a model, no GPU is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from cudfast.bench.result import Table
from cudfast.inspect.gpu_model import Estimate

from .rounds import QUICK

pytest.importorskip("triton")


@pytest.mark.skipif(QUICK, reason="compiles every kernel for every GPU: a minute")
@pytest.mark.benchmark(group="GPU model (the time is that of compiling, on this machine)")
def bench_gpu_model(benchmark: BenchmarkFixture, tables: list[Table]) -> None:
    found: list[Estimate] = []

    def run() -> None:
        command = [sys.executable, "-m", "cudfast", "gpu-model", "--json"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.extend(Estimate(**each) for each in json.loads(text))

    benchmark.pedantic(run)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(model=True, estimates=[e._asdict() for e in found])
    rows: list[tuple[str, ...]] = [
        (f"{e.gpu}  {e.kernel}", f"{e.bytes_per_element:g}", f"{e.instructions_per_element:.1f}",
         f"{e.exponentials_per_element:.1f}", f"{e.picoseconds:.2f}", e.bound, f"{e.share:.0%}")
        for e in found if (e.dtype, e.classes) == ("bf16", 32_000)
    ]  # fmt: skip
    title = "MODEL of GPUs, not a measurement: bfloat16, V = 32,000, per element of (N, V)"
    tables.append(Table(title, ("", "bytes", "instructions", "exponentials", "ps", "bound by", "of torch.add"), rows))
