"""What is interpreted: calls of both GPU backends, held against the reference in float64.

    TRITON_INTERPRET=0 python -m tests.ptx.cases NUMBER...    those of TRITON; tests/test_ptx.py runs those of CUDA

Sizes are the smallest that reach a path: tests/test_ptx.py counts the instructions, which do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cudfast import ClassSets, CUDLoss, DUSLoss, Projection

from .launch import Device, Interpreter

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HEADER = 3392  # bytes of shared memory besides staged rows: csrc/cuda/grid.h


class Case(NamedTuple):
    """A call: the loss of n rows of v classes, and its gradient for an upstream of 2, or of a number for each row."""

    name: str
    v: int
    dtype: torch.dtype = bf16
    n: int = 2
    teacher: torch.dtype | None = None  # another dtype than the student's
    tau: float = 2.0  # 0: one for each row
    bounds: tuple[str, ...] = ()  # of a Projection
    layout: str = "dense"  # dense; shifted: rows begin within a line; apart: the teacher's elsewhere; padded
    save: str = "gradient"
    reduction: str = "mean"
    statistics: bool = False
    dus: bool = False
    cluster: int = 1  # blocks that hold a row; 0: it does not fit, two sweeps
    processors: int = 1
    seed: int | None = None  # warps one at a time, in random order
    full: bool = False  # `make test-all` alone

    @property
    def title(self) -> str:
        blocks = "" if self.cluster == 1 else f", {self.cluster} blocks" if self.cluster else ", two sweeps"
        order = "" if self.seed is None else f", order {self.seed}"
        layout = "" if self.layout == "dense" else f", {self.layout}"
        return f"{self.name}, {self.n} x {self.v} {str(self.dtype)[6:]}{layout}{blocks}{order}"

    @property
    def device(self) -> Device:
        """With the shared memory that makes `cluster` blocks hold a row."""
        if not self.cluster:
            return Device(self.processors, HEADER - 1)
        sizes = [self.dtype.itemsize, *([] if self.dus else [(self.teacher or self.dtype).itemsize])]
        width = 16 // sizes[0] if len(set(sizes)) == 1 and not self.bounds and self.teacher is None else 8
        slots = -(-((self.v + 2 * width - 2) // width) // self.cluster)
        return Device(self.processors, HEADER + slots * width * sum(sizes))


DTYPES = (f32, bf16, f16, f64)
ALL_BOUNDS = {"min_near_mass": 0.3, "max_wrong_mass": 0.1, "min_entropy": 3.0, "max_entropy": 4.0}
_MASSES = ("min_near_mass", "max_wrong_mass")

_EITHER = (
    *(Case("student", v, dtype) for dtype in DTYPES for v in (304, 301)),
    *(Case("teacher", 301, dtype, dus=True) for dtype in (bf16, f64)),
    Case("temperature 3", 304, tau=3.0),
    Case("a temperature a row", 304, tau=0.0, reduction="none"),
    Case("two dtypes", 302, teacher=f16),
    Case("statistics", 301, statistics=True),
    Case("state", 301, save="state", reduction="none"),
    Case("student", 301, layout="shifted"),
    Case("student", 301, layout="apart"),
    Case("student", 301, f16, layout="padded"),
    Case("ignored and unlabelled rows", 301, n=4),
    Case("masses", 304, bounds=_MASSES),
    Case("entropy", 304, f32, bounds=(*_MASSES, "min_entropy")),
)

CUDA = (
    *_EITHER,
    *(Case("student", 2500 if c == 8 else 1100, cluster=c, seed=s) for c in (2, 4, 8) for s in (None, 1)),
    *(Case("student", 1101, dtype, cluster=2, layout="shifted") for dtype in (f32, f16)),
    Case("student", 600, seed=1),
    Case("teacher", 600, f32, dus=True, seed=2),
    Case("student", 600, cluster=0, seed=3),
    *(Case("student", 303, dtype, cluster=0) for dtype in (f32, f16)),
    *(Case("temperature 3", 303, dtype, cluster=c, tau=3.0) for dtype in (f32, bf16, f16) for c in (0, 1)),
    *(Case("teacher", 303, dtype, cluster=c, dus=True) for dtype in (f32, bf16, f16) for c in (0, 1)),
    Case("two dtypes", 302, teacher=f32, cluster=0),
    Case("teacher", 1101, dus=True, cluster=2),
    Case("copies ahead", 20_483, n=1),
    Case("shared by 2 blocks", 32_801, n=1, cluster=0, processors=4),
    Case("masses", 1100, cluster=2, bounds=_MASSES),
    Case("entropy", 301, cluster=0, bounds=("min_entropy", "max_entropy")),
    Case("entropy", 300, f64, n=1, bounds=("min_near_mass", "min_entropy")),
    *(Case("student", v, dtype, cluster=c, seed=s, layout=layout, full=True)
      for v in (2500, 2507) for dtype in (f32, bf16, f16) for c in (0, 1, 2, 4, 8) for s in (None, 7)
      for layout in ("dense", "shifted")),
    *(Case("full size", v, cluster=c, full=True) for v, c in ((32_000, 1), (50_257, 1), (128_256, 4), (262_144, 8))),
    *(Case("entropy", 1100, dtype, cluster=c, seed=5, bounds=tuple(ALL_BOUNDS), full=True)
      for dtype in (f32, bf16) for c in (0, 1, 2, 4, 8)),
)  # fmt: skip

TRITON = (
    *_EITHER,
    Case("student", 1000, seed=1),
    Case("teacher", 600, f32, dus=True, seed=2),
    Case("several blocks", 5000, n=8),
    Case("shared by 2 programs", 16_400, n=1),
    *(Case("masses" if len(bounds) < 3 else "entropy", 600, bounds=bounds)  # no multiple of 16: threads repeat sums
      for bounds in (_MASSES, (*_MASSES, "min_entropy"))),
    *(Case("student", v, dtype, n=8, seed=s, full=True)
      for v in (77, 2048, 4097, 20_483) for dtype in DTYPES for s in (None, 7)),
    Case("teacher", 20_483, dus=True, seed=7, full=True),
    Case("entropy", 2512, bounds=tuple(ALL_BOUNDS), seed=7, full=True),
)  # fmt: skip


def _rows(values: Tensor, layout: str, teacher: bool) -> Tensor:
    """The values, where a layout has them."""
    before = {"shifted": 3, "apart": 5 if teacher else 3}.get(layout, 0)
    after = 2 if layout == "padded" and not teacher else before
    if before + after == 0:
        return values
    wide = torch.full((len(values), before + values.shape[1] + after), torch.nan, dtype=values.dtype)
    wide[:, before : before + values.shape[1]] = values
    return wide if layout == "padded" else wide[:, before : before + values.shape[1]]


def _batch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels: a class that is impossible to both, the teacher's top-1, a row without a label."""
    torch.manual_seed(0)
    teacher = (3 * torch.randn(case.n, case.v)).to(case.teacher or case.dtype)
    student = (0.5 * teacher.float() + 2 * torch.randn(case.n, case.v)).to(case.dtype)
    labels = torch.randint(6, case.v, (case.n,))
    student[0, 5] = teacher[0, 5] = -torch.inf
    labels[0] = (student if case.dus else teacher)[0].argmax()
    if case.n > 2:
        labels[1:3] = torch.tensor([-1 if not case.dus else -100, -100])
    return student, teacher, labels


