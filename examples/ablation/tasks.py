"""The three tasks, and how much of each a run does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.data import PARTS, Dataset, Names, build, capped
from ..common.methods import (
    CE_STUDENT,
    CE_TEACHER,
    CUD,
    DUS_TEACHER,
    EXACT,
    KD,
    KD_CLIP,
    KD_DUS,
    KD_FIXED,
    KNOBS,
    SMOOTHED,
    Knob,
    Knobs,
)
from ..common.model import TEACHER, Size, VectorSize
from ..common.search import Task
from . import minilm, sources

TEACHERS = (CE_TEACHER, DUS_TEACHER)
STUDENTS = (CE_STUDENT, SMOOTHED, KD_FIXED, KD, KD_DUS, KD_CLIP, CUD, EXACT)
METHODS = TEACHERS + STUDENTS
BASELINE = KD
"""What the others are compared with: distillation whose temperature and weights are tuned."""


@dataclass(frozen=True)
class Config:
    """Extent of a run on one data set.

    Classes have at least ``min_strings`` strings; of each, ``max_strings`` (or that share, if it is below 1) are drawn
    for train, validation and test, and ``max_shift`` for the test under shift. ``trials`` settings are tried for each
    method.
    """

    data: str
    min_strings: int
    max_strings: float
    max_shift: int
    batch: int
    teacher_epochs: int
    student_epochs: int
    trials: int = 6


FULL = {
    "babel": Config("babel", 50, 200, 80, batch=512, teacher_epochs=4, student_epochs=4),
    "geonames": Config("geonames", 1, 0.12, 4, batch=128, teacher_epochs=2, student_epochs=2, trials=5),
    "wordnet": Config("wordnet", 20, 600, 100, batch=256, teacher_epochs=5, student_epochs=5, trials=5),
}
QUICK = {
    "babel": replace(FULL["babel"], max_strings=60, max_shift=20, trials=4, teacher_epochs=2, student_epochs=2),
    "geonames": replace(FULL["geonames"], max_strings=0.05, max_shift=1, trials=4),
    "wordnet": replace(FULL["wordnet"], max_strings=40, max_shift=10, trials=4, teacher_epochs=2, student_epochs=2),
}


def read(config: Config, embed: Callable[[list[str]], Tensor] | None) -> Task:
    """Read the data set of ``config``; ``embed`` gives the vectors of wordnet's teacher."""
    names, shift = getattr(sources, config.data)()
    return make(config, names, shift, embed)


def make(config: Config, names: Names, shift: Names, embed: Callable[[list[str]], Tensor] | None = None) -> Task:
    """Make a task of strings by class. With ``embed`` teachers read its vectors, and students their n-grams."""
    data = build(
        names,
        capped(shift, config.max_shift, seed=0),
        min_strings=config.min_strings,
        max_strings=config.max_strings,
        embed=embed,
    )
    teacher: Size | VectorSize = TEACHER
    knobs: Knobs = KNOBS
    if embed is not None:
        teacher = VectorSize(minilm.DIM, hidden=256)
        knobs = {**KNOBS, "teacher_rate": Knob(0.0005, 0.008, 0.002, log=True)}
    return Task(data, config.teacher_epochs, config.student_epochs, config.batch, teacher, knobs=knobs)


def thirds(data: Dataset) -> dict[str, Tensor]:
    """Which classes (bool [V]) are the most frequent third in training, the middle one and the rarest.

    Of those that are tested in distribution: a class of one string has it in training alone.
    """
    count, tested = (
        torch.bincount(rows.label, minlength=len(data.classes)) for rows in (data.train, data.tests[PARTS[0]])
    )
    order = count.argsort(descending=True, stable=True)
    order = order[tested[order] > 0]
    found = {}
    for name, third in zip(
        ("frequent classes", "middling classes", "rare classes"), order.tensor_split(3), strict=True
    ):
        found[name] = torch.zeros(len(data.classes), dtype=torch.bool)
        found[name][third] = True
    return found
