"""The distillation term of Hinton et al. and of Eq. 9."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..rows.fields import TEMPERATURES, number
from .term import Evaluated, RowValues, Term


@dataclass(frozen=True, eq=False, repr=False)
class ForwardKL(Term):
    """``tau^2 KL(q || p)``: from the calibrated teacher q to the student p, both at temperature tau (Eq. 9).

    Args:
        temperature: tau in [1e-4, 1e4]. Default 2.0. Distillation terms of one loss have the same temperatures; the
            argument `temperature` of a call overrides it. 1, 2 and 4 are fastest.
        teacher_temperature: tau_t in [1e-4, 1e4], the temperature of q alone, which a call's `temperature` leaves as it
            is; tau^2 is the student's. Default None: tau, also where a call overrides it.
        name: key of the term in `stats.terms` and in `term_weights`. Default "forward_kl".

    Gradient: ``tau (p_j - q_j)``. Divided by the number of rows that are not excluded.

    Raises:
        TypeError, ValueError: a temperature out of range.

    Example:
        >>> 0.8 * ForwardKL(temperature=4.0)
        0.8 * ForwardKL(temperature=4.0)
    """

    kind: ClassVar[int] = 0
    label: ClassVar[str] = "forward_kl"
    distils: ClassVar[bool] = True
    temperature: float = 2.0
    teacher_temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "temperature", *TEMPERATURES)
        if self.teacher_temperature is not None:
            number(self, "teacher_temperature", *TEMPERATURES)

    def evaluate(self, at: RowValues) -> Evaluated:
        return Evaluated(at.forward_kl, forward_kl=1.0)
