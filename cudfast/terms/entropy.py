"""Entropy, of all rows or through the difficulty gate of Eq. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..rows.fields import flag, number
from .term import STUDENT_ENTROPY, Curve, Evaluated, RowValues, Term


@dataclass(frozen=True)
class Gate:
    """The difficulty gate of Eq. 3, ``w = 1{p_y < threshold} + scale (1 - p_y)^power``.

    Args:
        threshold: the step is 1 in rows with p_y below it, in [0, 1]. Default 0.5 (ours; the paper leaves it open).
        scale: size of the ramp, >= 0. Default 1.0 (ours).
        power: exponent of the ramp, >= 0. Default 1.0 (ours).
        differentiate: let the gradient flow through the ramp (the step has none). Default False.

    Raises:
        TypeError, ValueError: a field out of range.

    Example:
        >>> Gate(threshold=0.3)
        Gate(threshold=0.3, scale=1.0, power=1.0, differentiate=False)
    """

    threshold: float = 0.5
    scale: float = 1.0
    power: float = 1.0
    differentiate: bool = False

    def __post_init__(self) -> None:
        number(self, "threshold", 0, 1)
        number(self, "scale", 0)
        number(self, "power", 0)
        flag(self, "differentiate")


def gate(log_p: Tensor, threshold: float, scale: float, power: float) -> Curve:
    """w, and the slope of its ramp with respect to log p.                                                    [gate]"""
    a = -torch.expm1(log_p)
    value = (1 - a < threshold).to(a.dtype) + scale * a**power
    if not power > 0:
        return Curve(value, torch.zeros_like(a))
    slope = -scale * power * a ** (power - 1) * (1 - a)
    return Curve(value, torch.where(a > 0, slope, 0))


@dataclass(frozen=True, eq=False, repr=False)
class Entropy(Term):
    """``H(p)`` in nats at temperature 1, the student's or the only model's; ``w H(p)`` with a gate (Eq. 3).

    A negative coefficient rewards entropy: ``CrossEntropy() - 0.1 * Entropy()`` is the confidence penalty.

    Args:
        gate: None, or a `Gate`, a weight that is larger in rows whose label has a small probability. Default None.
        name: key of the term in `stats.terms` and in `term_weights`. Default "entropy".

    Gradient: ``-w p_j (log p_j + H)``. Divided by the rows that are not excluded; with a gate, by the labelled rows
    (with `weight`, by the sums of their weights).

    Raises:
        TypeError: a gate that is not a `Gate`.

    Example:
        >>> -0.1 * Entropy()
        -0.1 * Entropy()
    """

    label: ClassVar[str] = "entropy"
    sums: ClassVar[int] = STUDENT_ENTROPY
    gate: Gate | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate is not None and not isinstance(self.gate, Gate):
            raise TypeError(f"Entropy(gate={self.gate!r}): expected Gate(threshold, scale, power) or None")

    @property
    def kind(self) -> int:  # type: ignore[override]
        return 3 if self.gate is None else 4

    @property
    def needs_label(self) -> bool:  # type: ignore[override]
        return self.gate is not None

    @property
    def parameters(self) -> tuple[float, float, float, float]:
        if self.gate is None:
            return super().parameters
        return self.gate.threshold, self.gate.scale, self.gate.power, float(self.gate.differentiate)

    def evaluate(self, at: RowValues) -> Evaluated:
        if self.gate is None:
            return Evaluated(at.entropy, entropy=1.0)
        w = gate(at.log_p, self.gate.threshold, self.gate.scale, self.gate.power)
        slope = w.slope * at.entropy if self.gate.differentiate else 0.0
        return Evaluated(w.value * at.entropy, log_p=slope, entropy=w.value)
