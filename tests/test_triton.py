"""Features of the Triton backend alone: shared rows, inputs that the host does not read. Under the interpreter."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from cudfast import CUDLoss, CUDOptions, DUSLoss, Projection
from cudfast import backends as all_backends
from cudfast.backends import triton as backend
from cudfast.backends.triton import launch, search
from cudfast.functional import cud_loss

from .test_temperature import awkward
from .truth import cud_rows, dus_rows, gradient

f32, f64 = torch.float32, torch.float64
pytestmark = pytest.mark.skipif(not backend.interpreted(), reason="needs TRITON_INTERPRET=1")


def batch(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(n, v).to(dtype), (3 * torch.randn(n, v)).to(dtype)
    labels = torch.randint(v, (n,))
    labels[0] = teacher[0].argmax()
    labels[1:3] = torch.tensor([-100, -1])
    return student, teacher, labels


@pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [5_000, 20_483])
def test_rows_that_programs_share(monkeypatch: pytest.MonkeyPatch, v: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    student, teacher, labels = batch(4, v, dtype)
    parts = launch.plan(4, v, dtype == f64, 4).parts
    assert parts == ({5_000: 2, 20_483: 4} if dtype == f64 else {5_000: 1, 20_483: 2})[v]
    teacher[3, [100, v - 1]] = 30.0  # a tie over parts: the lowest index is the top-1
    for tau in (2.0, 3.0):
        found = []
        for save in ("gradient", "state"):
            x = student.clone().requires_grad_()
            loss, stats = CUDLoss(tau, backend="triton", save=save)(x, teacher, labels, return_stats=True)
            (2 * loss).backward()
            found.append((loss, x.grad))
            assert stats.teacher_top1[3] == 100
        exact = student.double().clone().requires_grad_()
        kd, ce = cud_rows(exact, teacher.double(), labels, tau=tau)
        truth = kd.sum() / 3 + ce.sum() / 2
        true_gradient = gradient(2 * truth, exact)
        for loss, g in found:
            assert g is not None
            tolerance = 1e-12 if dtype == f64 else 2e-6
            torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(g.double(), true_gradient, rtol=torch.finfo(dtype).eps, atol=tolerance)
    x = student.clone().requires_grad_()
    labels[2] = 0
    loss = DUSLoss(backend="triton")(x, labels)
    truth = dus_rows(student.double(), labels).sum() / 3
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)
    exact = student.double().clone().requires_grad_()
    true_gradient = gradient(dus_rows(exact, labels).sum() / 3, exact)
    torch.testing.assert_close(gradient(loss, x).double(), true_gradient, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_shared_rows_overwrite_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    student, teacher, labels = batch(3, 20_000, f32)
    x = student.clone().requires_grad_()
    wanted = gradient(CUDLoss(backend="triton")(x, teacher, labels), x)
    given = torch.full_like(student, torch.nan)
    x = student.clone().requires_grad_()
    cud_loss(x, teacher, labels, CUDOptions(backend="triton"), grad_out=given).backward()
    assert torch.equal(given, wanted)
    inplace = student.clone().requires_grad_() * 1
    CUDLoss(backend="triton", inplace=True)(inplace, teacher, labels).backward()
    assert torch.equal(inplace.detach(), wanted)


@pytest.mark.parametrize("dtype", [f32, torch.float16, f64])
def test_a_kept_gradient_is_scaled(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    for shape in ((3, 50), (2, 3, 33), (2, 20_000)):
        gradient = torch.randn(shape).to(dtype)
        gradient[0] = 0
        for upstream in (torch.tensor(1.0), torch.tensor(-0.5), torch.tensor(torch.inf), torch.rand(shape[:-1])):
            by = upstream.to(dtype) if upstream.dim() == 0 else upstream.to(dtype).unsqueeze(-1)
            wanted = torch.where(gradient == 0, gradient, gradient * by)
            got = backend.scale(gradient.clone(), upstream.to(dtype))
            torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_plans() -> None:
    """One block size for all that share V's power of two, whatever N is; a part is whole blocks and never empty."""
    for wide in (False, True):
        for v in (1, 77, 1000, 32_000, 50_257, 128_256, 2_812_281, 10**8, 10**9):
            blocks = {launch.plan(n, v, wide, 132).block for n in (1, 7, 512, 100_000)}
            assert len(blocks) == 1
            for n in (1, 7, 200, 512, 100_000):
                plan = launch.plan(n, v, wide, 132)
                assert plan.chunk % plan.block == 0
                assert (plan.parts - 1) * plan.chunk < v <= plan.parts * plan.chunk
                assert plan.parts == 1 or (n < 264 and plan.chunk >= 4 * plan.block)
    assert launch.plan(1, 10**8, False, 132).parts > 132


