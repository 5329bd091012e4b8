"""Cross-entropy with the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .term import Evaluated, RowValues, Term


@dataclass(frozen=True)
class CrossEntropy(Term):
    """``-log p_y`` at temperature 1, as `torch.nn.CrossEntropyLoss`.

    Args:
        name: key of the term in `stats.terms` and in `term_weights`. Default "cross_entropy".

    Gradient: ``p_j - 1[j = y]``. Divided by the sum of the labelled rows' weights.

    Example:
        >>> CrossEntropy() / 5
        0.2 * CrossEntropy()
    """

    kind: ClassVar[int] = 1
    label: ClassVar[str] = "cross_entropy"
    needs_label: ClassVar[bool] = True

    def evaluate(self, at: RowValues) -> Evaluated:
        return Evaluated(-at.log_p, log_p=-1.0)
