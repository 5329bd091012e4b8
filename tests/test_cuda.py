"""Features of the CUDA backend alone, in the emulation; and the machine code of its kernels."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from cudfast import CUDLoss, CUDOptions, DUSLoss, backends
from cudfast.functional import cud_loss
from cudfast.inspect import machine
from cudfast.inspect.info import describe, report

from .truth import cud_rows, dus_rows, gradient

f32, f64 = torch.float32, torch.float64
MISSING = backends.available()["cuda"]
built = pytest.mark.skipif(bool(MISSING), reason="needs nvcc when cudfast is installed")


@built
@pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16, torch.float16])
def test_rows_that_blocks_share(dtype: torch.dtype) -> None:
    """The emulated GPU has 4 processors: 3 rows of 40,000 classes are shared, 8 are not."""
    for n in (3, 8):
        student, teacher = torch.randn(n, 40_000).to(dtype), (3 * torch.randn(n, 40_000)).to(dtype)
        labels = torch.randint(40_000, (n,))
        labels[1] = -1
        teacher[2, [100, 39_999]] = 30.0  # a tie over blocks: the lowest index is the top-1
        exact = student.double().requires_grad_()
        kd, ce = cud_rows(exact, teacher.double(), labels)
        truth = kd.sum() / n + ce.sum() / (n - 1)
        true_gradient = gradient(truth, exact)
        tolerance = 1e-12 if dtype == f64 else 2e-6
        for save in ("gradient", "state"):
            x = student.clone().requires_grad_()
            loss, stats = CUDLoss(backend="cuda", save=save)(x, teacher, labels, return_stats=True)
            torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=tolerance)
            g = gradient(loss, x).double()
            torch.testing.assert_close(g, true_gradient, rtol=torch.finfo(dtype).eps, atol=tolerance)
            assert stats.teacher_top1[2] == 100
        labels[1] = 0
        x = student.clone().requires_grad_()
        exact = student.double().requires_grad_()
        truth = dus_rows(exact, labels).mean()
        loss = DUSLoss(backend="cuda")(x, labels)
        torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=tolerance)
        g, true_gradient = gradient(loss, x).double(), gradient(truth, exact)
        torch.testing.assert_close(g, true_gradient, rtol=torch.finfo(dtype).eps, atol=tolerance)


@built
def test_strides_and_padding() -> None:
    wide_student, wide_teacher = torch.randn(3, 9, 80), torch.randn(3, 9, 90)
    labels = torch.randint(60, (3, 8))
    for s, t in ((wide_student[:, :-1], wide_teacher[:, 1:]), (wide_student[:, 1:, :64], wide_teacher[:, :-1, :60])):
        found = []
        for a, b in ((s, t), (s.contiguous(), t.contiguous())):
            x = a.detach().requires_grad_()
            loss = cud_loss(x, b, labels, CUDOptions(backend="cuda", num_classes=60))
            found.append((loss, gradient(loss, x)))
        for got, wanted in zip(*found):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    with pytest.warns(UserWarning, match="it is copied once per call"):
        loss = CUDLoss(backend="cuda")(torch.randn(40, 8).t(), torch.randn(8, 40), torch.randint(40, (8,)))
    assert loss.isfinite()


@built
def test_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.choose.cache_clear()
    monkeypatch.setenv("CUDFAST_CUDA_EMULATE", "0")
    with pytest.raises(ValueError, match=r"^backend 'cuda' works on tensors on NVIDIA GPUs"):
        backends.choose("cuda", torch.device("cpu"))
    backends.choose.cache_clear()


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU")
def test_what_a_launch_needs_is_named() -> None:
    from cudfast.backends import cuda

    with pytest.raises(RuntimeError, match=r"^the CUDA device 0 cannot be used: "):
        cuda._cuda.parts(3, 40_000, 0)


@built
def test_compiled_without_new_numbers() -> None:
    teacher, labels = torch.randn(4, 300), torch.randint(300, (4,))
    loss = CUDLoss(backend="cuda")
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-3, 3, 1200).reshape(4, 300).requires_grad_()
        value = function(x, teacher, labels)
        found.append((value, gradient(value, x)))
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_without_nvcc() -> None:
    """As after an installation without nvcc: all else works, and info gives the reason why this does not."""
    script = """
import sys
sys.modules["cudfast._cuda"] = None
from cudfast.__main__ import main
main(["info"])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "backend cuda       missing: the CUDA kernels were not built when cudfast was installed" in run.stdout


