"""Inputs and outputs of a backend: the interface between `functional`, `autograd` and `backends`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..classes.sets import ClassSets
from ..options import RowOptions
from ..terms.term import REVERSE, SQUARE, STUDENT_ENTROPY, TEACHER_ENTROPY, UNIFORM
from .layout import row_count
from .shard import Shard

# Fields of a packed state. Rows without a target have OWN_COLUMNS, rows with one STUDENT_COLUMNS; then those of the sums
# that the options need, in this order, RECALIBRATED if the call `recalibrates`, and PROJECTED_COLUMNS (csrc/projected.h)
# if the target has constraints. The order is that of csrc/row/state.h; the teacher's top-1 is a separate int64 tensor.
OWN_COLUMNS = ("m_s", "s_one", "e_s", "s_y")
STUDENT_COLUMNS = ("m_t", "s_k", "m_s", "z_tau", "s_tau", "a", "s_one", "z_one", "t_y", "s_y", "impossible")
_OF_SUMS = {
    STUDENT_ENTROPY: ("e_s",),
    TEACHER_ENTROPY: ("e_t",),
    SQUARE: ("s_two",),
    REVERSE: ("b", "missing"),
    UNIFORM: ("uniform", "share", "possible"),
}
RECALIBRATED = "m_q"
PROJECTED_COLUMNS = ("beta", "centre", "near", "wrong", "rest", "confidence", "prob", "target", "moved", "relaxed")
SHARDED_COLUMNS = ("near_centre", "wrong_centre")  # and these, if ranks hold the classes


_SETS = ("near", "wrong")


class Constraints(NamedTuple):
    """A `Projection` for one call. Bounds are NaN in rows that have none."""

    near: ClassSets | None  # None: the label alone
    wrong: ClassSets | None
    top1: bool  # the wrong class is the teacher's top-1, unless that is near
    bounds: Tensor  # (N, 4) f64: min_near_mass, max_wrong_mass, min_entropy, max_entropy
    relax: bool
    entropy: bool  # whether any row may have a bound on its entropy

    def packed(self) -> tuple[list[Tensor], str]:
        """Tensors and a text, the form in which a torch.library op takes them."""
        tensors, flags = [self.bounds], []
        for name, sets in zip(_SETS, (self.near, self.wrong)):
            if sets is not None:
                tensors += [sets.offsets, sets.indices]
                flags.append(name)
        flags += [name for name in ("top1", "relax", "entropy") if getattr(self, name)]
        return tensors, " ".join(flags)

    @classmethod
    def unpacked(cls, tensors: Sequence[Tensor], flags: str) -> Constraints | None:
        """Inverse of `packed`; None for no tensors."""
        if not tensors:
            return None
        given, rest = flags.split(), iter(tensors)
        bounds = next(rest)
        near, wrong = (ClassSets.trusted(next(rest), next(rest)) if name in given else None for name in _SETS)
        return cls(near, wrong, "top1" in given, bounds, "relax" in given, "entropy" in given)


class Part(NamedTuple):
    """Rows of a larger call; errors use the row indices of that call."""

    rows: Tensor  # (N,) int64, flat
    shape: torch.Size  # leading shape of the whole


class Rows(NamedTuple):
    """One call, checked and flattened: N rows of V classes."""

    logits: Tensor  # (..., >= V) student logits, or the logits of the teacher being fine-tuned
    target: Tensor | None  # (..., >= V) teacher logits
    labels: Tensor | None  # (N,) int64
    weight: Tensor | None  # (N,) f64
    temperature: Tensor | None  # (N,) f64
    coefficients: Tensor | None  # (T, N) or (T, 1) f64 of the pieces of terms; None: those of the options
    scalar: float  # the temperature of all rows, if `temperature` is None
    num_items: float | Tensor | None  # replaces both divisors of reduction="mean"; (2,) f64: one each
    classes: int  # V
    constraints: Constraints | None = None  # of the target, instead of W-Clip
    class_weight: Tensor | None = None  # (V,) in the compute dtype, of the uniform share of a smoothed cross-entropy
    part: Part | None = None  # if these are some rows of a larger call

    @property
    def n(self) -> int:
        """N."""
        return row_count(self.logits)


class State(NamedTuple):
    """The output of the first sweep besides the loss."""

    sums: Tensor  # (N, columns), in the compute dtype
    top1: Tensor  # (N,) int64 of the target, (0,) without one
    divisors: Tensor  # (2,) f64: of terms of all rows, of labelled rows; for a shard (3,), with its first class


class Backend(Protocol):
    """Two sweeps, and a product. All backends share everything else of a loss."""

    def row_state(
        self,
        rows: Rows,
        options: RowOptions,
        *,
        statistics: bool,
        keep: bool,
        gradient: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """First sweep: the loss, () or (N,) for reduction="none", in the compute dtype, and the state when `keep`.

        With `gradient` (..., >= V), also the gradient for an upstream gradient of 1.
        """

    def row_gradient(
        self,
        rows: Rows,
        options: RowOptions,
        state: State,
        upstream: Tensor,
        gradient: Tensor,
    ) -> None:
        """Second sweep: writes `gradient` (..., >= V) for `upstream` () or (N,)."""

    def scale(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        """Multiplies a gradient (..., >= V) for an upstream gradient of 1 by `upstream` () or (...), in place.

        Elements that are 0 in excluded rows remain 0.
        """


def columns_of(rows: Rows, options: RowOptions, *, sharded: bool = False) -> tuple[str, ...]:
    """The fields of a packed state. sharded: other ranks hold more classes."""
    own = rows.target is None
    found: tuple[str, ...] = OWN_COLUMNS if own else STUDENT_COLUMNS
    for sums, names in _OF_SUMS.items():
        if options.sums & sums and not (own and sums in (STUDENT_ENTROPY, TEACHER_ENTROPY, REVERSE)):
            found = (*found, *names)
    if recalibrates(rows, options):
        found = (*found, RECALIBRATED)
    if rows.constraints is None or own:
        return found
    return (*found, *PROJECTED_COLUMNS, *SHARDED_COLUMNS) if sharded else (*found, *PROJECTED_COLUMNS)


def recalibrates(rows: Rows, options: RowOptions) -> bool:
    """Whether W-Clip may take a top-1 that dominates the teacher's tempered sums, so that a row's have to be summed
    again without it."""
    if options.leaving == 0 or rows.target is None:
        return False
    if options.teacher_temperature is not None:
        return options.teacher_temperature < options.leaving
    return rows.temperature is not None or rows.scalar < options.leaving


def compute_dtype(rows: Rows) -> torch.dtype:
    """f64 if any logits are f64, otherwise f32."""
    wide = rows.logits.dtype == torch.float64 or (rows.target is not None and rows.target.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def vector_dtype(device: torch.device) -> torch.dtype:
    """Dtype of the (N,) vectors: f64 if the device supports it."""
    if device.type == "xpu":
        return torch.float64 if _has_f64(device) else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def coefficients(rows: Rows, options: RowOptions) -> Tensor:
    """(T, N) or (T, 1) coefficients of the terms, as a tensor also where the call has none of its own."""
    if rows.coefficients is not None:
        return rows.coefficients
    logits, dtype = rows.logits, vector_dtype(rows.logits.device)  # made from the logits, which may be fake
    values = [logits.new_full((1,), coefficient, dtype=dtype) for coefficient in options.coefficients]
    return torch.stack(values) if values else logits.new_empty((0, 1), dtype=dtype)


@functools.cache
def _has_f64(device: torch.device) -> bool:
    return bool(torch.get_device_module(device).get_device_properties(device).has_fp64)


class Call(NamedTuple):
    """The arguments of a call besides its rows."""

    options: RowOptions
    statistics: bool
    grad_out: Tensor | None  # memory for the gradient, instead of a new tensor
    shard: Shard | None = None  # if other ranks hold more classes of the same rows
