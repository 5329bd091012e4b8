"""What every benchmark shares: contestants timed in turns, the byte formula, the gate on correctness, the table.

No time is taken before the results were compared with float64, and all contestants of a race run in turns in the same
minutes, so that a machine whose speed drifts slows all of them alike.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from cudfast.backends import native

QUICK = os.environ.get("QUICK", "0") not in ("", "0")

Loss = Callable[..., Tensor]
Outcome = tuple[Tensor, Tensor]
"""Loss () and gradient (N, V)."""


@dataclass(frozen=True)
class Shape:
    """N rows of V classes, and who has them."""

    rows: int
    classes: int
    used_by: str = ""

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.classes:,}"


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Args:
        name: how the table calls it.
        call: what is timed.
        prepare: runs before each call, untimed.
        reads, writes: how many (N, V) matrices the work must read and write at least.
        every: it takes part in every so many rounds only; for peers far slower than the rest.
    """

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    reads: int = 2
    writes: int = 1
    every: int = 1

    def work(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes that must move: (reads + writes) * N * V * s, with s bytes an element."""
        return (self.reads + self.writes) * shape.rows * shape.classes * dtype.itemsize

    def seconds(self, warm: int) -> float:
        """Time of one call after `warm` untimed ones."""
        self.prepare()
        for _ in range(warm):
            self.call()
        start = time.perf_counter()
        result = self.call()
        end = time.perf_counter()
        del result  # freeing it is timed for nobody: pytest-benchmark does not, either
        return end - start


# ---- The gate ----


def truth(loss: Loss, logits: Tensor, *others: Tensor) -> Outcome:
    """`loss` and its gradient (N, V) in float64, for a loss that is a mean over rows.

    Args:
        loss: differentiable in plain PyTorch.
        logits: (N, V).
        others: (N, V) or (N,), what else the loss takes.
    """
    count, classes = logits.shape
    step = max(1, 2**24 // classes)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    gradient = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    for start in range(0, count, step):
        part = slice(start, start + step)
        x = logits[part].double().requires_grad_()
        value = loss(x, *(o[part].double() if o.is_floating_point() else o[part] for o in others))
        (slope,) = torch.autograd.grad(value, x)
        share = len(x) / count
        total += value.detach() * share
        gradient[part] = slope.mul_(share)
    return total, gradient


class Errors(NamedTuple):
    """Distances from the truth."""

    loss: float
    largest: float  # of the gradient, over its largest entry
    mean: float  # of the gradient, over its mean entry

    @classmethod
    def of(cls, got: Outcome, true: Outcome) -> Errors:
        distance = got[1].double().sub_(true[1]).abs_()
        size = true[1].abs()
        return cls(
            abs(float(got[0]) - float(true[0])),
            float(distance.max() / size.max()),
            float(distance.mean() / size.mean()),
        )


def gate(name: str, got: Outcome, true: Outcome, eager: Errors | None = None, temperature: float = 1.0) -> None:
    """Fails when `got` is further from the truth than both eager PyTorch and the rounding that float32 allows.

    A gradient in a shorter dtype may also be off by the rounding of its last bit.
    """
    value = abs(float(true[0]))
    rounding = max(2e-6, torch.finfo(got[1].dtype).eps / 2)
    allowed = Errors(2e-6 * max(1.0, temperature**2, value), rounding, rounding)
    errors = Errors.of(got, true)
    for what, error, bound, of_eager in zip(Errors._fields, errors, allowed, eager or allowed):
        if not error <= max(bound, of_eager):  # NaN fails, too
            raise AssertionError(f"{name}: {what} error {error:.2e}, allowed {bound:.2e}, of eager {of_eager:.2e}")


# ---- The race ----


@dataclass
class Table:
    """What the terminal shows of one benchmark."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    goals: list[tuple[str, ...]] = field(default_factory=list)


class Race:
    """Contestants of one benchmark, timed in turns; the first is the one that pytest-benchmark reports.

    Args:
        benchmark: its fixture; ratios and figures go into its extra_info.
        tables: where the table of this benchmark is appended.
    """

    def __init__(self, benchmark: BenchmarkFixture, tables: list[Table]) -> None:
        self._benchmark = benchmark
        self._tables = tables
        self.times: dict[str, float] = {}

    def run(
        self,
        title: str,
        shape: Shape,
        dtype: torch.dtype,
        contestants: Sequence[Contestant],
        *,
        floor: str,
        rounds: int,
        warm: int = 0,
        unit: str = "B",
    ) -> None:
        """Times everybody; `floor` names the contestant that only does the work that cannot be avoided, in units of
        `unit`: bytes that move, unless contestants count otherwise. `warm`: see `Contestant.seconds`."""
        ours, *peers = contestants
        for contestant in contestants:  # compiles, starts the threads
            contestant.seconds(1)
        taken: dict[str, list[float]] = {c.name: [] for c in contestants}
        order = random.Random(0)
        counter = iter(range(rounds + 1))

        def others() -> None:
            """Every peer of this round, in a new order each time: nobody always follows the same one."""
            turn = next(counter)
            for peer in order.sample(peers, len(peers)):
                if turn % peer.every == 0:
                    taken[peer.name].append(peer.seconds(warm))
            ours.prepare()
            for _ in range(warm):
                ours.call()

        self._benchmark.pedantic(ours.call, setup=others, rounds=rounds)  # type: ignore[no-untyped-call]
        if self._benchmark.stats is None:  # --benchmark-disable: the gate was all that was asked for
            return
        taken[ours.name] = list(self._benchmark.stats.stats.data)
        self.times = {name: statistics.median(values) for name, values in taken.items()}
        self._report(title, shape, dtype, contestants, floor, {name: len(v) for name, v in taken.items()}, unit)

    def _report(
        self,
        title: str,
        shape: Shape,
        dtype: torch.dtype,
        contestants: Sequence[Contestant],
        floor: str,
        rounds: dict[str, int],
        unit: str,
    ) -> None:
        ours = contestants[0]
        figures: dict[str, dict[str, float]] = {}
        for c in contestants:
            seconds, done = self.times[c.name], c.work(shape, dtype)
            figures[c.name] = {
                "median_ms": 1e3 * seconds,
                "rounds": rounds[c.name],
                "work": done,
                "rate": done / seconds / 1e9,
                "over_ours": seconds / self.times[ours.name],
                "over_floor": seconds / self.times[floor],
            }
        info: dict[str, Any] = {
            "rows": shape.rows,
            "classes": shape.classes,
            "dtype": str(dtype).removeprefix("torch."),
            "used_by": shape.used_by,
            "isa": native.isa(),
            "threads": torch.get_num_threads(),
            "floor": floor,
            "unit": unit,
            "contestants": figures,
            "goals": [],
        }
        self._benchmark.extra_info.update(info)
        size = ours.work(shape, dtype) / 1e6
        heading = f"{title}, {shape} {info['dtype']}: {size:,.4g} M{unit}, {info['isa']}, {info['threads']} threads"
        rows: list[tuple[str, ...]] = [
            (name, f"{f['median_ms']:,.3f}", f"{f['rate']:.2f}", f"{f['over_ours']:.2f}", f"{f['over_floor']:.2f}")
            for name, f in figures.items()
        ]
        header = ("", "median ms", f"G{unit}/s", f"/ {ours.name}", f"/ {floor}")
        note = f" ({shape.used_by})" if shape.used_by else ""
        self._tables.append(Table(heading + note, header, rows))

    def goal(self, over: str, under: str, required: float, aim: float | None, *, at_most: bool = False) -> None:
        """Shows time of `over` / time of `under` beside what it should be at least, or at most. Never fails."""
        if not self.times:
            return
        ratio = self.times[over] / self.times[under]
        sign = "<=" if at_most else ">="
        met = ratio <= required if at_most else ratio >= required
        self._tables[-1].goals.append(
            (
                f"{over} / {under}",
                f"{ratio:.2f}",
                f"{sign} {required:g}",
                f"{sign} {aim:g}" if aim is not None else "",
                "yes" if met else "NO",
            )
        )
        goal = {"over": over, "under": under, "ratio": ratio, "required": required, "aim": aim, "at_most": at_most}
        self._benchmark.extra_info["goals"].append(goal)
