"""The checks of `make gpu-verify`, under the interpreter: that they pass here, and that they can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks import gpu_verify
from cudfast.backends.triton import student
from cudfast.bench.shapes import Shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_agrees(dtype: torch.dtype) -> None:
    gpu_verify.agrees(Shape(4, 300), dtype, "cpu")


def test_projection_agrees() -> None:
    gpu_verify.projection_agrees("cpu", 6, 700)


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


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = student.student_coefficients

    def wrong(*arguments: object) -> tuple[object, ...]:
        one, *rest = right(*arguments)
        return one * 1.001, *rest

    monkeypatch.setattr(student, "student_coefficients", wrong)
    line = gpu_verify.checked("wrong", lambda: gpu_verify.agrees(Shape(4, 300), torch.float32, "cpu"))
    assert "FAILED: AssertionError" in line.verdict


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_verify"])
    assert gpu_verify.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
