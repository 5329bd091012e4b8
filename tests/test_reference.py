"""The reference backend against the equations, in float64; and where the losses meet PyTorch's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from cudfast import CUDLoss, DUSLoss, WClip

from .truth import cud_rows, dus_rows, gradient

f64 = torch.float64


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0, 7.3])
@pytest.mark.parametrize("clip", [None, WClip(), WClip(budget=0.0), WClip(budget=0.9, margin=1.0)])
def test_student_loss_is_equation_9(backend: str, tau: float, clip: WClip | None) -> None:
    student = (3 * torch.randn(6, 11, dtype=f64)).requires_grad_()
    teacher, labels = 3 * torch.randn(6, 11, dtype=f64), torch.tensor([0, 3, 10, -1, -100, 5])
    loss = CUDLoss(tau, calibration=clip, reduction="sum", backend=backend)(student, teacher, labels)
    budget, margin = (clip.budget, clip.margin) if clip else (0.0, 1.0)
    kd, ce = cud_rows(student, teacher, labels, tau=tau, budget=budget, margin=margin, clip=clip is not None)
    expected = kd.sum() + ce.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0, 10.0])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("differentiate_gate", [False, True])
def test_teacher_loss_is_equation_3(backend: str, gamma: float, power: float, differentiate_gate: bool) -> None:
    logits = (3 * torch.randn(6, 11, dtype=f64)).requires_grad_()
    labels, alpha = torch.tensor([0, 3, 10, 2, -100, 5]), torch.rand(11, dtype=f64) + 0.1
    loss = DUSLoss(
        gamma=gamma,
        alpha=alpha,
        gate_power=power,
        differentiate_gate=differentiate_gate,
        reduction="sum",
        backend=backend,
    )(logits, labels)
    expected = dus_rows(
        logits, labels, gamma=gamma, alpha=alpha, power=power, differentiate_gate=differentiate_gate
    ).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "reduction"),
    [("triton", "none"), *itertools.product(["native", "reference"], ["none", "sum", "mean"])],
)
def test_gradcheck(backend: str, reduction: str) -> None:
    teacher, labels = torch.randn(3, 5, dtype=f64), torch.tensor([1, -1, 4])
    student = torch.randn(3, 5, dtype=f64, requires_grad=True)
    for save in ("state", "gradient"):
        cud = CUDLoss(3.0, reduction=reduction, save=save, backend=backend)
        assert torch.autograd.gradcheck(lambda s, f=cud: f(s, teacher, labels), student)
        dus = DUSLoss(
            gamma=1.5, gate_power=0.7, differentiate_gate=True, reduction=reduction, save=save, backend=backend
        )
        assert torch.autograd.gradcheck(lambda s, f=dus: f(s, labels.abs()), student)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_without_distillation_it_is_cross_entropy(backend: str, reduction: str) -> None:
    logits, labels = torch.randn(9, 33, dtype=f64), torch.randint(33, (9,))
    labels[4] = -100
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    cud = CUDLoss(kd_weight=0, ce_weight=1, reduction=reduction, backend=backend)
    dus = DUSLoss(focal_weight=0, entropy_weight=0, reduction=reduction, backend=backend)
    for loss in (cud(logits, None, labels), cud(logits, logits * 2, labels), dus(logits, labels)):
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)


def test_without_calibration_it_is_hinton(backend: str) -> None:
    student, teacher, labels = torch.randn(9, 33, dtype=f64), torch.randn(9, 33, dtype=f64), torch.randint(33, (9,))
    loss = CUDLoss(3.0, 0.6, 0.4, calibration=None, backend=backend)(student, teacher, labels)
    kl = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, 0.6 * 9 * kl + 0.4 * F.cross_entropy(student, labels), rtol=1e-12, atol=1e-12)
    same = CUDLoss(3.0, 0.6, 0.4, calibration=WClip(budget=0.0), backend=backend)(student, teacher, labels)
    torch.testing.assert_close(same, loss, rtol=1e-14, atol=1e-14)


def test_confident_rows_have_no_nan(backend: str) -> None:
    """p_y = 1 to the last bit: exponents of 0 and in (0, 1) meet 0 times infinity there, and the limit is finite."""
    logits = torch.zeros(2, 5, dtype=f64)
    logits[0, 1], logits[1, 2] = 800.0, 60.0
    logits.requires_grad_()
    for gamma in (0.0, 0.3, 1.0, 2.0):
        for power in (0.0, 0.3, 1.0, 2.0):
            loss = DUSLoss(gamma=gamma, gate_power=power, differentiate_gate=True, backend=backend)
            value = loss(logits, torch.tensor([1, 2]))
            assert value.isfinite()
            g = gradient(value, logits)
            assert g.isfinite().all()
            assert g[0].abs().max() < 1e-12


def test_hopeless_rows_have_no_nan(backend: str) -> None:
    """p_y = 0 to the last bit."""
    logits = torch.zeros(1, 5, dtype=f64)
    logits[0, 1] = 800.0
    logits.requires_grad_()
    for gamma in (0.0, 0.3, 1.0, 10.0):
        value = DUSLoss(gamma=gamma, differentiate_gate=True, backend=backend)(logits, torch.tensor([2]))
        assert value.item() == pytest.approx(1600.0, rel=1e-6)
        assert gradient(value, logits).isfinite().all()
