"""The PTX of both GPU backends for sm_90, executed on a CPU: results against float64, and planted faults.

What tests/ptx interprets is what nvcc and Triton's compiler made; tests/test_ptx_machine.py tests the interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .ptx import launch
from .ptx.cases import CUDA, TRITON, Case, check
from .ptx.launch import Interpreter, Ran
from .ptx.machine import Launch
from .ptx.memory import HazardError
from .ptx.parse import Function, Module

LACKING = launch.lacking_cuda()
built = pytest.mark.skipif(bool(LACKING), reason=LACKING or "never")
# Instructions of a call's kernels that `make test` runs: some 15,000 a second.
MOST = 120_000


def parameters(cases: tuple[Case, ...]) -> list[Any]:
    return [pytest.param(case, id=case.title, marks=[pytest.mark.slow] if case.full else []) for case in cases]


@built
@pytest.mark.parametrize("case", parameters(CUDA))
def test_cuda(case: Case) -> None:
    interpret = Interpreter(case.seed)
    with launch.cuda(interpret, case.device):
        check(case, "cuda")
    rows = [ran for ran in interpret.ran if "RowKernel" in ran.kernel or "ProjectedKernel" in ran.kernel]
    assert {ran.cluster for ran in rows} == {case.cluster or 1}
    staged = ["Lb1E" in ran.kernel for ran in rows]
    assert any(staged) == (case.cluster > 0 and case.dtype.itemsize < 8 and case.save == "gradient")
    if not case.full:
        assert sum(ran.instructions for ran in interpret.ran) < MOST


class Notes(Interpreter):
    """Runs nothing."""

    def __call__(self, module: Module, suffix: str, launch: Launch) -> None:
        self.ran.append(Ran(suffix, *launch.grid, launch.threads, 0))


@built
def test_the_table_reaches_every_cuda_kernel() -> None:
    """By the end of its name; what `make test-all` adds are orders and sizes."""
    names = {name for text in launch._modules() for name in re.findall(r"\.entry (\S+)\(", text)}
    notes = Notes()
    for case in CUDA:
        if not case.full:
            with launch.cuda(notes, case.device), pytest.raises(AssertionError):  # nothing is written
                check(case, "cuda")
    missing = [name for name in names if not any(name.endswith(ran.kernel) for ran in notes.ran)]
    assert missing == []


# Triton kernels are either interpreted by Triton or compiled in a process, so this is another one.
GROUPS = 3
without_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton, whose compiler makes the PTX, is not installed"
)


def triton(numbers: list[int], *options: str) -> list[dict[str, Any]]:
    """What became of these calls."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ptx.cases", *options, *map(str, numbers)]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["case"] for line in lines] == [TRITON[i].title for i in numbers]
    return lines


def groups(full: bool) -> list[Any]:
    """Numbers of calls, of which each process runs some."""
    numbers = [i for i, case in enumerate(TRITON) if case.full == full]
    marks = [pytest.mark.slow] if full else []
    return [pytest.param(numbers[i::GROUPS], id=f"{'full ' * full}{i}", marks=marks) for i in range(GROUPS)]


@without_triton
@pytest.mark.parametrize("numbers", [*groups(False), *groups(True)])
def test_triton(numbers: list[int]) -> None:
    lines = triton(numbers)
    assert {line["case"]: line["wrong"] for line in lines if line["wrong"]} == {}
    for number, line in zip(numbers, lines):
        assert TRITON[number].full or sum(each["instructions"] for each in line["ran"]) < MOST


@without_triton
def test_removed_barriers_of_a_triton_kernel_are_found() -> None:
    (line,) = triton([2], "--without", "bar.sync")
    assert re.match("HazardError: a (read|write) (after|of) .*(without a barrier|not written)", line["wrong"])


# Faults that are planted: instructions of the student's kernel, left out.


def planted(case: Case, name: str, pick: slice) -> str:
    """What is found without these instructions; "" if nothing is."""

    def change(module: Module, entry: Function) -> Module:
        return module.without(*module.places(entry, name)[pick]) if "RowKernel" in entry.name else module

    interpret = Interpreter(case.seed)
    interpret.change = change
    try:
        with launch.cuda(interpret, case.device):
            check(case, "cuda")
    except (HazardError, AssertionError) as error:
        return str(error)
    return ""


@functools.cache
def count(name: str) -> int:
    """How many there are in the kernel of bf16 rows that are staged, at temperature 2."""
    suffix = "INS0_9RowKernelINS0_7StudentILi2ELi2EfEELb1EEEEEvT_i"
    module = launch._parsed(next(text for text in launch._modules() if suffix in text))
    return len(module.places(module.entry(suffix), name))


@built
def test_a_removed_wait_is_found() -> None:
    case = Case("copies", 600)
    assert planted(case, "nothing", slice(None)) == ""
    assert planted(case, "cp.async.wait", slice(None)).startswith("a read of a copy that was not waited for")
    assert planted(case, "cp.async.commit", slice(None)).startswith("a read of a copy that was not waited for")


@built
@pytest.mark.parametrize("seed", [None, 1])
def test_a_removed_cluster_barrier_is_found(seed: int | None) -> None:
    """Three of five, each by itself: the others order accesses of global memory, or are not reached."""
    case = Case("cluster", 1100, cluster=2, seed=seed)
    each = range(0, count("barrier.cluster."), 2)  # arrive and wait, one after the other
    found = [planted(case, "barrier.cluster.", slice(i, i + 2)) for i in each]
    assert sum("without a barrier" in what or "not written" in what for what in found) >= 3


@built
def test_a_removed_block_barrier_is_found() -> None:
    """All of them; and one of the first six by itself, which are those around a reduction."""
    case = Case("barriers", 600)
    assert "without a barrier" in planted(case, "bar.sync", slice(None))
    assert any("without a barrier" in planted(case, "bar.sync", slice(i, i + 1)) for i in range(6))


@built
@pytest.mark.slow
def test_how_many_removed_block_barriers_are_found() -> None:
    """Seven of 28: the others come after a barrier that does the same, or are not reached by these calls."""
    cases = [Case("barriers", 1100, cluster=c, seed=s) for c in (1, 2) for s in (None, 1)]
    barriers = [slice(i, i + 1) for i in range(count("bar.sync"))]
    found = [any(planted(case, "bar.sync", pick) for case in cases) for pick in barriers]
    assert sum(found) >= 7