@pytest.mark.parametrize("label", [21, -7])
def test_a_label_that_is_no_class_makes_its_row_nan_under_a_projection(label: int) -> None:
    student, teacher, _ = batch(4, 21, f64)
    labels = torch.tensor([1, label, 2, 3])
    bounded = CUDOptions(
        reduction="none", backend="triton", calibration=Projection(min_near_mass=0.5, on_infeasible="relax")
    )
    for far in (labels, torch.where(labels == label, 10**11, labels)):
        assert cud_loss(student, teacher, far, bounded).isnan().tolist() == [False, True, False, False]


def test_maxima_of_pairs_are_those_of_each() -> None:
    """On a device both maxima come from one reduction; the interpreter takes them apart to be fast."""
    code = """
import torch, triton, triton.language as tl
from cudfast.backends.triton import pieces
pieces.PAIRS = tl.constexpr(True)

@triton.jit
def both(x, y, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    a, b = pieces.largest_of_both(tl.load(x + lanes), tl.load(y + lanes))
    tl.store(out, a)
    tl.store(out + 1, b)

x, y, out = torch.randn(64), torch.randn(64), torch.zeros(2)
both[(1,)](x, y, out, BLOCK=64)
assert out.tolist() == [x.max(), y.max()]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_the_cpu_it_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    all_backends.choose.cache_clear()
    assert all_backends.choose("auto", torch.device("cpu")) is all_backends.load("native")
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"backend 'triton' works on GPU tensors \(and on CPU tensors when TRITON_INT"):
        all_backends.choose("triton", torch.device("cpu"))
    all_backends.choose.cache_clear()


def test_a_gpu_takes_triton_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    found = types.SimpleNamespace(name="Some GPU", major=9, minor=0)
    module = types.SimpleNamespace(get_device_properties=lambda device: found)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    all_backends.choose.cache_clear()
    assert all_backends.choose("auto", cuda) is backend
    monkeypatch.setattr(
        all_backends, "load", lambda name: "triton is not installed; ..." if name == "triton" else backend
    )
    all_backends.choose.cache_clear()
    with pytest.warns(RuntimeWarning, match="CUDA tensors go through the reference backend.*: triton is not installed"):
        assert all_backends.choose("auto", cuda) is backend
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: triton is not installed"):
        all_backends.choose("triton", cuda)
    all_backends.choose.cache_clear()


@pytest.mark.parametrize(
    ("version", "message"), [(None, "triton is not installed"), ("3.1.0", "triton 3.1.0 is too old: 3.4 or newer")]
)
def test_without_a_good_triton(version: str | None, message: str) -> None:
    code = f"""
import sys, types, cudfast
sys.modules["triton"] = types.SimpleNamespace(__version__={version!r}) if {version!r} else None
print(cudfast.backends.load("triton"))
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert message in found.stdout


@pytest.mark.parametrize("name", ["min_entropy", "max_entropy"])
def test_four_temperatures_a_sweep(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Several places per sweep, which only a row in thousands needs, in every sweep except the first ones."""
    monkeypatch.setattr(search, "STEPS", 3)
    teacher, labels = awkward(300, 12), torch.randint(300, (12,))
    asked: dict[str, Any] = {"min_near_mass": 0.2, "max_wrong_mass": 0.3, "on_infeasible": "relax"}

    def loss(backend: str, **bound: Any) -> Tensor:
        options = CUDOptions(
            temperature=1.0,
            kd_weight=1.0,
            ce_weight=0.0,
            calibration=Projection(**asked, **bound),
            backend=backend,
            reduction="none",
        )
        return cud_loss(torch.zeros(12, 300, dtype=f64), teacher, labels, options)

    free, end = (math.log(300) - loss("native", **bound) for bound in ({}, {name: 2.0}))
    wanted = (free + (end - free) * torch.rand(12, dtype=f64)).clamp(min=0)
    entropies = math.log(300) - loss("triton", **{name: wanted})
    torch.testing.assert_close(entropies, wanted, rtol=0, atol=1e-5)


def test_a_tie_for_the_top1_goes_to_the_first() -> None:
    """Over blocks, sets and the running top-1, which joins the rest when a larger one is met."""
    teacher = torch.randn(4, 5_000)
    teacher[0, [40, 3_000]] = 9.0
    teacher[1, 2_047:2_049] = 9.0
    teacher[2, [10, 20]] = 9.0  # 10 is near
    teacher[3] = torch.linspace(-3, 3, 5_000)  # a new top-1 in every block
    labels = torch.tensor([7, 7, 10, 7])
    projection = Projection(max_wrong_mass=0.05, min_near_mass=0.1)
    student, found = torch.randn(4, 5_000), []
    for name in ("reference", "triton"):
        loss = CUDLoss(calibration=projection, backend=name, reduction="none")
        value, statistics = loss(student, teacher, labels, return_stats=True)
        found.append((value, statistics.moved_mass))
        assert statistics.teacher_top1.tolist() == [40, 2_047, 10, 4_999]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
