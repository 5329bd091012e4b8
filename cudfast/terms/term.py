"""A term of a loss: a function of a few values of a row, with its slopes. Sums of terms with coefficients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..rows.fields import NUMBERS

MOST = 8  # terms of one loss: csrc/row/terms/term.h


class RowValues(NamedTuple):
    """Values of rows. All but the divergences are of the student at temperature 1, or of the only model."""

    forward_kl: Tensor  # (N,) tau^2 KL(q || p)
    reverse_kl: Tensor  # (N,) tau^2 KL(p || q)
    log_p: Tensor  # (N,) log p_y
    entropy: Tensor  # (N,) nats
    lse: Tensor  # (N,) log sum exp(s)
    uniform: Tensor  # (N,) mean of c_j log p_j over the n classes with s_j > -inf


class Evaluated(NamedTuple):
    """The value of a term, and its derivatives with respect to the values of a row."""

    value: Tensor  # (N,)
    forward_kl: Tensor | float = 0.0
    reverse_kl: Tensor | float = 0.0
    log_p: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    lse: Tensor | float = 0.0
    uniform: Tensor | float = 0.0


# Sums that only some calls need: a mask. csrc/row/state.h has the same numbers.
TEACHER_ENTROPY, STUDENT_ENTROPY, REVERSE, UNIFORM, SQUARE = 4, 8, 16, 32, 64


class Terms(ABC):
    """Terms with coefficients: one, or a sum of several."""

    @abstractmethod
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """The terms, each with its coefficient."""

    def __mul__(self, factor: float) -> Sum:
        if isinstance(factor, Tensor):
            raise TypeError(
                "a term times a tensor: expected a number; a weight that changes between calls, or one per row, is an "
                "argument of the call: term_weights={name: tensor}"
            )
        if isinstance(factor, bool) or not isinstance(factor, NUMBERS):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"a term times {factor}: expected a finite number")
        return Sum(tuple((float(factor) * coefficient, term) for coefficient, term in self.parts()))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Sum:
        if isinstance(divisor, bool) or not isinstance(divisor, NUMBERS):
            return NotImplemented
        if divisor == 0:
            raise ValueError("a term divided by 0: expected a finite number that is not 0")
        return self * (1 / divisor)

    def __neg__(self) -> Sum:
        return self * -1.0

    def __add__(self, other: object) -> Sum:
        if isinstance(other, Terms):
            return Sum(self.parts() + other.parts())
        if isinstance(other, int) and other == 0:  # the start of sum()
            return Sum(self.parts())
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Terms) -> Sum:
        return self + -other if isinstance(other, Terms) else NotImplemented


@dataclass(frozen=True, eq=True)
class Sum(Terms):
    """A sum of terms with coefficients, as ``0.8 * ForwardKL() + 0.2 * CrossEntropy()`` makes it."""

    terms: tuple[tuple[float, Term], ...]

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return self.terms

    def __repr__(self) -> str:
        return " + ".join(f"{coefficient:g} * {term!r}" for coefficient, term in self.terms)


def _short(value: object) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Term(Terms):
    """One term of a loss. See docs/losses.md for what each is divided by. Terms with the same tensors are equal."""

    kind: ClassVar[int]  # csrc/row/terms/term.h
    label: ClassVar[str]  # the name of a term that is given none
    distils: ClassVar[bool] = False  # reads a divergence, which needs a teacher
    needs_label: ClassVar[bool] = False  # counts in labelled rows only
    per_class: ClassVar[str] = ""  # the field that may be a tensor (V,)
    sums: ClassVar[int] = 0  # that the term reads, of the mask above
    name: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.name is not None and (not isinstance(self.name, str) or not self.name.isidentifier()):
            raise ValueError(f"{type(self).__name__}(name={self.name!r}): expected an identifier, or None")

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Term) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return type(self), *(("tensor", id(value)) if isinstance(value, Tensor) else value for value in values)

    def __repr__(self) -> str:
        """The fields that differ from their defaults."""
        own = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "name" and not self._as_default(f))
        return f"{type(self).__name__}({', '.join(f'{key}={_short(value)}' for key, value in own)})"

    def _as_default(self, given: Field[Any]) -> bool:
        value = getattr(self, given.name)
        return not isinstance(value, Tensor) and bool(value == given.default)

    @property
    def parameters(self) -> tuple[float, float, float, float]:
        """The term's own numbers, as the kernels take them."""
        return 0.0, 0.0, 0.0, 0.0

    def split(self) -> tuple[Term, Tensor | None]:
        """The term without its tensor of one value per class, and that tensor."""
        return self, None

    def pieces(self, smooths: bool) -> tuple[tuple[float, Term], ...]:
        """What the kernels evaluate for this term, with factors. smooths: rows have smoothing of their own."""
        return ((1.0, self),)

    @abstractmethod
    def evaluate(self, at: RowValues) -> Evaluated:
        """Value and slopes in rows that the term counts in."""

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)


class Weighted(NamedTuple):
    """A term of a loss with its name and its coefficient."""

    name: str
    coefficient: float
    term: Term


class Piece(NamedTuple):
    """What the kernels evaluate: a term, or one of the two that a smoothed cross-entropy consists of."""

    name: str  # of the loss's term
    coefficient: float  # of the loss's term
    factor: float  # of this piece of it
    term: Term


def pieces_of(terms: Iterable[Weighted], smooths: bool) -> tuple[Piece, ...]:
    """All pieces of a loss.

    Raises:
        ValueError: more than `MOST`.
    """
    found = tuple(
        Piece(name, coefficient, factor, piece)
        for name, coefficient, term in terms
        for factor, piece in term.pieces(smooths)
    )
    if len(found) > MOST:
        raise ValueError(
            f"a loss of {len(found)} terms: expected at most {MOST}, where a cross-entropy with label smoothing counts "
            "as two"
        )
    return found


def named(terms: object) -> tuple[Weighted, ...]:
    """The terms of a loss.

    Raises:
        TypeError, ValueError: not a sum of terms, more than `MOST`, or two of the same name.
    """
    if not isinstance(terms, Terms):
        raise TypeError(
            f"terms: expected a sum of terms such as 0.8 * ForwardKL() + 0.2 * CrossEntropy(), got "
            f"{type(terms).__name__}"
        )
    found = tuple(Weighted(term.name or term.label, coefficient, term) for coefficient, term in terms.parts())
    if not 1 <= len(found) <= MOST:
        raise ValueError(f"a loss of {len(found)} terms: expected 1 to {MOST}")
    seen: set[str] = set()
    for name, _, term in found:
        if name in seen:
            raise ValueError(
                f"two terms are named {name!r}: give one of them another name, as in {type(term).__name__}(..., "
                f"name={name + '_2'!r})"
            )
        seen.add(name)
    return found


class Curve(NamedTuple):
    """A function of log p_y."""

    value: Tensor  # (N,)
    slope: Tensor  # (N,)
