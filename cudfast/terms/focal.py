"""Focal loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..rows.fields import number
from .term import Curve, Evaluated, RowValues, Term


def focal(log_p: Tensor, gamma: float, alpha: float) -> Curve:
    """alpha (1 - p)^gamma (-log p), and its slope with respect to log p.                                    [focal]"""
    a = -torch.expm1(log_p)
    a_gamma = a**gamma
    ratio = torch.where(a > 0, log_p / a, -1)
    lost = log_p == -torch.inf
    return Curve(
        torch.where(lost, torch.inf, -alpha * a_gamma * log_p),
        torch.where(lost, -alpha, alpha * a_gamma * (gamma * (1 - a) * ratio - 1)),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Focal(Term):
    """``-alpha_y (1 - p_y)^gamma log p_y`` at temperature 1 (Lin et al., Eq. 3 of the paper).

    Args:
        gamma: exponent, >= 0. Default 10.0 (paper).
        alpha: scale > 0: a number, or a tensor (V,) with one value per class, a persistent buffer of the loss.
            Default 1.0 (paper).
        name: key of the term in `stats.terms` and in `term_weights`. Default "focal".

    Gradient: ``-s (p_j - 1[j = y])`` with s the slope in log p_y. Divided by the labelled rows (with `weight`, by the
    sum of their weights).

    Raises:
        TypeError, ValueError: a parameter out of range.

    Example:
        >>> Focal(gamma=2.0)
        Focal(gamma=2.0)
    """

    kind: ClassVar[int] = 2
    label: ClassVar[str] = "focal"
    needs_label: ClassVar[bool] = True
    per_class: ClassVar[str] = "alpha"
    gamma: float = 10.0
    alpha: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "gamma", 0)
        if not isinstance(self.alpha, Tensor):
            number(self, "alpha", 0, open_low=True)
        elif self.alpha.dim() == 0:
            object.__setattr__(self, "alpha", float(self.alpha))
            number(self, "alpha", 0, open_low=True)

    def split(self) -> tuple[Term, Tensor | None]:
        if not isinstance(self.alpha, Tensor):
            return self, None
        return replace(self, alpha=1.0), self.alpha.detach()

    @property
    def parameters(self) -> tuple[float, float, float, float]:
        return self.gamma, 1.0 if isinstance(self.alpha, Tensor) else self.alpha, 0.0, 0.0

    def evaluate(self, at: RowValues) -> Evaluated:
        found = focal(at.log_p, *self.parameters[:2])
        return Evaluated(found.value, log_p=found.slope)
