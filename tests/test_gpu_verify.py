"""The checks of gpu_verify, under the interpreter and the emulation: that they pass here, and that they can fail."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks.gpu import checks, kernels, place
from benchmarks.gpu.report import Log
from benchmarks.gpu.steps import Item, run_item
from cudfast import backends
from cudfast.backends.triton import student
from cudfast.bench.shapes import Shape
from cudfast.options import BackendName

from .conftest import BUILT

H100 = place.Chip(132, 227 << 10, (1, 2, 4, 8))
with_cuda = pytest.mark.skipif(bool(backends.available()["cuda"]), reason="needs nvcc when cudfast is installed")
BACKENDS = ["triton", pytest.param("cuda", marks=with_cuda)]


def verdict(folder: Path, check: Callable[[], str | None]) -> str:
    """Of a check that is run as a step."""
    log = Log(folder, echo=False)
    run_item("step", Item("it", lambda log: check()), log)
    return str(log.records[-1]["verdict"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_agrees(dtype: torch.dtype, backend: str) -> None:
    checks.agrees(Shape(4, 300), dtype, "cpu", backend)


@with_cuda
def test_the_cuda_kernels_agree() -> None:
    checks.projection_agrees("cpu", "cuda", 16, 700)
    checks.options_agree("cpu", "cuda", 16, 700)
    checks.entropy_repeats("cpu", "cuda", Shape(4, 333))
    assert checks.compiles("cpu", "cuda", "aot_eager") is None


def test_the_triton_kernels_agree() -> None:
    checks.projection_agrees("cpu", "triton", 8, 300)
    checks.options_agree("cpu", "triton", 8, 77)
    checks.entropy_repeats("cpu", "triton", Shape(2, 77))


def test_checks_without_test_packages() -> None:
    """A machine with a GPU may have PyTorch and Triton alone; importing pytest's helpers would fail there."""
    code = """
import sys
for name in ("pytest", "expecttest", "hypothesis", "rich", "matplotlib", "pytest_benchmark"):
    sys.modules[name] = None
from benchmarks import gpu_verify
from benchmarks.gpu import checks, kernels, plan, warm
checks.ops_check("cpu", "reference")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_what_a_failure_says(tmp_path: Path) -> None:
    assert verdict(tmp_path, lambda: checks.captures("cpu", "triton")) == "left out: needs CUDA"
    assert verdict(tmp_path, lambda: None) == "ok"
    wrong = verdict(tmp_path, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert wrong == "FAILED: ZeroDivisionError: division by zero"


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = student.student_coefficients

    def wrong(*arguments: object) -> tuple[object, ...]:
        one, *rest = right(*arguments)
        return one * 1.001, *rest

    monkeypatch.setattr(student, "student_coefficients", wrong)
    found = verdict(tmp_path, lambda: checks.agrees(Shape(4, 300), torch.float32, "cpu", "triton"))
    assert "FAILED: AssertionError" in found


@with_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_are_what_they_say(dtype: torch.dtype) -> None:
    """As the model lays rows out; and whether rows are shared, as the kernels' host code says."""
    from cudfast.backends import cuda
    from cudfast.inspect import gpu_model

    if "90" not in cuda.ARCHITECTURES.split():
        pytest.skip("needs the kernels of sm_90")
    name = {4: "fp32", 2: "bf16"}[dtype.itemsize]
    for blocks, (what, shape) in zip((1, 2, 4, 8), place.layouts(H100, dtype)):
        assert what == f"rows held by {blocks} block{'s' * (blocks > 1)}"
        for classes in (shape.classes, shape.classes + 1):
            found = {e.kernel for e in gpu_model._cuda(name, classes, "H100")}
            assert "CUDA student, staged" + (f" by {blocks} blocks" if blocks > 1 else "") in found
    *_, (two_sweeps, swept), (shared, _) = place.layouts(H100, dtype)
    assert (two_sweeps, shared) == ("rows in two sweeps", "rows shared by blocks")
    assert not any("student, staged" in e.kernel for e in gpu_model._cuda(name, swept.classes, "H100"))
    for what, shape in place.layouts(place.EMULATED, dtype):
        parts = cuda._cuda.parts(shape.rows, shape.classes, -1)
        assert parts > 1 if what == shared else parts == 1, what
    assert [what for what, _ in place.layouts(place.Chip(40, 64 << 10, ()), dtype)] == [two_sweeps, shared]


