"""Random shapes, strides, dtypes, masks and extremes: the kernels against the equations in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cudfast import CUDOptions, DUSOptions, WClip
from cudfast.functional import cud_loss, dus_loss

from .truth import cud_rows, dus_rows, gradient

relaxed = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
few = settings(relaxed, max_examples=25)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@st.composite
def logits(draw: st.DrawFn, n: int, v: int) -> torch.Tensor:
    """(n, v) with a row stride of its own, any scale up to +-80, and duplicates for ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    stride = v + draw(st.integers(0, 5))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 40.0]))
    values = (torch.randn(n, stride, generator=generator) * scale).clamp(-80, 80)
    if draw(st.booleans()):
        values = values.round()
    return values.to(draw(DTYPES))[:, :v]


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, v = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33, 100, 2048, 2050]))
    labels = draw(st.lists(st.sampled_from([-100, -1, *range(min(v, 9)), v - 1]), min_size=n, max_size=n))
    return draw(logits(n, v)), draw(logits(n, v)), torch.tensor(labels)


def close(got: torch.Tensor, expected: torch.Tensor, at_least: float, wide: bool) -> None:
    bound = (1e-11 if wide else 2e-6) * torch.clamp(expected.abs(), min=at_least)
    assert ((got.double() - expected).abs() <= bound).all(), (got, expected)


def half_ulp(dtype: torch.dtype, backend: str) -> float:
    """Of rounding to dtype, as devices do it; Triton's interpreter truncates to bf16."""
    known = {torch.float32: 2.0**-23, torch.float64: 2.0**-51, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    truncates = backend == "triton" and dtype == torch.bfloat16
    return known[dtype] * (2 if truncates else 1)


student_arguments = given(
    batch=batches(),
    tau=st.sampled_from([0.7, 1.0, 2.0, 4.0, 10.0]),
    weights=st.sampled_from([(0.8, 0.2), (1.0, 0.0), (0.0, 1.0)]),
    clip=st.sampled_from([None, WClip(), WClip(0.0), WClip(0.99, 1.0), WClip(0.1, 0.01)]),
    save=st.sampled_from(["state", "gradient"]),
)


def check_student(
    backend: str, batch: Batch, tau: float, weights: tuple[float, float], clip: WClip | None, save: str
) -> None:
    student, teacher, labels = batch
    options = CUDOptions(
        temperature=tau,
        kd_weight=weights[0],
        ce_weight=weights[1],
        calibration=clip,
        reduction="none",
        save=save,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
    )
    leaf = student.detach().requires_grad_()
    loss = cud_loss(leaf, teacher, labels, options)
    wide = loss.dtype == torch.float64
    exact = student.double().requires_grad_()
    budget, margin = (clip.budget, clip.margin) if clip else (0.0, 1.0)
    terms = cud_rows(
        exact,
        teacher.double(),
        labels,
        tau=tau,
        kd=weights[0],
        ce=weights[1],
        budget=budget,
        margin=margin,
        clip=clip is not None,
    )
    expected = terms[0] + terms[1]
    close(loss, expected, max(1.0, tau**2), wide)
    g, truth = gradient(loss.sum(), leaf), gradient(expected.sum(), exact)
    bound = 1.01 * half_ulp(student.dtype, backend) * truth.abs() + (1e-13 if wide else 2e-6) * max(1.0, tau) + 2.0**-25
    assert ((g.double() - truth).abs() <= bound).all()


@relaxed
@student_arguments
def test_student_loss(**arguments: Any) -> None:
    check_student("native", **arguments)


@few
@student_arguments
def test_student_loss_on_triton(**arguments: Any) -> None:
    check_student("triton", **arguments)


teacher_arguments = given(
    batch=batches(),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 10.0]),
    power=st.sampled_from([0.0, 1.0, 2.0]),
    differentiate_gate=st.booleans(),
)


def check_teacher(backend: str, batch: Batch, gamma: float, power: float, differentiate_gate: bool) -> None:
    logits, _, labels = batch
    labels = torch.where(labels == -1, 0, labels)
    options = DUSOptions(
        gamma=gamma,
        gate_power=power,
        differentiate_gate=differentiate_gate,
        reduction="none",
        gate_threshold=0.5000001,
        backend=backend,  # type: ignore[arg-type]
    )
    leaf = logits.detach().requires_grad_()
    loss = dus_loss(leaf, labels, options)
    exact = logits.double().requires_grad_()
    expected = dus_rows(
        exact, labels, gamma=gamma, power=power, differentiate_gate=differentiate_gate, threshold=0.5000001
    )
    wide = loss.dtype == torch.float64
    close(loss, expected, 2.0, wide)
    g = gradient(loss.sum(), leaf)
    assert g.isfinite().all()
    truth = gradient(expected.sum(), exact)
    truth = torch.where(truth.isnan(), g.double(), truth)  # autograd meets 0 * inf at p = 1 where the limit is finite
    bound = (
        1.01 * half_ulp(logits.dtype, backend) * truth.abs() + (1e-12 if wide else 4e-6) * max(1.0, gamma) + 2.0**-25
    )
    assert ((g.double() - truth).abs() <= bound).all()


@relaxed
@teacher_arguments
def test_teacher_loss(**arguments: Any) -> None:
    check_teacher("native", **arguments)


@few
@teacher_arguments
def test_teacher_loss_on_triton(**arguments: Any) -> None:
    check_teacher("triton", **arguments)
