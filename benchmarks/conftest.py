"""Collects bench_*.py, races contestants, and shows what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from cudfast.bench.command import peak_of, show
from cudfast.bench.contestants import Contestant
from cudfast.bench.race import BUDGET, Race
from cudfast.bench.result import Result, Table, machine
from cudfast.bench.shapes import Shape

from .rounds import QUICK

Goal = tuple[str, str, float, float | None]
"""Time of the first over time of the second: required, and aimed at."""

_TABLES = pytest.StashKey[list[Table]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLES] = []
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(0))


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info["cudfast"] = machine()


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> list[Table]:
    return request.config.stash[_TABLES]


class Runner:
    """Runs a race under pytest-benchmark, which reports the first contestant; the result goes into its extra_info."""

    def __init__(self, benchmark: BenchmarkFixture, tables: list[Table]) -> None:
        self._benchmark = benchmark
        self._tables = tables

    def __call__(
        self,
        title: str,
        shape: Shape,
        dtype: torch.dtype,
        contestants: Iterable[Contestant],
        *,
        floor: str,
        rounds: int,
        warm: int = 0,
        unit: str = "B",
        absent: Mapping[str, str] | None = None,
        at_least: Iterable[Goal] = (),
        at_most: Iterable[Goal] = (),
        memory: bool = True,
        more_at_most: Callable[[Result], Iterable[Goal]] = lambda result: (),
    ) -> Result | None:
        """Times all contestants, then measures their memory.

        `rounds`: the largest number; fewer if BUDGET seconds are over earlier. `more_at_most`: goals that follow from
        the result. Returns None under --benchmark-disable, which only runs the gate.
        """
        race = Race(list(contestants), warm=warm)
        ours = race.contestants[0]
        rounds = race.fit(rounds, BUDGET / 4 if QUICK else BUDGET)
        self._benchmark.pedantic(ours.call, setup=race.others, rounds=rounds)  # type: ignore[no-untyped-call]
        if self._benchmark.stats is None:
            return None
        race.seconds[ours.name] = list(self._benchmark.stats.stats.data)
        peaks = {c.name: peak_of(c) for c in race.contestants} if memory else {}
        result = Result.of(title, race, shape, dtype, floor, peaks=peaks, absent=absent or {}, unit=unit)
        for goal in at_least:
            result.goal(*goal, at_most=False)
        for goal in (*at_most, *more_at_most(result)):
            result.goal(*goal, at_most=True)
        self._benchmark.extra_info["race"] = result.to_json()
        self._tables.append(result.table())
        return result


@pytest.fixture
def race(benchmark: BenchmarkFixture, tables: list[Table]) -> Runner:
    return Runner(benchmark, tables)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    console = Console(width=200)
    with console.capture() as shown:
        for table in config.stash[_TABLES]:
            show(table, console)
    terminalreporter.write(shown.get())
