"""The same number of logits, cut into ever fewer and longer rows; and the same work by more threads."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cudfast import CUDOptions
from cudfast.functional import cud_loss

from .bench_cud import LARGE, ROUNDS, check, floor, ours
from .cases import TEMPERATURE, Inputs, eager_cud, labels_for, make, with_gradient
from .measure import QUICK, Contestant, Race, Shape, gate, truth

EXPONENT = 7 if QUICK else 8


def one_length(flat: Inputs, classes: int) -> Contestant:
    """The logits of `flat` (1, N V) as rows of `classes`, past the gate; eager, at gigabytes, sets no bound there."""
    student, teacher, gradient = (x.view(-1, classes) for x in (flat.plain, flat.teacher, flat.gradient))
    student.requires_grad_()
    labels, options = labels_for(teacher), CUDOptions(temperature=TEMPERATURE)
    call = with_gradient(lambda: (cud_loss(student, teacher, labels, options, grad_out=gradient), student))
    gate(f"V = {classes:,}", call(), truth(eager_cud, student.detach(), teacher, labels), temperature=TEMPERATURE)
    return Contestant(f"V = {classes:,}", call)


@pytest.mark.benchmark(group="scaling")
def bench_classes(race: Race) -> None:
    shape = Shape(1, 10**EXPONENT, "from a sentence classifier to extreme classification")
    flat = make(shape)
    cases = [one_length(flat, 10**digits) for digits in range(3, EXPONENT + 1)]
    floor_case = floor(flat)
    race.run(
        f"CUDLoss, given gradient, N V = 1e{EXPONENT}",
        shape,
        torch.float32,
        [*cases, floor_case],
        floor=floor_case.name,
        rounds=5 if QUICK else 15,
    )
    if race.times:
        ordered = sorted((c.name for c in cases), key=race.times.__getitem__)
        race.goal(ordered[-1], ordered[0], 1.5, None, at_most=True)


@pytest.mark.benchmark(group="scaling")
def bench_threads(race: Race) -> None:
    most = torch.get_num_threads()
    if most == 1:
        pytest.skip("this machine gives PyTorch one thread")
    shape, data = LARGE[0], make(LARGE[0])
    case = ours(data)[0]
    check([case], eager_cud, data, data.teacher, data.labels)
    contestants = [
        Contestant(f"{c.name}, {threads} threads", c.call, partial(torch.set_num_threads, threads))
        for c in (case, floor(data))
        for threads in (most, 1)
    ]
    try:
        race.run("CUDLoss", shape, torch.float32, contestants, floor=contestants[2].name, rounds=ROUNDS, warm=1)
    finally:
        torch.set_num_threads(most)
