"""How much of a student's training step the loss takes: the library against plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.data import Split
from ..common.methods import CUD, KNOBS, Setting, distillation
from ..common.model import STUDENT
from ..common.train import adam
from .eager import cud_loss

DistilLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
_WARM_UP = 5


@dataclass(frozen=True)
class StepTime:
    """Median times in milliseconds: the loss forward and backward to the logits, and the whole step."""

    loss_ms: float
    step_ms: float


@dataclass(frozen=True)
class Timing:
    """Step times of both implementations on the same N x V batches with the same number of threads."""

    native: StepTime
    eager: StepTime
    batch: int
    classes: int
    steps: int
    threads: int


class _Contestant:
    """A student in training with one implementation of the loss, and the times of its steps."""

    def __init__(self, loss: DistilLoss, classes: int, rate: float) -> None:
        torch.manual_seed(0)
        self.loss = loss
        self.model = STUDENT.build(classes)
        self.optimizer = adam(self.model, rate)
        self.times: list[tuple[float, float]] = []

    def step(self, rows: Split, teacher: Tensor, batch: Tensor) -> None:
        begin = time.perf_counter()
        logits = self.model.read(rows, rows.string[batch])
        targets, labels = teacher[rows.string[batch]], rows.label[batch]
        self.optimizer.zero_grad()
        before = time.perf_counter()
        leaf = logits.detach().requires_grad_()
        self.loss(leaf, targets, labels).backward()
        after = time.perf_counter()
        logits.backward(leaf.grad)
        self.optimizer.step()
        self.times.append((after - before, time.perf_counter() - begin))

    def median(self) -> StepTime:
        loss, step = zip(*self.times[_WARM_UP:], strict=True)
        return StepTime(1e3 * statistics.median(loss), 1e3 * statistics.median(step))


def require_same(one: DistilLoss, two: DistilLoss, logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Raise RuntimeError unless both losses and gradients agree on these logits [N, V] and labels [N]."""
    leaves = [logits.detach().clone().requires_grad_() for _ in range(2)]
    values = [loss(leaf, teacher, labels) for loss, leaf in zip((one, two), leaves, strict=True)]
    for value in values:
        value.backward()
    pairs = {
        "loss": tuple(value.detach() for value in values),
        "gradient": tuple(leaf.grad for leaf in leaves),
    }
    for what, (a, b) in pairs.items():
        assert a is not None
        assert b is not None
        gap = float((a - b).abs().max() / b.abs().max())
        if not gap < 1e-4:
            raise RuntimeError(
                f"the library's {what} differs from plain PyTorch's by {gap:.1e} of its largest value; "
                "at most 1e-4 is rounding, so no time is reported: check the build"
            )


def preflight() -> None:
    """Raise RuntimeError unless the native loss is there and agrees with plain PyTorch on random logits."""
    student, teacher = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(0))
    setting = {name: KNOBS[name].default for name in CUD.knobs}
    require_same(*_both(setting), student, teacher, torch.arange(16) % 9)


def _both(setting: Setting) -> tuple[DistilLoss, DistilLoss]:
    """Return the native and the plain PyTorch loss of one setting of CUD."""
    knobs = {name: setting[name] for name in ("temperature", "kd_weight", "budget", "margin")}

    def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return cud_loss(student, teacher, labels, **knobs)

    return distillation(setting, backend="native"), eager


def measure(rows: Split, teacher: Tensor, setting: Setting, batch: int, steps: int, tick: Callable[[], None]) -> Timing:
    """Train two students side by side for ``steps`` steps each, taking turns on every batch.

    ``teacher`` holds logits [S, V] of the strings of ``rows``; ``setting`` is that of CUD.
    """
    classes = teacher.shape[1]
    native, eager = _both(setting)
    contestants = [_Contestant(loss, classes, setting["student_rate"]) for loss in (native, eager)]
    first = torch.arange(min(batch, len(rows)))
    with torch.no_grad():
        logits = contestants[0].model.read(rows, rows.string[first])
    require_same(native, eager, logits, teacher[rows.string[first]], rows.label[first])
    generator = torch.Generator().manual_seed(0)
    for number in range(_WARM_UP + steps):
        piece = torch.randint(len(rows), (batch,), generator=generator)
        for contestant in contestants if number % 2 else contestants[::-1]:
            contestant.step(rows, teacher, piece)
        tick()
    mine, plain = (contestant.median() for contestant in contestants)
    return Timing(mine, plain, batch, classes, steps, torch.get_num_threads())
