"""Plans that were measured or asked for: the table, the environment variables; results do not depend on them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cudfast import CUDLoss, DUSLoss, Projection, backends
from cudfast.backends import tuning

CPU = torch.device("cpu")
with_cuda = pytest.mark.skipif(bool(backends.available()["cuda"]), reason="needs nvcc when cudfast is installed")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tuning.json"
    path.write_text("[]")
    monkeypatch.setattr(tuning, "TABLE", path)
    for name in ("triton", "cuda"):
        monkeypatch.delenv(tuning.variable(name), raising=False)
    for cache in (tuning.table, tuning._tuned):
        cache.cache_clear()
    yield path
    for cache in (tuning.table, tuning._tuned):
        cache.cache_clear()


def test_an_entry_holds_for_a_power_of_two_of_classes(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "backend": "triton",
        "target": "cpu",
        "loss": "student",
        "bytes": 2,
        "classes": 32768,
        "plan": {"block": 4096},
    }
    table.write_text(json.dumps([entry]))
    for classes, plan in ((16_384, {}), (16_385, {"block": 4096}), (32_768, {"block": 4096}), (32_769, {})):
        assert tuning.tuned("triton", CPU, "student", 2, classes) == plan
    for other in (("cuda", CPU, "student", 2), ("triton", CPU, "teacher", 2), ("triton", CPU, "student", 4)):
        assert tuning.tuned(*other, 32_000) == {}
    monkeypatch.setenv("CUDFAST_TRITON_PLAN", "warps=16,stages=3")
    assert tuning.tuned("triton", CPU, "student", 2, 32_000) == {"warps": 16, "stages": 3}
    monkeypatch.setenv("CUDFAST_TRITON_PLAN", "default")
    assert tuning.tuned("triton", CPU, "student", 2, 32_000) == {}


def test_the_table_of_the_package() -> None:
    for entry in json.loads(tuning.TABLE.read_text()):
        assert tuning.power(entry["classes"]) == entry["classes"]
        text = ",".join(f"{name}={value}" for name, value in entry["plan"].items())
        assert tuning.parsed(entry["backend"], text) == entry["plan"]
        assert entry["source"]


@pytest.mark.parametrize(
    ("backend", "text", "message"),
    [
        ("triton", "blocks=4096", "CUDFAST_TRITON_PLAN='blocks=4096': 'blocks' is none of block, warps, stages"),
        ("triton", "block=3000", "CUDFAST_TRITON_PLAN='block=3000': expected block to be one of 256, 512, 1024"),
        ("triton", "warps", "expected warps to be one of 1, 2, 4, 8, 16, 32"),
        ("cuda", "cluster=3", "CUDFAST_CUDA_PLAN='cluster=3': expected cluster to be one of 1, 2, 4, 8, 16"),
        ("cuda", "cluster=2,threads=1024", "expected threads to be one of 32, 64"),
    ],
)
def test_what_a_plan_cannot_be(
    table: Path, monkeypatch: pytest.MonkeyPatch, backend: str, text: str, message: str
) -> None:
    if backends.available()[backend]:
        pytest.skip("not built")
    monkeypatch.setenv(tuning.variable(backend), text)
    with pytest.raises(ValueError, match=message):
        CUDLoss(backend=backend)(torch.zeros(2, 8), torch.zeros(2, 8), torch.tensor([0, 1]))  # type: ignore[arg-type]


def results(backend: str) -> list[torch.Tensor]:
    """Of every kernel, on rows of a length that no block divides."""
    torch.manual_seed(0)
    found = []
    for v in (77, 5_003):
        x, t, y = torch.randn(5, v, requires_grad=True), 3 * torch.randn(5, v), torch.tensor([0, 1, -100, 3, 4])
        losses = [CUDLoss(backend=backend), CUDLoss(3.0, save="state", backend=backend)]  # type: ignore[arg-type]
        if v == 77:
            losses.append(CUDLoss(calibration=Projection(max_wrong_mass=0.05), backend=backend))  # type: ignore[arg-type]
        for value in (*(loss(x, t, y) for loss in losses), DUSLoss(backend=backend)(x, y)):  # type: ignore[arg-type]
            found += [value.detach(), *torch.autograd.grad(value, x)]
    return found


@pytest.mark.parametrize(
    ("backend", "plan"),
    [
        ("triton", "block=256,warps=1"),
        ("triton", "block=8192,warps=32,stages=3"),
        pytest.param("cuda", "threads=32", marks=with_cuda),
        pytest.param("cuda", "cluster=4,threads=128", marks=with_cuda),
        pytest.param("cuda", "cluster=16,threads=512", marks=with_cuda),
    ],
)
def test_a_plan_changes_no_result(table: Path, monkeypatch: pytest.MonkeyPatch, backend: str, plan: str) -> None:
    wanted = results("reference")
    monkeypatch.setenv(tuning.variable(backend), plan)
    for got, right in zip(results(backend), wanted):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_importing_the_package_reads_no_table() -> None:
    code = "import sys, cudfast; assert 'cudfast.backends.tuning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
