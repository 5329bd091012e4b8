"""FusedLinearCUDLoss, forward and backward, against the bare products, eager PyTorch and its peers: time and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from cudfast import FusedLinearCUDLoss
from cudfast.bench.cases import TEMPERATURE, eager_cud
from cudfast.bench.contestants import Contestant
from cudfast.bench.gate import Errors, gate, truth
from cudfast.bench.memory import CLEAR, peak
from cudfast.bench.result import Table
from cudfast.bench.shapes import Shape

from . import heads, peers
from .conftest import Runner
from .heads import Heads, Sizes
from .rounds import LARGE, QUICK

CASES = (
    Sizes(64, 151_936, "a few tokens of Qwen's vocabulary", 256, 256),
    Sizes(2_048, 32_000, "tokens of Llama 2's or Mistral's vocabulary", 256, 512),
    Sizes(1_024, 65_536, "tokens of a larger one", 512, 512),
)
ROUNDS = 5
OURS, FLOOR, FRESH, EAGER = "fused", "products, given memory", "products, fresh memory", "eager PyTorch"


@dataclass(frozen=True)
class Multiplying(Contestant):
    """Counts floating point operations."""

    teacher: bool = True

    def work(self, shape: Shape, dtype: torch.dtype) -> int:
        assert isinstance(shape, Sizes)
        return shape.operations(teacher=self.teacher)


@pytest.fixture
def multiply(race: Runner) -> Callable[..., object]:
    """A race of products."""
    return partial(race, dtype=torch.float32, floor=FLOOR, rounds=ROUNDS, unit="FLOP")


def check(x: Heads, got: heads.Found, plain: heads.Found) -> None:
    """The gate: against float64, for the loss and both gradients."""
    h, w, th, tw = (t.detach().double() for t in (x.h, x.w, x.th, x.tw))
    value, slope = truth(eager_cud, h @ w.t(), th @ tw.t(), x.labels)
    for i, true in ((1, slope @ w), (2, slope.t() @ h)):
        errors = Errors.of((plain[0], plain[i]), (value, true))
        gate(OURS, (got[0], got[i]), (value, true), errors, TEMPERATURE)


# Each peer's fastest setting at each of CASES on 2 cores with AVX2. Tried, as far as there are so many rows: Liger in
# chunks of 512 and 1,024 rows; TRL in tiles of 512 and 4,096 rows by 8,192 and 32,768 classes; PyTorch whole, in chunks
# of its own choice, of 256, 512 and 1,024 rows.
LIGER = dict(zip(CASES, (64, 1024, 1024)))
TRL = dict(zip(CASES, ((64, 8_192), (512, 8_192), (512, 8_192))))
TORCH: dict[Sizes, int | None] = dict(zip(CASES, (None, 512, 512)))


def others(x: Heads, sizes: Sizes) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can be imported, and why the rest cannot be raced."""
    chunk, (tokens, words) = LIGER[sizes], TRL[sizes]
    builds = {
        "liger-kernel KL + CE": (
            f"{'not ' if QUICK else ''}compiled, chunks of {chunk}",
            partial(peers.liger, x, chunk=chunk, compiled=not QUICK),
        ),
        "TRL KL": (f"tiles of {tokens} x {words:,}", partial(peers.trl, x, tokens=tokens, vocabulary=words)),
    }
    found: list[Contestant] = []
    absent: dict[str, str] = {}
    for name, (setting, build) in builds.items():
        try:
            call = build()
            call()  # imports what it needs
            found.append(Multiplying(f"{name} ({setting})", call))
        except ImportError as error:
            absent[name] = f"not installed ({error})"
    return found, absent


@pytest.mark.benchmark(group="FusedLinearCUDLoss")
@pytest.mark.parametrize("sizes", CASES[:1] if QUICK else CASES if LARGE else CASES[:2], ids=str)
def bench_linear(multiply: Callable[..., object], sizes: Sizes) -> None:
    x = heads.make(sizes)
    ours, eager = heads.ours(x), heads.eager(x)
    check(x, ours(), eager())
    found, absent = others(x, sizes)
    forms = {OURS: ours, **({'save="state"': heads.ours(x, save="state")} if sizes == CASES[0] else {})}
    contestants = [
        *(Multiplying(name, call) for name, call in forms.items()),
        Multiplying(FLOOR, heads.products(x, given=True)),
        Multiplying(FRESH, heads.products(x)),
        Multiplying(EAGER, eager),
        *found,
    ]
    multiply(
        "FusedLinearCUDLoss",
        sizes,
        contestants=contestants,
        absent=absent,
        memory=sizes != CASES[-1],  # bench_linear_memory measures the largest
        at_most=[
            (OURS, FLOOR, 1.15, None),
            (OURS, FRESH, 1.15, None),
            (OURS, EAGER, 0.7, None),
            *((OURS, peer.name, 1.0, None) for peer in found),
        ],
    )


