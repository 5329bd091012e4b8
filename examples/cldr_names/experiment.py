"""Choose every method's setting on validation, then train and test it with several seeds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.data import PARTS, Dataset
from ..common.methods import CUD, DUS_TEACHER
from ..common.metrics import Scores, outcome, reliability, score
from ..common.progress import Meter
from ..common.search import SEARCH_SEED, Choice, Task, Trainings, predict
from .methods import METHODS
from .timing import Timing, measure


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
        trainings = Trainings(_task(self.data, self.config), self.meter.tick)
        for method in METHODS:
            self.meter.phase(f"Search: {method.name}")
            trainings.search(method, self.config.trials)
        self.meter.phase("Timing the loss")
        timing = measure(
            self.data.train,
            trainings.taught(DUS_TEACHER.name, SEARCH_SEED),
            trainings.choices[CUD.name].setting,
            self.config.batch,
            self.config.timing_steps,
            lambda: self.meter.tick(2.0),
        )
        scores: dict[str, dict[str, list[Scores]]] = defaultdict(lambda: {part: [] for part in PARTS})
        bins: dict[str, dict[str, NDArray[np.float64]]] = defaultdict(dict)
        for seed in range(SEARCH_SEED + 1, SEARCH_SEED + 1 + self.config.seeds):
            for method in METHODS:
                self.meter.phase(f"Seed {seed}: {method.name}")
                model = trainings.train(method, seed)
                for part in PARTS:
                    found = outcome(*predict(model, self.data.tests[part]))
                    scores[method.name][part].append(score(found))
                    bins[method.name][part] = bins[method.name].get(part, 0) + reliability(found)
        return Results(dict(scores), dict(bins), trainings.choices, timing)


def work(data: Dataset, config: Config) -> float:
    """Units of progress that a run counts."""
    task = _task(data, config)
    return (config.trials + config.seeds) * sum(map(task.cost, METHODS)) + 2 * config.timing_steps


def _task(data: Dataset, config: Config) -> Task:
    return Task(data, config.teacher_epochs, config.student_epochs, config.batch)
