"""Reverse KL, the distillation term of MiniLLM (Gu et al.)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .forward_kl import ForwardKL
from .term import REVERSE, Evaluated, RowValues


@dataclass(frozen=True, eq=False, repr=False)
class ReverseKL(ForwardKL):
    """``tau^2 KL(p || q)``: from the student p to the calibrated teacher q, both tempered as in `ForwardKL`.

    It is infinite in rows with a class that the teacher excludes (a logit of -inf) and the student does not.
    ``0.5 * ForwardKL() + 0.5 * ReverseKL()`` is a mixture.

    Args:
        temperature, teacher_temperature: as in `ForwardKL`.
        name: key of the term in `stats.terms` and in `term_weights`. Default "reverse_kl".

    Gradient: ``tau p_j (log(p_j / q_j) - KL(p || q))``. Divided by the number of rows that are not excluded.

    Raises:
        TypeError, ValueError: a temperature out of range.

    Example:
        >>> ReverseKL(temperature=1.0)
        ReverseKL(temperature=1.0)
    """

    kind: ClassVar[int] = 6
    label: ClassVar[str] = "reverse_kl"
    sums: ClassVar[int] = REVERSE

    def evaluate(self, at: RowValues) -> Evaluated:
        return Evaluated(at.reverse_kl, reverse_kl=1.0)
