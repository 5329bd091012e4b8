"""Choose every method's setting on validation, then train and test it with several seeds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .data import PARTS, Dataset, Split
from .methods import (
    CUD,
    DUS_TEACHER,
    STUDENTS,
    TEACHERS,
    Method,
    Setting,
    batch_loss,
    other_settings,
    rate_settings,
)
from .metrics import Scores, reliability, score
from .model import NgramNet
from .progress import Meter
from .timing import Timing, measure
from .train import Schedule, fit, logits_of, steps_per_epoch

_SEARCH_SEED = 0
# A teacher's step takes about as long as this many steps of a student; it only weights the progress bar.
_TEACHER_COST = 1.5


@dataclass(frozen=True)
class Config:
    """Extent of a run: ``max_strings`` of a language, ``trials`` (4 or more) to choose each setting from."""

    max_strings: int | None = None
    seeds: int = 3
    trials: int = 8
    teacher_epochs: int = 4
    student_epochs: int = 4
    batch: int = 1024
    timing_steps: int = 200


FULL = Config()
QUICK = Config(max_strings=120, seeds=2, trials=5, batch=512, timing_steps=60)


@dataclass(frozen=True)
class Choice:
    """The setting with the least validation NLL (nats), and the least NLL with only the rate tuned."""

    setting: Setting
    nll: float
    rate_nll: float


@dataclass(frozen=True)
class Results:
    """``scores[method][part]``: one per seed; ``bins[method][part]``: [3, BINS] summed over seeds."""

    scores: dict[str, dict[str, list[Scores]]]
    bins: dict[str, dict[str, NDArray[np.float64]]]
    choices: dict[str, Choice]
    timing: Timing


class Experiment:
    """One run of the whole comparison on ``data``."""

    def __init__(self, data: Dataset, config: Config, meter: Meter) -> None:
        self.data = data
        self.config = config
        self.meter = meter

    def run(self) -> Results:
        """Search, train, test and time."""
        choices: dict[str, Choice] = {}
        teachers: dict[str, Tensor] = {}
        for method in TEACHERS + STUDENTS:
            self.meter.phase(f"Search: {method.name}")
            choices[method.name], model = self._search(method, teachers)
            if method in TEACHERS:
                teachers[method.name] = logits_of(model, self.data.train.bags)
        self.meter.phase("Timing the loss")
        timing = measure(
            self.data.train,
            teachers[DUS_TEACHER.name],
            choices[CUD.name].setting,
            self.config.batch,
            self.config.timing_steps,
            lambda: self.meter.tick(2.0),
        )
        scores: dict[str, dict[str, list[Scores]]] = defaultdict(lambda: {part: [] for part in PARTS})
        bins: dict[str, dict[str, NDArray[np.float64]]] = defaultdict(dict)
        for seed in range(_SEARCH_SEED + 1, _SEARCH_SEED + 1 + self.config.seeds):
            for method in TEACHERS + STUDENTS:
                self.meter.phase(f"Seed {seed}: {method.name}")
                model = self._train(method, choices[method.name].setting, teachers, seed)
                if method in TEACHERS:
                    teachers[method.name] = logits_of(model, self.data.train.bags)
                for part in PARTS:
                    logits, labels = _predict(model, self.data.tests[part])
                    scores[method.name][part].append(score(logits, labels))
                    bins[method.name][part] = bins[method.name].get(part, 0) + reliability(logits, labels)
        return Results(dict(scores), dict(bins), choices, timing)

    def _search(self, method: Method, teachers: dict[str, Tensor]) -> tuple[Choice, NgramNet]:
        def attempt(setting: Setting) -> tuple[float, Setting, NgramNet]:
            model = self._train(method, setting, teachers, _SEARCH_SEED)
            return float(functional.cross_entropy(*_predict(model, self.data.validation))), setting, model

        tried = [attempt(setting) for setting in rate_settings(method)]
        left = self.config.trials - len(tried)
        best = min(tried, key=itemgetter(0))
        tried += [attempt(setting) for setting in other_settings(method, best[1], left, _SEARCH_SEED)]
        nll, setting, model = min(tried, key=itemgetter(0))
        return Choice(setting, nll, best[0]), model

    def _train(self, method: Method, setting: Setting, teachers: dict[str, Tensor], seed: int) -> NgramNet:
        is_teacher = method in TEACHERS
        epochs = self.config.teacher_epochs if is_teacher else self.config.student_epochs
        rows = self.data.train
        loss = batch_loss(method, setting, rows, teachers[method.teacher] if method.teacher else None)
        cost = _TEACHER_COST if is_teacher else 1.0
        schedule = Schedule(epochs, setting[method.rate], self.config.batch)
        return fit(method.size, len(self.data.languages), rows, loss, schedule, seed, lambda: self.meter.tick(cost))


def work(data: Dataset, config: Config) -> float:
    """Units of progress that a run counts."""
    steps = steps_per_epoch(data.train, config.batch)
    teacher = len(TEACHERS) * (config.trials + config.seeds) * config.teacher_epochs * _TEACHER_COST
    student = len(STUDENTS) * (config.trials + config.seeds) * config.student_epochs
    return steps * (teacher + student) + 2 * config.timing_steps


def _predict(model: NgramNet, rows: Split) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and labels [N] of the rows."""
    return logits_of(model, rows.bags)[rows.string], rows.label
