"""The checks of `make gpu-verify`, under the interpreter: that they pass here, and that they can fail."""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks import gpu_verify
from cudfast import backends
from cudfast.backends.triton import student
from cudfast.bench.shapes import Shape
from cudfast.options import BackendName

from .conftest import BUILT

H100 = gpu_verify.Chip(132, 227 << 10, (1, 2, 4, 8))
EMULATED = gpu_verify.Chip(4, 227 << 10, (1, 2, 4, 8))  # csrc/cuda/run.h
with_cuda = pytest.mark.skipif(bool(backends.available()["cuda"]), reason="needs nvcc when cudfast is installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_agrees(dtype: torch.dtype) -> None:
    gpu_verify.agrees(Shape(4, 300), dtype, "cpu")


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=with_cuda)])
def test_projection_agrees(backend: str) -> None:
    gpu_verify.projection_agrees("cpu", backend, 6, 700)


def test_the_other_checks() -> None:
    lines = [
        gpu_verify.checked("ops", lambda: gpu_verify.ops_check("cpu")),
        gpu_verify.checked("graph", lambda: gpu_verify.captures("cpu")),
        gpu_verify.checked("broken", lambda: 1 / 0),  # type: ignore[arg-type, return-value]
    ]
    assert [line.verdict for line in lines] == [
        "ok",
        "left out: needs CUDA",
        "FAILED: ZeroDivisionError: division by zero",
    ]
    times = [gpu_verify.Time("2 x 3", "bfloat16", "given gradient", 0.5, 1234.0, 0.8, 2_000_000)]
    text = gpu_verify.markdown({"device": "none"}, lines, times)
    assert text.startswith("# gpu-verify: 3 checks, 1 failed\n\n- device: none\n")
    assert "| 2 x 3 | bfloat16 | given gradient | 0.500 | 1234 | 80% | 2 |" in text


def break_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    right = student.student_coefficients

    def wrong(*arguments: object) -> tuple[object, ...]:
        one, *rest = right(*arguments)
        return one * 1.001, *rest

    monkeypatch.setattr(student, "student_coefficients", wrong)


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    break_coefficients(monkeypatch)
    line = gpu_verify.checked("wrong", lambda: gpu_verify.agrees(Shape(4, 300), torch.float32, "cpu"))
    assert "FAILED: AssertionError" in line.verdict


@with_cuda
@pytest.mark.parametrize("dtype", gpu_verify.LAID_OUT)
def test_layouts_are_what_they_say(dtype: torch.dtype) -> None:
    """As the model lays rows out; and whether rows are shared, as the kernels' host code says."""
    from cudfast.backends import cuda
    from cudfast.inspect import gpu_model

    if "90" not in cuda.ARCHITECTURES.split():
        pytest.skip("needs the kernels of sm_90")
    name = {4: "fp32", 2: "bf16"}[dtype.itemsize]
    for blocks, (what, shape) in zip((1, 2, 4, 8), gpu_verify.layouts(H100, dtype)):
        assert what == f"rows held by {blocks} block{'s' * (blocks > 1)}"
        for classes in (shape.classes, shape.classes + 1):
            kernels = {e.kernel for e in gpu_model._cuda(name, classes, "H100")}
            assert "CUDA student, staged" + (f" by {blocks} blocks" if blocks > 1 else "") in kernels
    *_, (two_sweeps, swept), (shared, _) = gpu_verify.layouts(H100, dtype)
    assert (two_sweeps, shared) == ("rows in two sweeps", "rows shared by blocks")
    assert not any("student, staged" in e.kernel for e in gpu_model._cuda(name, swept.classes, "H100"))
    for what, shape in gpu_verify.layouts(EMULATED, dtype):
        parts = cuda._cuda.parts(shape.rows, shape.classes, -1)
        assert parts > 1 if what == shared else parts == 1, what
    assert [what for what, _ in gpu_verify.layouts(gpu_verify.Chip(40, 64 << 10, ()), dtype)] == [two_sweeps, shared]


