"""The contestants of a race: every way to call the library, PyTorch, yardsticks, and the floor, a lower bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from . import cases
from .cases import TEMPERATURE, Forward, Inputs, compiled, through, with_gradient
from .gate import Errors, Loss, gate, truth
from .shapes import Shape

IN_PLACE = "in place"


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Args:
        name: its name in the table.
        call: the function that is timed.
        prepare: runs before each call, untimed.
        reads, writes: how many (N, V) matrices the work must read and write at least.
        wait: waits until the device is done.
        clock: the time in seconds, from any origin.
    """

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    reads: int = 2
    writes: int = 1
    wait: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.perf_counter

    def work(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes that must move: (reads + writes) * N * V * s, with s bytes per element."""
        return (self.reads + self.writes) * shape.rows * shape.classes * dtype.itemsize

    def seconds(self, warm: int) -> float:
        """Time of one call after `warm` untimed ones."""
        self.prepare()
        for _ in range(warm):
            self.call()
        return self.timed()

    def timed(self) -> float:
        """Time of one call."""
        self.wait()
        start = self.clock()
        result = self.call()
        self.wait()
        end = self.clock()
        del result  # freeing is not timed for any contestant, as in pytest-benchmark
        return end - start


@dataclass(frozen=True)
class Entry:
    """A loss in a race: the library's ways to call it, the same loss in plain PyTorch, and its inputs."""

    title: str
    forms: Callable[..., dict[str, Forward]]
    plain: Loss
    reads: int
    temperature: float

    def rest(self, data: Inputs) -> tuple[torch.Tensor, ...]:
        """The inputs of the loss besides the logits."""
        return (data.teacher, data.labels) if self.reads == 2 else (data.labels,)

    def ours(self, data: Inputs, **fields: Any) -> list[Contestant]:
        """Every way to call the library; `fields` are options."""
        restore = {IN_PLACE: data.restore}
        return [
            Contestant(name, with_gradient(forward), restore.get(name, lambda: None), self.reads)
            for name, forward in self.forms(data, **fields).items()
        ]

    def pytorch(self, data: Inputs, *, compile: bool = True) -> list[Contestant]:
        """The plain PyTorch loss, eager and through torch.compile."""
        losses = {"eager PyTorch": self.plain, **({"torch.compile": compiled(self.plain)} if compile else {})}
        calls = {name: with_gradient(through(loss, data.student, *self.rest(data))) for name, loss in losses.items()}
        return [Contestant(name, call, reads=self.reads) for name, call in calls.items()]

    def floor(self, data: Inputs) -> Contestant:
        """Only reads every matrix of logits and writes one matrix."""
        student = data.plain
        if self.reads == 2:
            return Contestant("torch.add", lambda: torch.add(student, data.teacher, out=data.gradient))
        return Contestant("torch.neg", lambda: torch.neg(student, out=data.gradient), reads=1)

    def check(self, contestants: list[Contestant], data: Inputs) -> None:
        """Compares the contestants that compute this loss with float64.

        Raises:
            AssertionError: the error of one of them exceeds the tolerance.
        """
        rest = self.rest(data)
        true = truth(self.plain, data.plain, *rest)
        eager = Errors.of(with_gradient(through(self.plain, data.student, *rest))(), true)
        for contestant in contestants:
            contestant.prepare()
            got = contestant.call()
            assert isinstance(got, tuple)
            gate(contestant.name, got, true, eager, self.temperature)


def yardsticks(data: Inputs) -> list[Contestant]:
    """Computations with less work than any distillation loss: cross-entropy with its gradient, and one softmax."""
    student = data.plain
    ce = with_gradient(through(functional.cross_entropy, data.student, data.labels))
    return [
        Contestant("F.cross_entropy", ce, reads=1),
        Contestant("torch.softmax", lambda: student.softmax(-1), reads=1),
    ]


def waiting(contestants: list[Contestant], device: str) -> list[Contestant]:
    """The same contestants, with times that include waiting for the device."""
    if device == "cpu":
        return contestants
    wait = partial(torch.get_device_module(torch.device(device)).synchronize)
    return [replace(c, wait=wait) for c in contestants]


CUD = Entry("CUDLoss", cases.cud_cases, cases.eager_cud, 2, TEMPERATURE)
CE_ALONE = partial(cases.cud_cases, kd_weight=0.0, ce_weight=1.0)
CE = Entry("CUDLoss(kd_weight=0)", CE_ALONE, functional.cross_entropy, 1, 1.0)
DUS = Entry("DUSLoss", cases.dus_cases, cases.eager_dus, 1, 1.0)
