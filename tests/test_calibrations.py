"""Every calibration on every backend: a distillation term is the KL from the calibrated target, a distribution.

A new calibration is one more entry of CASES, with its target by definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cudfast import ClassSets, CrossEntropy, ForwardKL, FusedLinearLoss, Loss, Projection, WClip, calibrate

from .truth import calibrated, gradient

f64 = torch.float64
N, V = 8, 24
NEAR = ClassSets.from_groups(torch.arange(V) // 4)
MASSES = Projection(near=NEAR, min_near_mass=0.4, max_wrong_mass=0.1, wrong="top1")
FLOOR = Projection(near=NEAR, min_near_mass=0.4, min_entropy=1.5)


class Case(NamedTuple):
    calibration: WClip | Projection | None
    target: Callable[[Tensor, Tensor], Tensor]  # of teacher logits (N, V) and labels (N,), (N, V) at temperature 1


CASES = {
    "none": Case(None, lambda t, y: t.softmax(-1)),
    "wclip": Case(WClip(), lambda t, y: calibrated(t, y, 0.5, 0.7)),
    "wclip, all": Case(WClip(0.99, 1.0), lambda t, y: calibrated(t, y, 0.99, 1.0)),
    "masses": Case(MASSES, lambda t, y: calibrate(t, y, MASSES, unlabeled_index=-1)),
    "entropy": Case(FLOOR, lambda t, y: calibrate(t, y, FLOOR, unlabeled_index=-1)),
}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randint(V, (N,))
    y[0] = -1
    return torch.randn(N, V, dtype=f64, requires_grad=True), 3 * torch.randn(N, V, dtype=f64), y


def kl(case: Case, s: Tensor, t: Tensor, y: Tensor, tau: float) -> Tensor:
    """tau^2 KL of the target that is tempered after the calibration (N,)."""
    q = (case.target(t, y).log() / tau).log_softmax(-1)
    return tau**2 * (q.exp() * (q - (s / tau).log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("name", CASES)
def test_the_target_is_a_distribution(name: str) -> None:
    _, t, y = batch()
    q = CASES[name].target(t, y)
    torch.testing.assert_close(q.sum(-1), torch.ones(N, dtype=f64))
    assert bool((q >= 0).all())
    torch.testing.assert_close(q[0], t[0].softmax(-1))  # no label, no calibration


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(backend: str, name: str, tau: float) -> None:
    case = CASES[name]
    s, t, y = batch()
    loss = Loss(ForwardKL(tau), calibration=case.calibration, reduction="none", backend=backend)  # type: ignore[arg-type]
    value, truth = loss(s, t, y), kl(case, s, t, y, tau)
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    weight = torch.rand(N, dtype=f64)
    found, wanted = gradient((weight * value).sum(), s), gradient((weight * truth).sum(), s)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_from_hidden_states(name: str) -> None:
    case = CASES[name]
    _, t, y = batch()
    h, w = torch.randn(N, 5, dtype=f64, requires_grad=True), torch.randn(V, 5, dtype=f64, requires_grad=True)
    terms = ForwardKL(2.0) + CrossEntropy()
    value = FusedLinearLoss(terms, calibration=case.calibration)(h, w, y, teacher_logits=t)
    truth = Loss(terms, calibration=case.calibration)(h @ w.T, t, y)
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(torch.autograd.grad(value, (h, w)), torch.autograd.grad(truth, (h, w)))