@with_cuda
def test_rows_held_by_a_cluster_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the emulation; and a kernel that is wrong, or not the same twice, is found."""
    shape = dict(gpu_verify.layouts(EMULATED, torch.float32))["rows held by 2 blocks"]
    assert gpu_verify.laid_out(shape, torch.float32, "cpu") is None
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
            gpu_verify.laid_out(Shape(2, 300), torch.float32, "cpu")


def test_what_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_verify, "ours", lambda device: {"triton": "", "cuda": ""})
    monkeypatch.setattr(gpu_verify.Chip, "here", lambda: H100)
    names = [what for what, _ in gpu_verify.checks("cuda")]
    assert len(set(names)) == len(names)
    for dtype in ("float32", "bfloat16"):
        held = [f"rows held by {n}" for n in ("1 block", "2 blocks", "4 blocks", "8 blocks")]
        for what in (*held, "rows in two sweeps", "rows shared by blocks"):
            assert any(name.startswith(f"cuda: {what},") and name.endswith(dtype) for name in names), what
        for backend in ("triton", "cuda"):
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
                assert f"{backend}: compute-sanitizer {tool}, {dtype}" in names
    monkeypatch.setattr(gpu_verify, "ours", lambda device: {"triton": "", "cuda": "no nvcc"})
    left_out = [gpu_verify.checked(what, run) for what, run in gpu_verify.checks("cuda") if what.startswith("cuda")]
    assert [(line.what, line.verdict) for line in left_out] == [("cuda", "left out: no nvcc")]


@pytest.mark.parametrize(
    ("says", "code", "verdict"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "ok"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, "FAILED: AssertionError: ==="),
        ("========= ERROR SUMMARY: 3 errors", 9, "FAILED: AssertionError: ==="),
        ("Target application terminated before first instrumented API call", 0, "FAILED: AssertionError: Target"),
    ],
)
def test_a_sanitizer_is_believed_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int, verdict: str
) -> None:
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        f"#!/bin/sh\necho \"$PYTORCH_NO_CUDA_MEMORY_CACHING $@\" >{tmp_path}/asked\necho '{says}'\nexit {code}\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    line = gpu_verify.checked("it", lambda: gpu_verify.sanitized("racecheck", "cuda", "bfloat16"))
    assert line.verdict.startswith(verdict)
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith(f"1 --tool racecheck --error-exitcode 9 {sys.executable} -c ")
    assert asked.endswith("from benchmarks import gpu_verify; gpu_verify.watched('cuda', 'bfloat16')\n")


@pytest.mark.parametrize("name", [name for name in BUILT if name in ("triton", "cuda")])
def test_what_a_sanitizer_watches(name: BackendName) -> None:
    gpu_verify.walk(name, torch.bfloat16, "cpu", [Shape(3, 77)])


def report_of(
    monkeypatch: pytest.MonkeyPatch, folder: Path, found: list[gpu_verify.Check], *options: str
) -> tuple[int, dict[str, Any]]:
    """`main` on a GPU that is not there, whose every race takes a millisecond."""
    gpu = types.SimpleNamespace(name="Some GPU", total_memory=80 << 30)
    time = gpu_verify.Time("2 x 3", "bfloat16", "triton, given gradient", 1.0, 1.0, 1.0, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(gpu_verify, "checks", lambda device: iter(found))
    monkeypatch.setattr(gpu_verify, "race", lambda *arguments: iter([time]))
    monkeypatch.setattr("sys.argv", ["gpu_verify", "--out", str(folder), *options])
    code = gpu_verify.main()
    return code, json.loads((folder / "report.json").read_text())


def test_times_of_right_kernels_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def agrees() -> None:
        gpu_verify.agrees(Shape(4, 300), torch.float32, "cpu")

    found: list[gpu_verify.Check] = [("right", lambda: None), ("agrees", agrees), ("away", lambda: "left out: no nvcc")]
    code, report = report_of(monkeypatch, tmp_path, found)
    assert code == 0
    assert len(report["times"]) == 2 * len(gpu_verify.RACES) - 4  # the largest do not fit
    assert "1.000 ms" in capsys.readouterr().out
    for options, names in (("--no-times",), ["right", "agrees", "away"]), (("--only", "agr"), ["agrees"]):
        code, report = report_of(monkeypatch, tmp_path, found, *options)
        assert (code, report["times"]) == (0, [])
        assert [line["what"] for line in report["checks"]] == names
    capsys.readouterr()
    break_coefficients(monkeypatch)
    for checks in (found, found[2:], []):
        code, report = report_of(monkeypatch, tmp_path, checks)
        assert (code, report["times"]) == (1, [])
        assert "ms" not in capsys.readouterr().out
        assert "| 2 x 3 |" not in (tmp_path / "report.md").read_text()


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_verify"])
    assert gpu_verify.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