@with_cuda
def test_rows_held_by_a_cluster_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the emulation; and a kernel that is wrong, or not the same twice, is found."""
    shape = dict(place.layouts(place.EMULATED, torch.float32))["rows held by 2 blocks"]
    assert checks.laid_out(shape, torch.float32, "cpu") is None
    backend = backends.load("cuda")
    right = backend.row_state
    for bad, message in ((range(1, 30), "error"), ([8], "two runs gave different bits")):  # 8: the student loss again
        calls = itertools.count(1)

        def wrong(*arguments: Any, gradient: torch.Tensor | None, **rest: Any) -> object:
            found = right(*arguments, gradient=gradient, **rest)
            if gradient is not None and next(calls) in bad:  # noqa: B023
                gradient[0] *= 1.001
            return found

        monkeypatch.setattr(backend, "row_state", wrong)
        with pytest.raises(AssertionError, match=message):
            checks.laid_out(Shape(2, 300), torch.float32, "cpu")


def gpu_without_one(**missing: str) -> place.Place:
    """An H100 of which only the names of the checks are asked for."""

    class There(place.Place):
        def missing(self) -> dict[BackendName, str]:
            return {"cuda": missing.get("cuda", ""), "triton": missing.get("triton", "")}

    return There("cuda", 80 << 30, place.HostClock(), H100)


def test_what_is_checked() -> None:
    here = gpu_without_one()
    found: dict[BackendName, list[str]] = {"cuda": [], "triton": []}
    for backend, names in found.items():
        names += [item.what for item in checks.items(here, backend)]
        assert len(set(names)) == len(names)
        for what in ("opcheck", "CUDA graph", "torch.compile(fullgraph=True)", "calibration=Projection(...)"):
            assert what in names
        for dtype in ("float32", "bfloat16", "float16"):
            assert sum(name.endswith(f"torch.{dtype}") and name[0].isdecimal() for name in names) == 6
        assert "a bound on the entropy, twice, 64 x 128,255" in names  # not divisible by 16
    for dtype in ("float32", "bfloat16"):
        held = [f"rows held by {n}" for n in ("1 block", "2 blocks", "4 blocks", "8 blocks")]
        for what in (*held, "rows in two sweeps", "rows shared by blocks"):
            assert any(name.startswith(f"{what},") and name.endswith(dtype) for name in found["cuda"]), what
    (item,) = checks.items(gpu_without_one(cuda="no nvcc"), "cuda")
    assert (item.what, item.run(None), item.proves) == ("cuda", "left out: no nvcc", False)  # type: ignore[arg-type]
    rest = [item.what for item in checks.every_dtype(here, "cuda")]
    assert {"16 x 1,000,000 torch.bfloat16", "512 x 1 torch.float32", "512 x 77 float64"} <= set(rest)


@pytest.mark.parametrize("name", [name for name in BUILT if name in ("triton", "cuda")])
def test_what_a_sanitizer_watches(name: BackendName) -> None:
    kernels.every_kernel(name, torch.bfloat16, "cpu", [Shape(10 if name == "cuda" else 3, 77)])


def test_all_rows_but_eight_are_ignored() -> None:
    for rows in (1, 8, 265):
        labels = kernels.labels_of(Shape(rows, 50), "cpu")
        assert (labels >= 0).sum() == min(8, rows)
        assert labels[0] >= 0
        assert labels[-1] >= 0
        assert labels.min() == -100 or rows <= 8
