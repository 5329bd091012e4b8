"""Cross-entropy with the label, smoothed or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..rows.fields import number
from .term import UNIFORM, Evaluated, RowValues, Term


@dataclass(frozen=True, eq=False, repr=False)
class Uniform(Term):
    """``-(1/n) sum_j c_j log p_j`` over the n classes with s_j > -inf: the share of the uniform distribution in a
    smoothed cross-entropy."""

    kind: ClassVar[int] = 7
    label: ClassVar[str] = "uniform"
    needs_label: ClassVar[bool] = True
    sums: ClassVar[int] = UNIFORM

    def evaluate(self, at: RowValues) -> Evaluated:
        return Evaluated(-at.uniform, uniform=-1.0)


@dataclass(frozen=True, eq=False, repr=False)
class CrossEntropy(Term):
    """``-log p_y`` at temperature 1, as `torch.nn.CrossEntropyLoss`; with smoothing e and class weights c::

        (1 - e) c_y (-log p_y) + (e / n) sum_j c_j (-log p_j)

    over the n classes with s_j > -inf: a class that is masked has no share. It equals `torch.nn.CrossEntropyLoss` where
    no class is masked.

    Args:
        label_smoothing: e in [0, 1]. Default 0. The argument `smoothing` of a call gives every row its own.
        class_weight: None, or c: a tensor (V,) with one value >= 0 per class, a persistent buffer of the loss. Default
            None: 1. As in PyTorch, the mean is then divided by the sum of the labels' c.
        name: key of the term in `stats.terms` and in `term_weights`. Default "cross_entropy".

    Gradient without both: ``p_j - 1[j = y]``. Divided by the sum of the labelled rows' weights, times c_y if given.

    Raises:
        TypeError, ValueError: a parameter out of range.

    Example:
        >>> CrossEntropy(label_smoothing=0.1) / 5
        0.2 * CrossEntropy(label_smoothing=0.1)
    """

    kind: ClassVar[int] = 1
    label: ClassVar[str] = "cross_entropy"
    needs_label: ClassVar[bool] = True
    per_class: ClassVar[str] = "class_weight"
    label_smoothing: float = 0.0
    class_weight: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "label_smoothing", 0, 1)
        c = self.class_weight
        if c is None:
            return
        if not isinstance(c, Tensor):
            raise TypeError(f"CrossEntropy(class_weight={c!r}): expected a torch.Tensor (V,), or None")
        if c.dim() != 1 or not c.dtype.is_floating_point:
            raise ValueError(f"class_weight is {c.dtype} {tuple(c.shape)}: expected floating point (V,)")

    def split(self) -> tuple[Term, Tensor | None]:
        if self.class_weight is None:
            return self, None
        return replace(self, class_weight=None), self.class_weight.detach()

    def pieces(self, smooths: bool) -> tuple[tuple[float, Term], ...]:
        plain = CrossEntropy(name=self.name)
        if smooths:
            return (1.0, plain), (1.0, Uniform())
        if self.label_smoothing == 0:
            return ((1.0, plain),)
        return (1 - self.label_smoothing, plain), (self.label_smoothing, Uniform())

    def evaluate(self, at: RowValues) -> Evaluated:
        return Evaluated(-at.log_p, log_p=-1.0)
