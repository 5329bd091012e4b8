"""Search on validation, then train and test every method with several seeds; what a folder has is not done again."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..common.cli import CannotRunError
from ..common.data import PARTS
from ..common.files import whole_file, whole_path
from ..common.methods import Method
from ..common.metrics import Outcome, outcome
from ..common.progress import Meter
from ..common.search import SEARCH_SEED, Choice, Task, Trainings, predict
from .tasks import METHODS, Config


class Ablation:
    """The experiment on one task. ``folder`` keeps config.json, choices.json and runs/; a run resumes from them."""

    def __init__(self, task: Task, config: Config, seeds: int, folder: Path) -> None:
        self.task = task
        self.config = config
        self.seeds = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + seeds)
        self.folder = folder
        self._claim()
        self.trainings = Trainings(task)
        path = folder / "choices.json"
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.trainings.choices = {
                name: Choice([(nll, setting) for nll, setting in tried]) for name, tried in saved.items()
            }

    def _claim(self) -> None:
        path, mine = self.folder / "config.json", asdict(self.config)
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found != mine:
                raise CannotRunError(
                    f"{self.folder} holds a run with {found}; this one has {mine}: choose another --out"
                )
            return
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            json.dump(mine, file, indent=1)

    def work(self) -> float:
        """Units of progress that are left, without teachers that have to be trained once more."""
        trials = sum(self.config.trials * self.task.cost(m) for m in METHODS if m.name not in self.trainings.choices)
        return trials + sum(
            self.task.cost(m) for m in METHODS for seed in self.seeds if not self._path(m, seed).exists()
        )

    def run(self, meter: Meter) -> None:
        """Do what is left."""
        self.trainings.tick = meter.tick
        for method in METHODS:
            if method.name not in self.trainings.choices:
                meter.phase(f"Search: {method.name}")
                self.trainings.search(method, self.config.trials)
                self._save_choices()
        for seed in self.seeds:
            for method in METHODS:
                if not self._path(method, seed).exists():
                    meter.phase(f"Seed {seed}: {method.name}")
                    self._test(method, seed)

    def outcomes(self) -> dict[str, dict[str, list[Outcome]]]:
        """[method][part]: one per seed."""
        return {m.name: {part: [self._load(m, seed, part) for seed in self.seeds] for part in PARTS} for m in METHODS}

    def _test(self, method: Method, seed: int) -> None:
        model = self.trainings.train(method, seed)
        tests = (self.task.data.tests[part] for part in PARTS)
        found = [np.stack(list(vars(outcome(*predict(model, rows))).values())) for rows in tests]
        with whole_path(self._path(method, seed)) as draft, draft.open("wb") as file:
            np.savez_compressed(file, *found)

    def _load(self, method: Method, seed: int, part: str) -> Outcome:
        with np.load(self._path(method, seed)) as saved:
            return Outcome(*saved[f"arr_{PARTS.index(part)}"])

    def _path(self, method: Method, seed: int) -> Path:
        slug = re.sub(r"\W+", "-", method.name.lower())
        return self.folder / "runs" / f"{slug}-{seed}.npz"

    def _save_choices(self) -> None:
        choices = {
            name: [[nll, dict(setting)] for nll, setting in c.tried] for name, c in self.trainings.choices.items()
        }
        with whole_file(self.folder / "choices.json") as file:
            json.dump(choices, file, indent=1)
