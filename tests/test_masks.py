"""Masks of two kinds: the student's columns hold the lowest finite number, the teacher's a large negative one.

Their quotient by a temperature below 1 overflows, but the class is not one of -inf.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from cudfast import CrossEntropy, ForwardKL, Loss

LOWEST = torch.finfo(torch.float32).min


BACKENDS = ("native", "reference", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [1e-4, 0.05, 0.3, 0.9, 2.0])
@pytest.mark.parametrize("mask", [-1e9, -1e4, LOWEST])
def test_masked_columns_change_nothing(backend: str, tau: float, mask: float) -> None:
    loss = Loss(0.8 * ForwardKL(tau) + 0.2 * CrossEntropy(), backend=backend)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(0)
    # 9,000 masked columns are whole blocks, which have no other logits.
    for classes, masked, dtype in itertools.product((7, 37), (1, 300, 9000), (torch.float32, torch.float64)):
        student = torch.randn(4, masked + classes, generator=rng).to(dtype)
        teacher = 3 * torch.randn(4, masked + classes, generator=rng).to(dtype)
        labels = torch.randint(masked, masked + classes, (4,), generator=rng)
        student[:, :masked], teacher[:, :masked] = LOWEST, mask
        alone = student[:, masked:].clone().requires_grad_()
        wanted = loss(alone, teacher[:, masked:], labels - masked)
        wanted.backward()
        student.requires_grad_()
        value = loss(student, teacher, labels)
        value.backward()
        assert alone.grad is not None
        assert student.grad is not None
        torch.testing.assert_close(value, wanted, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(student.grad[:, masked:], alone.grad, rtol=0, atol=2e-6 * max(1, tau))
        assert not student.grad[:, :masked].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_that_only_the_student_excludes(backend: str) -> None:
    loss = Loss(ForwardKL(0.5), backend=backend)  # type: ignore[arg-type]
    student, teacher = torch.zeros(2, 40), torch.zeros(2, 40)
    student[0, 3], student[1, 3] = -torch.inf, LOWEST
    teacher[0, 3] = -1e9
    infinite, huge = (loss(student[i : i + 1], teacher[i : i + 1]) for i in range(2))
    assert infinite == torch.inf
    assert huge > 1e36