@pytest.mark.skipif(QUICK, reason="a minute")
@pytest.mark.benchmark(group="FusedLinearCUDLoss, cross-entropy only")
@pytest.mark.parametrize("sizes", CASES[:2], ids=str)
def bench_cross_entropy(multiply: Callable[..., object], sizes: Sizes) -> None:
    x = heads.make(sizes)
    ours, eager = heads.ours(x, kd_weight=0.0, ce_weight=1.0), heads.eager_ce(x)
    for got, wanted in zip(ours(), eager()):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    chunk = TORCH[sizes]
    setting = f"chunks of {chunk}" if chunk else "whole"
    call = peers.torch_ce(x, chunk=chunk, chunked=bool(chunk))
    peer = Multiplying(f"F.linear_cross_entropy ({setting})", call, teacher=False)
    contestants = [
        Multiplying(OURS, ours, teacher=False),
        Multiplying(FLOOR, heads.products(x, teacher=False, given=True), teacher=False),
        Multiplying(FRESH, heads.products(x, teacher=False), teacher=False),
        peer,
    ]
    multiply(
        "FusedLinearCUDLoss(kd_weight=0)",
        sizes,
        contestants=contestants,
        at_most=[(OURS, FRESH, 1.15, None), (OURS, peer.name, 1.0, None)],
    )


# ---- Memory ----

MEMORY: dict[str, Callable[[Heads], Callable[[], heads.Found]]] = {
    OURS: heads.ours,
    "fused, 64 MiB": lambda x: heads.ours(x, memory_budget=64 << 20),
    EAGER: heads.eager,
    "liger-kernel KL + CE": lambda x: peers.liger(x, chunk=min(len(x.h), 1024), compiled=False),
    "TRL KL": peers.trl,
}


@pytest.mark.skipif(not CLEAR.exists(), reason="needs /proc/self/clear_refs (Linux)")
@pytest.mark.benchmark(group="memory (the time says nothing)")
def bench_linear_memory(benchmark: BenchmarkFixture, tables: list[Table]) -> None:
    sizes = CASES[0 if QUICK else -1]
    few, x = heads.make(Sizes(32, 1000, "", sizes.student, sizes.teacher)), heads.make(sizes)
    gradients = x.h.nbytes + x.w.nbytes
    found: dict[str, float] = {}
    absent: dict[str, str] = {}

    def run() -> None:
        for name, build in MEMORY.items():
            try:
                build(few)()  # loads what is loaded on first use
            except ImportError as error:
                absent[name] = f"not installed ({error})"
                continue
            most = peak(build(x))
            assert most is not None
            found[name] = (most - gradients) / 2**20

    benchmark.pedantic(run)  # type: ignore[no-untyped-call]
    benchmark.extra_info["linear_memory"] = {"sizes": str(sizes), "MiB": found, "absent": absent}
    title = f"FusedLinearCUDLoss, {sizes} float32: peak memory beyond inputs and gradients"
    shown = {**{name: f"{most:,.0f}" for name, most in found.items()}, **absent}
    tables.append(Table(title, ("", "MiB"), list(shown.items())))


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
    most = 0

    def step() -> None:
        value = loss(h, w, labels, teacher_hidden=th, teacher_weight=w.detach())
        torch.autograd.grad(value, (h, w))
        assert value.isfinite()

    def measured() -> None:
        nonlocal most
        most = (peak(step) or 0) - h.nbytes - w.nbytes

    benchmark.pedantic(measured)  # type: ignore[no-untyped-call]
    assert most <= budget
    benchmark.extra_info["hundred_million"] = {"rows": rows, "classes": classes, "budget": budget, "peak": most}
    seconds = "" if benchmark.stats is None else f"{benchmark.stats.stats.median:.1f}"
    title = f"FusedLinearCUDLoss, {rows} x {classes:,}, D = 16, float32, in {budget >> 20} MiB"
    tables.append(Table(title, ("", "s", "peak MiB"), [(OURS, seconds, f"{most / 2**20:.0f}")]))
