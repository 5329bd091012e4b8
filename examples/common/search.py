"""Training every method on one task, and choosing each one's setting on validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

from torch import Tensor
from torch.nn import functional

from .data import Dataset, Split
from .methods import CE_TEACHER, DUS_TEACHER, KNOBS, Knobs, Method, Setting, batch_loss, other_settings, rate_settings
from .model import STUDENT, TEACHER, Net, Size, VectorSize
from .train import Schedule, fit, logits_of, steps_per_epoch

SEARCH_SEED = 0
# A teacher's step takes about as long as this many steps of a student; it only weights the progress bar.
TEACHER_COST = 1.5
_TEACHERS = {method.name: method for method in (CE_TEACHER, DUS_TEACHER)}


@dataclass(frozen=True)
class Task:
    """A data set, the networks that learn it, the lengths of their training, and the ranges of the knobs."""

    data: Dataset
    teacher_epochs: int
    student_epochs: int
    batch: int
    teacher: Size | VectorSize = TEACHER
    student: Size | VectorSize = STUDENT
    knobs: Knobs = field(default_factory=lambda: KNOBS)

    def cost(self, method: Method) -> float:
        """Units of progress of one training."""
        epochs = self.teacher_epochs * TEACHER_COST if method.is_teacher else self.student_epochs
        return epochs * steps_per_epoch(self.data.train, self.batch)


@dataclass(frozen=True)
class Choice:
    """Every setting tried with its validation NLL (nats), the learning rates first."""

    tried: list[tuple[float, Setting]]

    @property
    def setting(self) -> Setting:
        """The one with the least NLL."""
        return min(self.tried, key=itemgetter(0))[1]

    @property
    def nll(self) -> float:
        """The least NLL."""
        return min(nll for nll, _ in self.tried)

    @property
    def rate_nll(self) -> float:
        """The least NLL with only the rate tuned."""
        return min(nll for nll, _ in self.tried[:3])


class Trainings:
    """The trainings of one task. Teachers are trained when a student first needs one, and kept for one seed."""

    def __init__(self, task: Task, tick: Callable[[float], None] = lambda units: None) -> None:
        self.task = task
        self.tick = tick
        self.choices: dict[str, Choice] = {}
        self._seed = SEARCH_SEED
        self._taught: dict[str, Tensor] = {}

    def search(self, method: Method, trials: int) -> Choice:
        """Choose the setting of ``method``: three learning rates, then its other knobs at the best of them."""
        models = []

        def attempt(setting: Setting) -> tuple[float, Setting]:
            models.append(self._train(method, setting, SEARCH_SEED))
            return float(functional.cross_entropy(*predict(models[-1], self.task.data.validation))), setting

        tried = [attempt(setting) for setting in rate_settings(method, self.task.knobs)]
        best = min(tried, key=itemgetter(0))[1]
        left = other_settings(method, best, trials - len(tried), SEARCH_SEED, self.task.knobs)
        choice = Choice(tried + [attempt(setting) for setting in left])
        self.choices[method.name] = choice
        if method.is_teacher:
            self._keep(method, models[[nll for nll, _ in choice.tried].index(choice.nll)], SEARCH_SEED)
        return choice

    def train(self, method: Method, seed: int) -> Net:
        """Train ``method`` with its chosen setting."""
        model = self._train(method, self.choices[method.name].setting, seed)
        if method.is_teacher:
            self._keep(method, model, seed)
        return model

    def taught(self, name: str, seed: int) -> Tensor:
        """Logits [S, V] of the training strings by the teacher ``name`` of this seed."""
        if seed != self._seed or name not in self._taught:
            self.train(_TEACHERS[name], seed)
        return self._taught[name]

    def _keep(self, method: Method, model: Net, seed: int) -> None:
        if seed != self._seed:
            self._taught.clear()
            self._seed = seed
        self._taught[method.name] = logits_of(model, self.task.data.train)

    def _train(self, method: Method, setting: Setting, seed: int) -> Net:
        task = self.task
        rows = task.data.train
        loss = batch_loss(method, setting, rows, self.taught(method.teacher, seed) if method.teacher else None)
        size, epochs, cost = task.student, task.student_epochs, 1.0
        if method.is_teacher:
            size, epochs, cost = task.teacher, task.teacher_epochs, TEACHER_COST
        schedule = Schedule(epochs, setting[method.rate], task.batch)
        return fit(size, len(task.data.classes), rows, loss, schedule, seed, lambda: self.tick(cost))


def predict(model: Net, rows: Split) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and labels [N] of the rows."""
    return logits_of(model, rows)[rows.string], rows.label