@built
def test_info_names_the_architectures() -> None:
    found = report()
    assert found["ok"]
    assert "CUDA kernels for" in describe(found)


@built
def test_what_the_module_holds() -> None:
    """Code for every architecture that it names, and PTX of the last step: 75, 80 (copies) or 90 (clusters)."""
    from cudfast.backends.cuda import compiled

    listed = [machine.run("cuobjdump", option, str(compiled._cuda.__file__)) for option in ("-lelf", "-lptx")]
    code, text = (set(re.findall(r"\.sm_(\d+)\.(?:cubin|ptx)", names)) for names in listed)
    assert compiled._cuda.ARCHITECTURES.split() == sorted(code, key=int)
    newest = max(map(int, code))
    assert text == {str(max(step for step in (75, 80, 90) if step <= newest))}


@pytest.fixture(scope="module")
def machines() -> list[tuple[Any, str, str, Any]]:
    from cudfast.backends.cuda import compiled

    cases = itertools.product(compiled.VARIANTS, compiled.DTYPES, compiled.targets())
    return [(v, dtype, target, compiled.machine(v, dtype, target)) for v, dtype, target in cases
            if not v.staged or target != "sm_75"]  # fmt: skip


@built
def test_no_local_memory_and_at_most_128_registers(machines: list[tuple[Any, str, str, Any]]) -> None:
    for v, dtype, target, m in machines:
        assert m.stack == 0, (v.name, dtype, target)
        assert m.registers <= 128, (v.name, dtype, target)


@built
def test_the_search_for_a_target() -> None:
    """The kernels of a projection in float32, whatever the dtypes of the logits; and two dtypes in one call."""
    from cudfast.backends.cuda import compiled

    for target in compiled.targets():
        found = compiled.kernels_of("15ProjectedKernelIf", target)
        assert len(found) == 2, target
        for usage, _ in [*found, *compiled.kernels_of("7StudentILi0ELin1EfE", target)]:
            assert usage["STACK"] + usage["LOCAL"] == 0, target
            assert usage["REG"] <= 128, target
        for _, loops in found:
            assert {loop.narrowest for loop in loops} == {0, 16}, target  # 0: reads shared memory alone
            assert any(loop.exponentials == 4 * 8 for loop in loops), target  # the fold, over 8 columns


@built
def test_scales_rows_that_no_kernel_walks() -> None:
    """Leading axes out of order: PyTorch scales them, a factor a row."""
    plain, by = torch.randn(2, 3, 4, 5), torch.rand(24)
    gradient = plain.transpose(0, 2).contiguous().transpose(0, 2)
    got = backends.load("cuda").scale(gradient, by)  # type: ignore[union-attr]
    torch.testing.assert_close(got, plain * by.view(2, 3, 4, 1))


@built
def test_main_loops(machines: list[tuple[Any, str, str, Any]]) -> None:
    """A fold and a map; every access 16 bytes wide; the bytes and exponentials of the method per element."""
    for v, dtype, target, m in machines:
        what = (v.name, dtype, target, m.loops)
        fold, map_ = m.loops
        size = 4 if dtype == "fp32" else 2
        columns = 16 // size
        assert fold.narrowest == map_.narrowest == 16, what
        assert fold.bytes_read == 16 * v.arrays, what
        assert (fold.bytes_staged, map_.bytes_staged) == ((16 * v.arrays,) * 2 if v.staged else (0, 0)), what
        assert map_.bytes_read == (0 if v.staged else 16 * v.arrays), what
        assert (fold.bytes_written, map_.bytes_written) == (0, 16), what
        assert fold.exponentials + map_.exponentials == v.exponentials * columns, what


@built
def test_the_model_reads_a_long_row_once() -> None:
    """On an H100 a bf16 row of 128,256 classes is held by a cluster of 4 blocks; two sweeps read it twice."""
    from cudfast.backends.cuda import compiled
    from cudfast.inspect import gpu_model

    if not {"sm_80", "sm_90"} <= set(compiled.targets()):
        pytest.skip("CUDFAST_CUDA_ARCHS left one of them out")
    found = {e.kernel: e for e in gpu_model._cuda("bf16", 128_256, "H100")}
    assert found["CUDA student, staged by 4 blocks"].bytes_per_element == 6
    assert found["CUDA student, two sweeps"].bytes_per_element == 10
    assert "CUDA student, staged" in {e.kernel for e in gpu_model._cuda("bf16", 32_000, "A100")}
    assert not list(gpu_model._cuda("bf16", 32_000, "MI300X"))
