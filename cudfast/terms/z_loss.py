"""The squared log-partition function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .term import Evaluated, RowValues, Term


@dataclass(frozen=True, eq=False, repr=False)
class ZLoss(Term):
    """``(log sum_j e^(s_j))^2`` at temperature 1, which keeps logits from drifting (z-loss).

    Args:
        name: key of the term in `stats.terms` and in `term_weights`. Default "z_loss".

    Gradient: ``2 lse p_j``. Divided by the number of rows that are not excluded.

    Example:
        >>> 1e-4 * ZLoss()
        0.0001 * ZLoss()
    """

    kind: ClassVar[int] = 5
    label: ClassVar[str] = "z_loss"

    def evaluate(self, at: RowValues) -> Evaluated:
        return Evaluated(at.lse * at.lse, lse=2 * at.lse)
