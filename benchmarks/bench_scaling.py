"""The same number of logits, cut into ever fewer and longer rows; and the same work by more threads."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import pytest
import torch

from cudfast import CUDOptions
from cudfast.bench.cases import TEMPERATURE, Inputs, eager_cud, labels_for, make, with_gradient
from cudfast.bench.contestants import CUD, Contestant
from cudfast.bench.gate import gate, truth
from cudfast.bench.result import Result
from cudfast.bench.shapes import SHAPES, Shape
from cudfast.functional import cud_loss

from .conftest import Goal, Runner
from .rounds import QUICK, ROUNDS

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
def bench_classes(race: Runner) -> None:
    shape = Shape(1, 10**EXPONENT, "from a sentence classifier to extreme classification")
    flat = make(shape)
    cases = [one_length(flat, 10**digits) for digits in range(3, EXPONENT + 1)]

    def slowest_and_fastest(result: Result) -> Iterable[Goal]:
        ordered = sorted((c.name for c in cases), key=lambda name: result.contestants[name].median_ms)
        return [(ordered[-1], ordered[0], 1.5, None)]

    race(
        f"CUDLoss, given gradient, N V = 1e{EXPONENT}",
        shape,
        torch.float32,
        [*cases, CUD.floor(flat)],
        floor="torch.add",
        rounds=5 if QUICK else 15,
        memory=False,
        more_at_most=slowest_and_fastest,
    )


@pytest.mark.benchmark(group="scaling")
def bench_threads(race: Runner) -> None:
    most = torch.get_num_threads()
    if most == 1:
        pytest.skip("this machine gives PyTorch one thread")
    shape = SHAPES["Llama 2"]
    data = make(shape)
    case = CUD.ours(data)[0]
    CUD.check([case], data)
    contestants = [
        Contestant(f"{c.name}, {threads} threads", c.call, partial(torch.set_num_threads, threads))
        for c in (case, CUD.floor(data))
        for threads in (most, 1)
    ]
    try:
        floor = contestants[2].name
        race("CUDLoss, threads", shape, torch.float32, contestants, floor=floor, rounds=ROUNDS, warm=1, memory=False)
    finally:
        torch.set_num_threads(most)