def _call(case: Case, backend: str) -> tuple[Tensor, ...]:
    """The loss and its gradient; the reference computes in float64, from the same numbers."""
    student, teacher, labels = _batch(case)
    exact = backend == "reference"
    x = _rows(student.double() if exact else student, case.layout, False).detach().requires_grad_()
    t = _rows(teacher.double() if exact else teacher, case.layout, True)
    common: dict[str, Any] = {"backend": backend, "save": case.save, "reduction": case.reduction}
    if case.dus:
        loss = DUSLoss(**common)(x, labels)
    else:
        if case.bounds:
            near = ClassSets.from_groups(torch.arange(case.v) // 4)
            given = {name: ALL_BOUNDS[name] for name in case.bounds}
            common["calibration"] = Projection(near=near, on_infeasible="relax", **given)
        if case.layout == "padded":
            common["num_classes"] = case.v
        tau = torch.linspace(1.5, 4, case.n) if case.tau == 0 else case.tau
        loss = CUDLoss(**common)(x, t, labels, temperature=tau, return_stats=case.statistics)
    loss, *more = loss if case.statistics else (loss,)
    upstream = torch.linspace(-1, 2, case.n) if loss.dim() else torch.tensor(2.0)
    (gradient,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
    return loss.detach(), gradient, *(v for each in more for v in each if isinstance(v, Tensor))


def check(case: Case, backend: str) -> None:
    """Raises an AssertionError where a result is further from the reference than the suite allows."""
    found, truth = _call(case, backend), _call(case, "reference")
    tolerance = 1e-12 if case.dtype == f64 else 2e-6
    torch.testing.assert_close(found[1].double(), truth[1], rtol=torch.finfo(case.dtype).eps, atol=tolerance)
    for got, wanted in zip((found[0], *found[2:]), (truth[0], *truth[2:]), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def main(arguments: list[str]) -> None:
    """Runs Triton calls and prints a line of JSON for each."""
    from . import launch

    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="+", type=int, help="which of TRITON")
    parser.add_argument("--without", help="leave out instructions that begin like this")
    asked = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    interpret = Interpreter()
    if asked.without:
        interpret.change = lambda module, entry: module.without(*module.places(entry, asked.without))
    launch.triton(interpret)
    for case in (TRITON[i] for i in asked.numbers):
        interpret.seed = case.seed
        interpret.ran.clear()
        wrong = ""
        try:
            check(case, "triton")
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        ran = [each._asdict() for each in interpret.ran]
        print(json.dumps({"case": case.title, "wrong": wrong, "ran": ran}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
