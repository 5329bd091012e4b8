"""The exact projection beside W-Clip: bounds on mass, an entropy floor that binds in every row, one that never does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cudfast import ClassSets, CUDOptions, Projection, calibrate
from cudfast.bench.cases import TEMPERATURE, Inputs, make, with_gradient
from cudfast.bench.contestants import CUD, Contestant
from cudfast.bench.gate import Errors, gate, truth
from cudfast.bench.shapes import SHAPES
from cudfast.functional import cud_loss
from cudfast.targets.projection import BOUNDS

from .conftest import Runner
from .rounds import ROUNDS

SHAPE = SHAPES["Llama 2"]
NEAR = 32
CHECKED = 32  # rows that are compared with float64: the plain form of a projection is slow


def near_classes(classes: int) -> ClassSets:
    """NEAR classes for every class, itself among them, spread over the axis."""
    members = (torch.arange(classes).unsqueeze(1) + torch.arange(NEAR) * (classes // NEAR - 1)) % classes
    return ClassSets(torch.arange(classes + 1) * NEAR, members.sort(1).values.reshape(-1))


def projected(projection: Projection, data: Inputs) -> Contestant:
    """The student loss with a projection into a given gradient, past the gate."""
    options = CUDOptions(temperature=TEMPERATURE, calibration=projection)
    call = with_gradient(
        lambda: (cud_loss(data.student, data.teacher, data.labels, options, grad_out=data.gradient), data.student)
    )

    def plain(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        target = (calibrate(teacher, labels, projection).log() / TEMPERATURE).softmax(-1)
        kl = functional.kl_div((student / TEMPERATURE).log_softmax(-1), target, reduction="batchmean")
        return 0.8 * TEMPERATURE**2 * kl + 0.2 * functional.cross_entropy(student, labels)

    part = slice(0, CHECKED)
    rest = (data.plain[part], data.teacher[part], data.labels[part])
    true = truth(plain, *rest)
    x = rest[0].clone().requires_grad_()
    value = plain(x, *rest[1:])
    eager = Errors.of((value.detach(), torch.autograd.grad(value, x)[0]), true)
    x = rest[0].clone().requires_grad_()
    value = cud_loss(x, *rest[1:], options)
    name = ", ".join(f"{bound}={asked:g}" for bound in BOUNDS if (asked := getattr(projection, bound)) is not None)
    gate(name, (value.detach(), torch.autograd.grad(value, x)[0]), true, eager, TEMPERATURE)
    return Contestant(name, call)


@pytest.mark.benchmark(group="CUDLoss, projection")
def bench_projection(race: Runner) -> None:
    data = make(SHAPE)
    near = near_classes(SHAPE.classes)
    wclip = CUDOptions(temperature=TEMPERATURE)
    ours = Contestant(
        "W-Clip",
        with_gradient(
            lambda: (cud_loss(data.student, data.teacher, data.labels, wclip, grad_out=data.gradient), data.student)
        ),
    )
    cases = [
        projected(Projection(near=near, min_near_mass=0.3), data),
        projected(Projection(max_wrong_mass=0.01), data),
        projected(Projection(near=near, min_near_mass=0.3, max_wrong_mass=0.01), data),
        projected(Projection(min_entropy=9.0), data),
        projected(Projection(near=near, min_near_mass=0.3, min_entropy=8.0), data),
        projected(Projection(min_entropy=1.0), data),
    ]
    *masses, alone, both, met = cases
    race(
        "CUDLoss, given gradient",
        SHAPE,
        torch.float32,
        [ours, *cases, CUD.floor(data)],
        floor="torch.add",
        rounds=ROUNDS,
        at_most=[(case.name, ours.name, 1.15, None) for case in (*masses, met)]
        + [(case.name, ours.name, 3, None) for case in (alone, both)],
    )
