"""The methods that are compared: the loss of each, its knobs and their ranges."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from torch.nn import functional

from cudfast import CUDLoss, DUSLoss, Projection, WClip

from .data import Split
from .train import BatchLoss

Setting = Mapping[str, float]
"""Value of each knob, by name."""


@dataclass(frozen=True)
class Knob:
    """A range searched on validation, evenly or (``log``) evenly in the logarithm, and the usual value."""

    low: float
    high: float
    default: float
    log: bool = False

    def at(self, share: float) -> float:
        """Value at ``share`` (0 to 1) of the way from low to high, to three digits."""
        if self.log:
            value = math.exp(math.log(self.low) * (1 - share) + math.log(self.high) * share)
        else:
            value = self.low * (1 - share) + self.high * share
        return float(f"{value:.3g}")


Knobs = Mapping[str, Knob]
KNOBS: Knobs = {
    "teacher_rate": Knob(0.006, 0.054, 0.018, log=True),
    "student_rate": Knob(0.04, 0.36, 0.12, log=True),
    "focal_weight": Knob(0.0, 1.0, 1.0),
    "entropy_weight": Knob(0.05, 0.8, 0.1, log=True),
    "temperature": Knob(0.7, 3.0, 2.0, log=True),
    "kd_weight": Knob(0.3, 1.0, 0.8),
    "budget": Knob(0.1, 0.9, 0.5),
    "margin": Knob(0.3, 1.0, 0.7),
    "near_mass": Knob(0.05, 0.6, 0.3),
    "wrong_mass": Knob(0.05, 0.6, 0.3),
    "smoothing": Knob(0.02, 0.3, 0.1, log=True),
}


@dataclass(frozen=True)
class Method:
    """A teacher (``teacher`` is None) or a student of the teacher method named ``teacher``.

    A student without ``teacher`` learns from the labels alone. The first of ``knobs`` is the learning rate.
    """

    name: str
    text: str
    knobs: tuple[str, ...]
    teacher: str | None = None

    @property
    def rate(self) -> str:
        """Name of the knob that sets the learning rate."""
        return self.knobs[0]

    @property
    def is_teacher(self) -> bool:
        """Whether it trains the large network."""
        return self.rate == "teacher_rate"


_KD = ("student_rate", "temperature", "kd_weight")
_CLIP = ("budget", "margin")
_BOUNDS = ("near_mass", "wrong_mass")
CE_TEACHER = Method("Teacher CE", "large network, cross-entropy", ("teacher_rate",))
DUS_TEACHER = Method("Teacher DUS", "large network, DUSLoss", ("teacher_rate", "focal_weight", "entropy_weight"))
CE_STUDENT = Method("Student CE", "small network, cross-entropy on the labels", ("student_rate",))
SMOOTHED = Method("Label smoothing", "small network, cross-entropy on smoothed labels", ("student_rate", "smoothing"))
KD_FIXED = Method(
    "KD τ=2", "small network, logit distillation from Teacher CE, weights 0.8 and 0.2", _KD[:1], CE_TEACHER.name
)
KD = Method("KD", "small network, logit distillation from Teacher CE", _KD, CE_TEACHER.name)
KD_DUS = Method("KD + DUS", "small network, logit distillation from Teacher DUS", _KD, DUS_TEACHER.name)
KD_CLIP = Method("KD + W-Clip", "small network, W-Clip distillation from Teacher CE", _KD + _CLIP, CE_TEACHER.name)
CUD = Method("CUD", "small network, W-Clip distillation from Teacher DUS", _KD + _CLIP, DUS_TEACHER.name)
EXACT = Method("CUD exact", "small network, exact projection of Teacher DUS", _KD + _BOUNDS, DUS_TEACHER.name)


def rate_settings(method: Method, knobs: Knobs = KNOBS) -> list[dict[str, float]]:
    """Return settings with a low, a middle and a high learning rate and every other knob at its default."""
    defaults = {name: knobs[name].default for name in method.knobs}
    return [{**defaults, method.rate: knobs[method.rate].at(share)} for share in (0.0, 0.5, 1.0)]


def other_settings(
    method: Method, best: Setting, trials: int, seed: int, knobs: Knobs = KNOBS
) -> list[dict[str, float]]:
    """Return ``trials`` settings that keep the rate of ``best``: a Latin hypercube over the other knobs.

    A method without other knobs goes on with its rate. A knob's values depend on its name alone, so methods
    that share a knob try the same values of it.
    """
    drawn = [dict(best) for _ in range(trials)]
    for name in method.knobs[1:] or method.knobs:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        for setting, stratum in zip(drawn, rng.permutation(trials), strict=True):
            setting[name] = knobs[name].at((stratum + rng.random()) / trials)
    return drawn


def batch_loss(method: Method, setting: Setting, rows: Split, teacher: Tensor | None) -> BatchLoss:
    """Return the training loss of ``method``; ``teacher`` holds logits [S, V] of the strings of ``rows``."""
    label, string = rows.label, rows.string
    if method.teacher is not None:
        assert teacher is not None, f"{method.name} needs the logits of {method.teacher}"
        logits = teacher
        distil = distillation(setting)
        return lambda student, batch: distil(student, logits[string[batch]], label[batch])
    if "entropy_weight" in method.knobs:
        dus = DUSLoss(focal_weight=setting["focal_weight"], entropy_weight=setting["entropy_weight"])
        return lambda student, batch: dus(student, label[batch])
    smoothing = setting.get("smoothing", 0.0)
    return lambda student, batch: functional.cross_entropy(student, label[batch], label_smoothing=smoothing)


def distillation(setting: Setting, backend: Literal["auto", "native"] = "auto") -> CUDLoss:
    """Return the distillation loss of a setting; without knobs of a calibration it is plain logit KD."""
    calibration: WClip | Projection | None = None
    if "budget" in setting:
        calibration = WClip(setting["budget"], setting["margin"])
    elif "near_mass" in setting:
        calibration = Projection(min_near_mass=setting["near_mass"], max_wrong_mass=setting["wrong_mass"])
    fixed = {name: KNOBS[name].default for name in ("temperature", "kd_weight")}  # of a method without these knobs
    temperature, weight = (setting.get(name, default) for name, default in fixed.items())
    return CUDLoss(temperature, weight, 1 - weight, calibration=calibration, backend=backend)
