"""FusedLinearCUDLoss, forward and backward, against the bare products, eager PyTorch and its peers: time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from cudfast import FusedLinearCUDLoss

from . import heads
from .bench_memory import CLEAR, resident
from .cases import TEMPERATURE, eager_cud
from .heads import Heads, Sizes
from .measure import QUICK, Contestant, Errors, Race, Shape, Table, gate, truth

CASES = (
    Sizes(64, 151_936, "a few tokens of Qwen's vocabulary", 256, 256),
    Sizes(2_048, 32_000, "tokens of Llama 2's or Mistral's vocabulary", 256, 512),
    Sizes(1_024, 65_536, "tokens of a larger one", 512, 512),
)
ROUNDS, SLOW = (3, 1) if QUICK else (7, 3)
OURS, FLOOR, FRESH, EAGER = "fused", "products, given memory", "products, fresh memory", "eager PyTorch"


@dataclass(frozen=True)
class Multiplying(Contestant):
    """Counts floating point operations."""

    teacher: bool = True

    def work(self, shape: Shape, dtype: torch.dtype) -> int:
        assert isinstance(shape, Sizes)
        return shape.operations(teacher=self.teacher)


def check(x: Heads, got: heads.Found, plain: heads.Found) -> None:
    """The gate: against float64, for the loss and both gradients."""
    h, w, th, tw = (t.detach().double() for t in (x.h, x.w, x.th, x.tw))
    value, slope = truth(eager_cud, h @ w.t(), th @ tw.t(), x.labels)
    for i, true in ((1, slope @ w), (2, slope.t() @ h)):
        errors = Errors.of((plain[0], plain[i]), (value, true))
        gate(OURS, (got[0], got[i]), (value, true), errors, TEMPERATURE)


def best(name: str, settings: Mapping[str, Callable[[], Callable[[], object]]], *, teacher: bool = True) -> Contestant:
    """A peer in its fastest setting, by the better of two calls after a first one."""
    calls = {setting: build() for setting, build in settings.items()}
    seconds = {s: min(Contestant(s, call).seconds(warm=1 - i) for i in range(2)) for s, call in calls.items()}
    fastest = min(seconds, key=lambda setting: seconds[setting])
    return Multiplying(f"{name} ({fastest})" if fastest else name, calls[fastest], every=SLOW, teacher=teacher)


def peers(x: Heads, sizes: Sizes, tables: list[Table]) -> list[Contestant]:
    """Those that can be imported; the others are named in the table's heading."""
    chunks = [chunk for chunk in (256, 512, 1024) if chunk <= sizes.rows] or [sizes.rows]
    builds = {
        "liger-kernel KL + CE": {
            f"{how}, chunks of {chunk}": partial(heads.liger, x, chunk=chunk, compiled=how == "compiled")
            for chunk in chunks
            for how in ("compiled", "not compiled")
        },
        "TRL KL": {
            f"tiles of {tokens} x {words:,}": partial(heads.trl, x, tokens=tokens, vocabulary=words)
            for tokens in sorted({min(sizes.rows, 4096), min(sizes.rows, 512)})
            for words in (8_192, 32_768, sizes.classes)
        },
    }
    found: list[Contestant] = []
    for name, settings in builds.items():
        try:
            found.append(best(name, settings))
        except ImportError as error:
            tables.append(Table(f"{name}: not installed ({error})", ("",), []))
    return found


@pytest.mark.benchmark(group="FusedLinearCUDLoss")
@pytest.mark.parametrize("sizes", CASES[:1] if QUICK else CASES, ids=str)
def bench_linear(race: Race, tables: list[Table], sizes: Sizes) -> None:
    x = heads.make(sizes)
    ours, eager = heads.ours(x), heads.eager(x)
    check(x, ours(), eager())
    others = peers(x, sizes, tables)
    contestants = [
        Multiplying(OURS, ours),
        Multiplying('save="state"', heads.ours(x, save="state"), every=SLOW),
        Multiplying(FLOOR, heads.products(x, given=True)),
        Multiplying(FRESH, heads.products(x)),
        Multiplying(EAGER, eager, every=SLOW),
        *others,
    ]
    race.run("FusedLinearCUDLoss", sizes, torch.float32, contestants, floor=FLOOR, rounds=ROUNDS, unit="FLOP")
    race.goal(OURS, FLOOR, 1.15, None, at_most=True)
    race.goal(OURS, FRESH, 1.15, None, at_most=True)
    for peer, most in ((EAGER, 0.7), *((p.name, 1.0) for p in others)):
        race.goal(OURS, peer, most, None, at_most=True)


