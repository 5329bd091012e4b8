"""What a backend is given and what it gives back: the contract between `functional`, `autograd` and `backends`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..classes.sets import ClassSets
from ..options import CUDOptions, DUSOptions
from .layout import row_count
from .shard import Shard

# Fields of a packed state, in the order of csrc/row/state.h; the teacher's top-1 travels beside them as an int64.
STUDENT_COLUMNS = ("m_t", "s_k", "m_s", "z_tau", "s_tau", "a", "s_one", "z_one", "t_y", "s_y", "impossible")
# What follows them when the target meets constraints; in the order of csrc/projected.h.
PROJECTED_COLUMNS = ("beta", "centre", "near", "wrong", "rest", "confidence", "prob", "target", "moved", "relaxed")
TEACHER_COLUMNS = ("m", "z", "e", "z_y")


_SETS = ("near", "wrong")


class Constraints(NamedTuple):
    """A `Projection` for one call. The bounds are NaN in rows without them."""

    near: ClassSets | None  # None: the label alone
    wrong: ClassSets | None
    top1: bool  # the wrong class is the teacher's top-1 where that is not near
    bounds: Tensor  # (N, 4) f64: min_near_mass, max_wrong_mass, min_entropy, max_entropy
    relax: bool
    entropy: bool  # whether some row may have a bound on its entropy

    def packed(self) -> tuple[list[Tensor], str]:
        """As tensors and a text: how they pass through a torch.library op."""
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
    """Which rows of a larger call: errors name them as its caller wrote them."""

    rows: Tensor  # (N,) int64, flat
    shape: torch.Size  # leading shape of the whole


class Rows(NamedTuple):
    """One call, checked and flattened: N rows of V classes."""

    logits: Tensor  # (..., >= V) student logits, or the logits of the teacher being fine-tuned
    target: Tensor | None  # (..., >= V) teacher logits of the student loss
    labels: Tensor | None  # (N,) int64
    weight: Tensor | None  # (N,) f64
    per_row: Tensor | None  # (N,) f64: temperature of the student loss, alpha of the teacher loss
    scalar: float  # stands for per_row where that is absent
    num_items: float | Tensor | None  # replaces both divisors of reduction="mean"; (2,) f64: one each
    classes: int  # V
    constraints: Constraints | None = None  # of the student loss's target, instead of W-Clip
    part: Part | None = None  # when these are some rows of a larger call

    @property
    def n(self) -> int:
        """N."""
        return row_count(self.logits)


class State(NamedTuple):
    """What the first sweep leaves behind, besides the loss."""

    sums: Tensor  # (N, columns), in the compute dtype
    top1: Tensor  # (N,) int64 for the student loss, (0,) for the teacher loss
    divisors: Tensor  # (2,) f64: of the KD term, of the label terms; (3,) of a shard, whose first class follows


class Backend(Protocol):
    """Two sweeps, and a product. Everything else about a loss is shared."""

    def row_state(
        self,
        rows: Rows,
        options: CUDOptions | DUSOptions,
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
        options: CUDOptions | DUSOptions,
        state: State,
        upstream: Tensor,
        gradient: Tensor,
    ) -> None:
        """Second sweep: writes `gradient` (..., >= V) for `upstream` () or (N,)."""

    def scale(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        """A gradient (..., >= V) for an upstream gradient of 1, in its own memory times `upstream` () or (...).

        0 stays 0 in rows that do not count.
        """


def columns_of(rows: Rows, options: CUDOptions | DUSOptions) -> tuple[str, ...]:
    """Fields of a packed state."""
    if not isinstance(options, CUDOptions):
        return TEACHER_COLUMNS
    return STUDENT_COLUMNS if rows.constraints is None else STUDENT_COLUMNS + PROJECTED_COLUMNS


def compute_dtype(rows: Rows) -> torch.dtype:
    """f64 when any logits are f64, else f32."""
    wide = rows.logits.dtype == torch.float64 or (rows.target is not None and rows.target.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def vector_dtype(device: torch.device) -> torch.dtype:
    """Dtype of the (N,) vectors: f64 wherever the device has it."""
    if device.type == "xpu":
        return torch.float64 if _has_f64(device) else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


@functools.cache
def _has_f64(device: torch.device) -> bool:
    return bool(torch.get_device_module(device).get_device_properties(device).has_fp64)


class Call(NamedTuple):
    """What a call asks for beyond its rows."""

    options: CUDOptions | DUSOptions
    statistics: bool
    grad_out: Tensor | None  # where the gradient goes, instead of fresh memory
    shard: Shard | None = None  # when other ranks hold more classes of the same rows
