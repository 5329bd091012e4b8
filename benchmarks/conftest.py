"""Collects bench_*.py and shows what they found."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .measure import Race, Table

_TABLES = pytest.StashKey[list[Table]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLES] = []
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture
def race(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Race:
    return Race(benchmark, request.config.stash[_TABLES])


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> list[Table]:
    return request.config.stash[_TABLES]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they must be; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for table in config.stash[_TABLES]:
        terminalreporter.section(table.title, sep="-", bold=True)
        for line in _aligned([table.header, *table.rows]):
            terminalreporter.write_line(line)
        if table.goals:
            terminalreporter.write_line("")
            for line in _aligned([("ratio", "measured", "required", "aim", "met"), *table.goals]):
                terminalreporter.write_line(line)