@pytest.mark.benchmark(group="FusedLinearCUDLoss, cross-entropy only")
@pytest.mark.parametrize("sizes", CASES[:1] if QUICK else CASES, ids=str)
def bench_cross_entropy(race: Race, sizes: Sizes) -> None:
    x = heads.make(sizes)
    ours, eager = heads.ours(x, kd_weight=0.0, ce_weight=1.0), heads.eager_ce(x)
    for got, wanted in zip(ours(), eager()):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    settings: dict[str, Callable[[], Callable[[], object]]]
    settings = {"whole": partial(heads.torch_ce, x, chunked=False), "its own chunks": partial(heads.torch_ce, x)}
    settings |= {f"chunks of {c}": partial(heads.torch_ce, x, chunk=c) for c in (256, 512, 1024) if c < sizes.rows}
    peer = best("F.linear_cross_entropy", settings, teacher=False)
    contestants = [
        Multiplying(OURS, ours, teacher=False),
        Multiplying(FLOOR, heads.products(x, teacher=False, given=True), teacher=False),
        Multiplying(FRESH, heads.products(x, teacher=False), teacher=False),
        peer,
    ]
    title = "FusedLinearCUDLoss(kd_weight=0)"
    race.run(title, sizes, torch.float32, contestants, floor=FLOOR, rounds=ROUNDS, unit="FLOP")
    race.goal(OURS, FRESH, 1.15, None, at_most=True)
    race.goal(OURS, peer.name, 1.0, None, at_most=True)


# ---- Memory ----

MEMORY: dict[str, Callable[[Heads], Callable[[], heads.Found]]] = {
    OURS: heads.ours,
    "fused, 64 MiB": lambda x: heads.ours(x, memory_budget=64 << 20),
    EAGER: heads.eager,
    "liger-kernel KL + CE": lambda x: heads.liger(x, chunk=min(len(x.h), 1024), compiled=False),
    "TRL KL": heads.trl,
}


def memory(case: str, sizes: Sizes) -> float:
    """Peak bytes beyond inputs and gradients."""
    MEMORY[case](heads.make(Sizes(32, 1000, "", sizes.student, sizes.teacher)))()  # loads what is loaded on first use
    x = heads.make(sizes)
    call = MEMORY[case](x)
    before = resident("VmRSS")
    CLEAR.write_text("5")
    call()
    return resident("VmHWM") - before - x.h.nbytes - x.w.nbytes


@pytest.mark.skipif(not CLEAR.exists(), reason="needs /proc/self/clear_refs (Linux)")
@pytest.mark.benchmark(group="memory (the time is that of the whole process)")
def bench_linear_memory(benchmark: BenchmarkFixture, tables: list[Table]) -> None:
    sizes = CASES[-1]
    found: dict[str, str] = {}

    def run() -> None:
        for case in MEMORY:
            widths = map(str, (sizes.rows, sizes.classes, sizes.student, sizes.teacher))
            command = [sys.executable, "-m", "benchmarks.bench_linear", case, *widths]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
            missing = done.stderr.strip().splitlines()[-1:] or ["failed"]
            found[case] = f"{json.loads(done.stdout) / 2**20:,.0f}" if done.returncode == 0 else missing[0]

    benchmark.pedantic(run)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(sizes=str(sizes), unit="MiB", cases=found)
    title = f"FusedLinearCUDLoss, {sizes} float32: peak memory beyond inputs and gradients"
    tables.append(Table(title, ("", "MiB"), list(found.items())))


# ---- A hundred million classes ----


@pytest.mark.skipif(QUICK, reason="takes 19 GB and minutes")
@pytest.mark.benchmark(group="FusedLinearCUDLoss, 100,000,000 classes")
def bench_hundred_million(benchmark: BenchmarkFixture, tables: list[Table]) -> None:
    """8 rows, D = 16: two weights and a gradient of 6.4 GB each."""
    rows, classes, budget = 8, 100_000_000, 256 << 20
    torch.manual_seed(0)
    h, w = torch.randn(rows, 16, requires_grad=True), torch.empty(classes, 16).uniform_(-1, 1).requires_grad_()
    th, labels = torch.randn(rows, 16), torch.randint(classes, (rows,))
    loss = FusedLinearCUDLoss(memory_budget=budget)
    few = slice(0, 100_000)  # loads what is loaded on first use
    loss(h, w[few], labels % 100_000, teacher_hidden=th, teacher_weight=w.detach()[few]).backward()
    h.grad = w.grad = None
    peak = 0

    def step() -> None:
        nonlocal peak
        before = resident("VmRSS")
        CLEAR.write_text("5")
        value = loss(h, w, labels, teacher_hidden=th, teacher_weight=w.detach())
        gradients = torch.autograd.grad(value, (h, w))
        peak = max(peak, resident("VmHWM") - before - sum(g.nbytes for g in gradients))
        assert value.isfinite()

    benchmark.pedantic(step)  # type: ignore[no-untyped-call]
    assert peak <= budget
    benchmark.extra_info.update(rows=rows, classes=classes, budget=budget, peak=peak)
    seconds = "" if benchmark.stats is None else f"{benchmark.stats.stats.median:.1f}"
    title = f"FusedLinearCUDLoss, {rows} x {classes:,}, D = 16, float32, in {budget >> 20} MiB"
    tables.append(Table(title, ("", "s", "peak MiB"), [(OURS, seconds, f"{peak / 2**20:.0f}")]))


if __name__ == "__main__":
    print(
        json.dumps(
            memory(sys.argv[1], Sizes(int(sys.argv[2]), int(sys.argv[3]), "", int(sys.argv[4]), int(sys.argv[5])))
        )
    )
