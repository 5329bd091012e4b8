"""Sums of terms beside the preset with the same pass: what each further term costs, and terms without a teacher."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional

from cudfast import CrossEntropy, CUDOptions, Entropy, Focal, ForwardKL, Loss, WClip, ZLoss
from cudfast.bench.cases import TEMPERATURE, Inputs, make, with_gradient
from cudfast.bench.contestants import CUD, Contestant
from cudfast.bench.gate import Errors, gate, truth
from cudfast.bench.shapes import SHAPES
from cudfast.functional import composed_loss, cud_loss
from cudfast.terms import Terms

from .conftest import Runner
from .rounds import ROUNDS

SHAPE = SHAPES["Llama 2"]
CHECKED = 32  # rows that are compared with float64
COEFFICIENTS = {"entropy": -0.1, "z_loss": 1e-4, "focal": 0.5}


def plain(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, *, extra: str) -> torch.Tensor:
    """0.8 KL + 0.2 CE, and one more term, in PyTorch."""
    q = (teacher / TEMPERATURE).softmax(-1)
    kl = functional.kl_div((student / TEMPERATURE).log_softmax(-1), q, reduction="batchmean")
    log_p = student.log_softmax(-1)
    log_p_y = log_p.gather(-1, labels[:, None]).squeeze(-1)
    values = {
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "z_loss": lambda: student.logsumexp(-1) ** 2,
        "focal": lambda: -((1 - log_p_y.exp()) ** 2) * log_p_y,
    }
    total = 0.8 * TEMPERATURE**2 * kl - 0.2 * log_p_y.mean()
    return total + COEFFICIENTS[extra] * values[extra]().mean() if extra else total


def composed(name: str, extra: str, data: Inputs) -> Contestant:
    """The sum of terms into a given gradient, past the gate."""
    terms: Terms = 0.8 * ForwardKL(TEMPERATURE) + 0.2 * CrossEntropy()
    if extra:
        terms = terms + COEFFICIENTS[extra] * {"entropy": Entropy(), "z_loss": ZLoss(), "focal": Focal(2.0)}[extra]
    part = slice(0, CHECKED)
    rest = (data.plain[part], data.teacher[part], data.labels[part])
    form = partial(plain, extra=extra)
    true = truth(form, *rest)
    x = rest[0].clone().requires_grad_()
    value = form(x, *rest[1:])
    eager = Errors.of((value.detach(), torch.autograd.grad(value, x)[0]), true)
    x = rest[0].clone().requires_grad_()
    value = Loss(terms)(x, *rest[1:])
    gate(name, (value.detach(), torch.autograd.grad(value, x)[0]), true, eager, TEMPERATURE)
    options = Loss(terms, calibration=WClip()).options
    arguments = (data.student, data.teacher, data.labels, options)
    return Contestant(
        name,
        with_gradient(lambda: (composed_loss(*arguments, grad_out=data.gradient), data.student)),  # type: ignore[arg-type, return-value]
    )


@pytest.mark.benchmark(group="Loss, sums of terms")
def bench_terms(race: Runner) -> None:
    data = make(SHAPE)
    options = CUDOptions(temperature=TEMPERATURE)
    ours = Contestant(
        "CUDLoss",
        with_gradient(
            lambda: (cud_loss(data.student, data.teacher, data.labels, options, grad_out=data.gradient), data.student)
        ),
    )
    same, *more = (
        composed("Loss, the same terms", "", data),
        composed("and ZLoss", "z_loss", data),
        composed("and Focal", "focal", data),
        composed("and Entropy", "entropy", data),
    )
    race(
        "Loss, given gradient",
        SHAPE,
        torch.float32,
        [ours, same, *more, CUD.floor(data)],
        floor="torch.add",
        rounds=ROUNDS,
        at_most=[(same.name, ours.name, 1.1, None)] + [(case.name, ours.name, 1.25, None) for case in more],
    )
