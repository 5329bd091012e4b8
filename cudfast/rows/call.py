"""What a backend is given and what it gives back: the contract between `functional`, `autograd` and `backends`."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..classes.sets import ClassSets
from ..options import TEMPERATURES, CUDOptions, DUSOptions

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

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


def row_count(logits: Tensor) -> int:
    """N of (..., V). Not by Size.numel(), for which a traced graph holds for one number of rows; V may be 0."""
    return math.prod(logits.shape[:-1])


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


def masks(rows: Rows, options: CUDOptions | DUSOptions) -> tuple[Tensor, Tensor]:
    """(N,) bool: the row counts; it has a label, too."""
    n = math.prod(rows.logits.shape[:-1])  # not rows.n: torch 2.8 cannot trace properties of named tuples
    counts = torch.ones(n, dtype=torch.bool, device=rows.logits.device)
    if rows.weight is not None:
        counts = rows.weight != 0
    if rows.labels is None:
        return counts, torch.zeros_like(counts)
    counts = counts & (rows.labels != options.ignore_index)
    labelled = counts
    if options.unlabeled_index is not None:
        labelled = counts & (rows.labels != options.unlabeled_index)
    return counts, labelled


def divisors_of(rows: Rows, options: CUDOptions | DUSOptions) -> Tensor:
    """(2,) f64: what the distillation term and the label terms of a row are divided by."""
    dtype, device = vector_dtype(rows.logits.device), rows.logits.device
    if rows.num_items is not None:
        items: Tensor = torch.as_tensor(rows.num_items, dtype=dtype, device=device)
        return items.expand(2).clone()
    if options.reduction != "mean":
        return torch.ones(2, dtype=dtype, device=device)
    weight = rows.weight if rows.weight is not None else torch.ones(rows.n, dtype=dtype, device=device)
    return torch.stack([torch.where(mask, weight, 0).sum() for mask in masks(rows, options)])


def row_layout(logits: Tensor) -> tuple[int, int, int] | None:
    """How rows of (..., V) lie in memory: (inner rows, outer stride, inner stride) in elements.

    Row i starts at (i // inner) * outer + (i % inner) * inner_stride. None when the leading axes do not reduce to two
    strides or the last axis is not dense: such logits need a copy.
    """
    if logits.is_contiguous():
        return 1, logits.shape[-1], 0
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return None
    axes: list[tuple[int, int]] = []  # (size, stride), adjacent axes joined where they can be
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1]):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return None
    inner, inner_stride = axes[-1] if axes else (1, 0)
    return max(inner, 1), axes[0][1] if len(axes) == 2 else 0, inner_stride


def dense(logits: Tensor, name: str) -> Tensor:
    """(..., V) logits whose rows the kernels can walk: as they are, or copied."""
    if row_layout(logits) is not None:
        return logits
    size = logits.numel() * logits.element_size()
    warnings.warn(
        f"cudfast: {name} of shape {tuple(logits.shape)} and strides {logits.stride()} has no dense last axis or "
        f"too many leading strides; it is copied once per call ({size:,} bytes). Pass a tensor whose last axis is "
        "contiguous to avoid that.",
        stacklevel=2,
    )
    return logits.contiguous()


def row_name(rows: Rows, row: int) -> str:
    """Index of flat row `row` as the caller wrote it: "3", or "1, 3"."""
    shape = rows.logits.shape[:-1]
    if rows.part is not None:
        row, shape = int(rows.part.rows[row]), rows.part.shape
    index = np.unravel_index(row, shape or (1,))
    return ", ".join(str(int(i)) for i in index)


def refuse_label(rows: Rows, options: CUDOptions | DUSOptions, row: int, label: int) -> ValueError:
    """The error for a label that is neither a class nor one of the special values."""
    special = f"ignore_index={options.ignore_index}"
    if options.unlabeled_index is not None:
        special += f" or unlabeled_index={options.unlabeled_index}"
    hint = ""
    if label == rows.classes:
        hint = "; if the labels are 1-based, pass labels - 1"
    elif label == -100:
        hint = "; to ignore rows with label -100, pass ignore_index=-100"
    elif label == -1:
        hint = f"; to ignore rows without a label, give them the label {options.ignore_index}"
    return ValueError(
        f"labels[{row_name(rows, row)}] = {label}: expected a class in [0, {rows.classes}), {special}{hint}"
    )


def refuse_value(rows: Rows, options: CUDOptions | DUSOptions, name: str, row: int, value: float) -> ValueError:
    """The error for a weight, temperature or alpha out of range. `name` is "weight" or "per_row"."""
    if name == "weight":
        return ValueError(f"weight[{row_name(rows, row)}] = {value}: expected a finite number >= 0")
    if isinstance(options, CUDOptions):
        low, high = TEMPERATURES
        return ValueError(f"temperature[{row_name(rows, row)}] = {value}: expected a number in [{low:g}, {high:g}]")
    return ValueError(f"alpha of the label of row {row_name(rows, row)} is {value}: expected a finite number > 0")


def check_vectors(rows: Rows, options: CUDOptions | DUSOptions) -> None:
    """Raises for the first label, weight, temperature or alpha out of range, before any sweep; the host waits."""

    def first(bad: Tensor) -> int | None:
        return int(bad.nonzero()[0]) if bool(bad.any()) else None

    if rows.labels is not None:
        _, labelled = masks(rows._replace(weight=None), options)
        outside = labelled & ((rows.labels < 0) | (rows.labels >= rows.classes))
        if (row := first(outside)) is not None:
            raise refuse_label(rows, options, row, int(rows.labels[row]))
    low, high = TEMPERATURES if isinstance(options, CUDOptions) else (5e-324, torch.finfo(torch.float64).max)
    limits = {"weight": (0.0, torch.finfo(torch.float64).max), "per_row": (low, high)}
    for name, values in (("weight", rows.weight), ("per_row", rows.per_row)):
        if values is None:
            continue
        good = (values >= limits[name][0]) & (values <= limits[name][1])
        if (row := first(~good)) is not None:
            raise refuse_value(rows, options, name, row, float(values[row]))


def check_items(rows: Rows, options: CUDOptions | DUSOptions) -> None:
    """Raises for a num_items on the host that no sum over rows can be divided by."""
    items = rows.num_items
    if items is None or (isinstance(items, Tensor) and (items.dim() > 0 or not items.is_cpu)):
        return
    value = float(items)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"num_items={value:g}: expected a finite number >= 0")
    if value == 0 and rows.logits.is_cpu:
        counts, labelled = masks(rows, options)
        bad = counts if isinstance(options, CUDOptions) else labelled
        if bool(bad.any()):
            raise ValueError(
                f"num_items=0, and row {row_name(rows, int(bad.nonzero()[0]))} counts: expected the number of labels "
                "that are not ignore_index, in all the batches that one step accumulates"
            )
