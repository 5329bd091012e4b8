"""CUDLoss, forward and backward, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from .cases import TEMPERATURE, Inputs, compiled, cud_cases, eager_cud, make, through, with_gradient
from .measure import QUICK, Contestant, Errors, Loss, Race, Shape, gate, truth

LARGE = (
    Shape(512, 32_000, "tokens of a vocabulary as Llama 2's or Mistral's"),
    Shape(128, 128_256, "tokens of Llama 3's vocabulary"),
)
BANKING = Shape(32, 77, "a batch of Banking77")
ROUNDS, SLOW_ROUNDS = (6, 2) if QUICK else (30, 5)
SMALL_ROUNDS, SMALL_WARM = (100 if QUICK else 500), 5


def ours(data: Inputs, **options: float) -> list[Contestant]:
    """Every way to call the library, the given gradient first."""
    return [
        Contestant(name, with_gradient(forward), data.restore if name == "in place" else lambda: None)
        for name, forward in cud_cases(data, **options).items()
    ]


def floor(data: Inputs) -> Contestant:
    """Reads both logits and writes one matrix, and no more."""
    student = data.plain
    return Contestant("torch.add", lambda: torch.add(student, data.teacher, out=data.gradient))


def check(contestants: list[Contestant], loss: Loss, data: Inputs, *others: torch.Tensor) -> None:
    """The gate, for every contestant."""
    true = truth(loss, data.plain, *others)
    eager = Errors.of(with_gradient(through(loss, data.student, *others))(), true)
    for c in contestants:
        c.prepare()
        got = c.call()
        assert isinstance(got, tuple)
        gate(c.name, got, true, eager, TEMPERATURE)


@pytest.mark.benchmark(group="CUDLoss, large")
@pytest.mark.parametrize("shape", LARGE[:1] if QUICK else LARGE, ids=str)
def bench_large(race: Race, shape: Shape) -> None:
    data = make(shape)
    rest = (data.teacher, data.labels)
    cases = ours(data)
    check(cases, eager_cud, data, *rest)
    slow = ROUNDS // SLOW_ROUNDS
    student = data.plain
    peers = [
        Contestant("eager PyTorch", with_gradient(through(eager_cud, data.student, *rest)), every=slow),
        Contestant("torch.compile", with_gradient(through(compiled(eager_cud), data.student, *rest)), every=slow),
        Contestant(
            "F.cross_entropy",
            with_gradient(through(functional.cross_entropy, data.student, data.labels)),
            reads=1,
            every=slow,
        ),
        Contestant("torch.softmax", lambda: student.softmax(-1), reads=1),
        floor(data),
    ]
    race.run("CUDLoss", shape, torch.float32, [*cases, *peers], floor="torch.add", rounds=ROUNDS)
    for name in ("given gradient", "in place"):
        race.goal("eager PyTorch", name, 30, 50)
        race.goal("torch.compile", name, 12, 20)
        race.goal(name, "torch.add", 2.5, 1.5, at_most=True)
    race.goal("eager PyTorch", "fresh gradient", 12, 20)
    race.goal("torch.compile", "fresh gradient", 5, 8)


@pytest.mark.benchmark(group="CUDLoss, bfloat16")
@pytest.mark.parametrize("shape", LARGE[:1] if QUICK else LARGE, ids=str)
def bench_bfloat16(race: Race, shape: Shape) -> None:
    data = make(shape, torch.bfloat16)
    rest = (data.teacher, data.labels)
    cases = ours(data)
    check(cases, eager_cud, data, *rest)
    eager = with_gradient(through(eager_cud, data.student, *rest))
    peers = [Contestant("eager PyTorch", eager, every=ROUNDS // SLOW_ROUNDS), floor(data)]
    race.run("CUDLoss", shape, torch.bfloat16, [*cases, *peers], floor="torch.add", rounds=ROUNDS)
    race.goal("eager PyTorch", "given gradient", 20, None)
    race.goal("eager PyTorch", "in place", 20, None)


@pytest.mark.benchmark(group="CUDLoss, small")
def bench_small(race: Race) -> None:
    data = make(BANKING)
    rest = (data.teacher, data.labels)
    fresh, *others = sorted(ours(data), key=lambda c: c.name != "fresh gradient")
    check([fresh, *others], eager_cud, data, *rest)
    eager = Contestant("eager PyTorch", with_gradient(through(eager_cud, data.student, *rest)))
    contestants = [fresh, *others, eager, floor(data)]
    race.run("CUDLoss", BANKING, torch.float32, contestants, floor="torch.add", rounds=SMALL_ROUNDS, warm=SMALL_WARM)
    race.goal("eager PyTorch", "fresh gradient", 3, None)


@pytest.mark.benchmark(group="CUDLoss, cross-entropy only")
def bench_cross_entropy(race: Race) -> None:
    shape, data = LARGE[0], make(LARGE[0])
    cases = [Contestant(c.name, c.call, c.prepare, reads=1) for c in ours(data, kd_weight=0.0, ce_weight=1.0)]
    check(cases, functional.cross_entropy, data, data.labels)
    eager = with_gradient(through(functional.cross_entropy, data.student, data.labels))
    student = data.plain
    peers = [
        Contestant("F.cross_entropy", eager, reads=1),
        Contestant("torch.neg", lambda: torch.neg(student, out=data.gradient), reads=1),
    ]
    race.run("CUDLoss(kd_weight=0)", shape, torch.float32, [*cases, *peers], floor="torch.neg", rounds=ROUNDS)
