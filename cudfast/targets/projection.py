"""The exact calibrated target, Eq. 2: its constraints, and the targets themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from torch import Tensor

from ..classes.arrays import first
from ..classes.sets import ClassSets

OnInfeasible = Literal["error", "relax"]
BOUNDS = ("min_near_mass", "max_wrong_mass", "min_entropy", "max_entropy")


@dataclass(frozen=True, eq=False)
class Projection:
    """The distribution nearest to the teacher's, in KL(q || p), that meets bounds on mass and entropy, Eq. 2.

    With p = softmax(teacher) at temperature 1, a labelled row's target q minimises KL(q || p) subject to::

        q(N) >= min_near_mass,   q(W) <= max_wrong_mass,   H(q) >= min_entropy

    where N are the classes near the label and W those known to be wrong. `max_entropy` is not a convex constraint: p
    is sharpened to p^(1/T), T <= 1, until the entropy is low enough; docs/projection.md states when the result is the
    nearest distribution. Entropy bounds are met to 1e-5 nats. Rows without a label keep their p. Two projections are
    equal only if they are the same object.

    Args:
        near: N(y) for every class y, which must contain y; None: N(y) = {y}.
        wrong: W(y) for every class y, disjoint from N(y) and thus made with include_label=False; "top1": the teacher's
            top-1 if it is not in N(y) (the paper's operational set); None: no wrong classes. Default "top1".
        min_near_mass, max_wrong_mass: in [0, 1]; numbers, or tensors of the labels' shape with one value per row.
        min_entropy, max_entropy: in nats, >= 0; numbers or tensors in the same way.
        on_infeasible: "error": a row that cannot meet its bounds raises ValueError with the row, the bound and the
            value that can be reached. "relax": the nearest feasible bound is used. Default "error".

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range; N(y) without y; W(y) with y; overlapping N(y)
            and W(y).

    Example:
        >>> Projection(min_near_mass=0.6, max_wrong_mass=0.1)
        Projection(min_near_mass=0.6, max_wrong_mass=0.1)
    """

    near: ClassSets | None = None
    wrong: ClassSets | Literal["top1"] | None = "top1"
    min_near_mass: float | Tensor | None = None
    max_wrong_mass: float | Tensor | None = None
    min_entropy: float | Tensor | None = None
    max_entropy: float | Tensor | None = None
    on_infeasible: OnInfeasible = "error"

    def __post_init__(self) -> None:
        for name in BOUNDS:
            _check_bound(name, getattr(self, name), 1.0 if name.endswith("mass") else math.inf)
        if self.on_infeasible not in get_args(OnInfeasible):
            raise ValueError(f"Projection(on_infeasible={self.on_infeasible!r}): expected 'error' or 'relax'")
        low, high = self.min_entropy, self.max_entropy
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
            raise ValueError(f"Projection(min_entropy={low}, max_entropy={high}): expected min_entropy <= max_entropy")
        if self.near is not None and not isinstance(self.near, ClassSets):
            raise TypeError(f"Projection(near=...): expected ClassSets or None, got {type(self.near).__name__}")
        if not (self.wrong is None or self.wrong == "top1" or isinstance(self.wrong, ClassSets)):
            raise TypeError(f"Projection(wrong=...): expected ClassSets, 'top1' or None, got {self.wrong!r}")
        if self.wrong is None and self.max_wrong_mass is not None:
            raise ValueError("Projection(max_wrong_mass=..., wrong=None): expected wrong='top1' or ClassSets")
        self._check_sets()

    @property
    def sets(self) -> list[ClassSets]:
        """The class sets that were given."""
        return [sets for sets in (self.near, self.wrong) if isinstance(sets, ClassSets)]

    def _check_sets(self) -> None:
        near, wrong = self.near, self.wrong
        if near is not None and (y := first(~near.contains_label())) is not None:
            raise ValueError(f"Projection(near=...): the set of class {y} does not hold {y}; use include_label=True")
        if not isinstance(wrong, ClassSets):
            return
        if (y_own := first(wrong.contains_label())) is not None:
            raise ValueError(
                f"Projection(wrong=...): class {y_own} is in its own set of wrong classes, where ClassSets.from_lists "
                "and the other constructors put it by default: pass include_label=False to the one that made these sets"
            )
        if near is None:
            return
        if near.num_classes != wrong.num_classes:
            raise ValueError(
                f"Projection: near has {near.num_classes} classes and wrong {wrong.num_classes}: expected the same"
            )
        if (y_both := near.overlap(wrong)) is not None:
            raise ValueError(
                f"Projection: the near and the wrong classes of class {y_both} overlap; expected disjoint sets"
            )

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        shown = ((n, f"tensor{tuple(v.shape)}" if isinstance(v, Tensor) else v, v is d or v == d) for n, v, d in given)
        return f"Projection({', '.join(f'{name}={value}' for name, value, same in shown if same is not True)})"


def _check_bound(name: str, value: object, high: float) -> None:
    what = f"Projection({name}=...)"
    expected = "a number in [0, 1]" if high == 1 else "a finite number >= 0"
    if value is None:
        return
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point or value.requires_grad:
            raise TypeError(f"{what}: expected a float tensor that does not require grad, one value per row")
        good = value.isfinite() & (value >= 0) & (value <= high)
        if not bool(good.all()):
            raise ValueError(f"{what}: {float(value[~good][0])} is not {expected}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: expected {expected} or a tensor of them, got {type(value).__name__}")
    if not (math.isfinite(value) and 0 <= value <= high):
        raise ValueError(f"Projection({name}={value}): expected {expected}")
