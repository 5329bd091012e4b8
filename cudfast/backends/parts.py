"""Rows whose classes are divided into parts, the tiles of one process or the shards of several processes: the states of
the parts are merged, and each part has its own gradient.

A backend processes a part like rows with fewer classes. This module adds the label's logits in the part that contains
the label, and corrects one column of the gradient if the label or the teacher's top-1 is in another part.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..options import RowOptions
from ..reference import (
    NOTHING,
    Rest,
    StudentState,
    TeacherState,
    clip_of,
    leaves,
    student_merge,
    teacher_inverse,
    teacher_merge,
)
from ..rows.call import RECALIBRATED, Backend, Rows, State, columns_of, compute_dtype, recalibrates, vector_dtype
from .reference import Marks, Whole, finished_rows, packed, placed, recalibrated_where, unpacked

_LOGITS = ("m_t", "s_k", "m_s", "t_y", "s_y")  # columns of a state that are logits, not sums


def weights_of(rows: Rows, first: int | Tensor, width: int) -> Tensor | None:
    """The weights of the classes [first, first + width)."""
    if rows.class_weight is None:
        return None
    return rows.class_weight[int(first) : int(first) + width]


class Span(NamedTuple):
    """The classes [first, first + rows.classes) of rows whose labels are numbers among all classes."""

    rows: Rows
    first: int | Tensor  # (), int64


@functools.lru_cache(maxsize=256)
def _of_part(options: RowOptions) -> RowOptions:
    """Options of a part, with special labels that no label relative to its first class can equal."""
    unlabeled = None if options.unlabeled_index is None else -1
    return dataclasses.replace(
        options, reduction="none", num_classes=None, ignore_index=-100, unlabeled_index=unlabeled
    )


class Inverse(NamedTuple):
    """Inverse temperatures of rows, () or (N,)."""

    teacher: Tensor
    student: Tensor


def inverse_temperatures(rows: Rows, options: RowOptions) -> Inverse:
    """1 / tau_t and 1 / tau of the rows."""
    tau = rows.temperature
    if tau is None:
        tau = torch.tensor(rows.scalar, dtype=vector_dtype(rows.logits.device), device=rows.logits.device)
    return Inverse(teacher_inverse(tau, options), 1 / tau)


def swept(rows: Rows, options: RowOptions, backend: Backend) -> State:
    """One part's packed state, from one sweep over it, without the label."""
    if rows.classes == 0:
        return _nothing(rows, options)
    alone = rows._replace(labels=None, weight=None, coefficients=None, num_items=None)
    _, found = backend.row_state(alone, _of_part(options), statistics=True, keep=True, gradient=None)
    assert found is not None
    return found


def _nothing(rows: Rows, options: RowOptions) -> State:
    """The state of a part without classes."""
    device = rows.logits.device
    empty = dict.fromkeys(_LOGITS, NOTHING) | {RECALIBRATED: torch.inf}
    row = torch.tensor(
        [empty.get(column, 0) for column in columns_of(rows, options)],
        dtype=compute_dtype(rows),
        device=device,
    )
    top1 = torch.zeros(0 if rows.target is None else rows.n, dtype=torch.int64, device=device)
    return State(row.repeat(rows.n, 1), top1, torch.ones(2, dtype=vector_dtype(device), device=device))


def state_of(span: Span, options: RowOptions, marks: Marks, swept: State) -> Whole:
    """One part's state, with the label's logits if the part contains the label."""
    rows, first = span
    at, inside = placed(marks.column, first, rows.classes)
    here = marks.labelled & inside.squeeze(-1)
    wide = vector_dtype(rows.logits.device)

    def label(logits: Tensor) -> Tensor:
        if rows.classes == 0:
            return torch.full_like(marks.weights.rows, NOTHING, dtype=wide)
        value = logits.gather(-1, at.reshape(*logits.shape[:-1], 1))
        return torch.where(here, value.reshape(-1).to(wide), NOTHING)

    found = unpacked(rows, options, swept, wide)
    if isinstance(found, TeacherState):
        return found._replace(s_y=label(rows.logits))
    assert rows.target is not None
    return found._replace(t_y=label(rows.target), s_y=label(rows.logits), k=found.k + first)


def merge(left: Whole, right: Whole, inverse: Inverse) -> Whole:
    """The state of two disjoint parts together."""
    if isinstance(left, StudentState):
        return student_merge(left, cast(StudentState, right), *inverse)
    return teacher_merge(left, cast(TeacherState, right))


def leaving(rows: Rows, options: RowOptions, marks: Marks, whole: Whole) -> Tensor | None:
    """(N,) bool: the rows whose sums have to be computed again without the top-1; None if there can be none."""
    if not recalibrates(rows, options):
        return None
    assert isinstance(whole, StudentState)
    return leaves(whole, clip_of(whole, marks.labelled, options), *inverse_temperatures(rows, options))


def rest_of(
    span: Span, options: RowOptions, marks: Marks, k: Tensor, backend: Backend, *, overwrites: bool = False
) -> Whole:
    """One part's state without the teacher's logits of its top-1 k (N,) and of the label.

    overwrites: the teacher's logits are a buffer, so they need no copy.
    """
    rows, first = span
    assert rows.target is not None
    if rows.classes:
        target = rows.target if overwrites else rows.target.clone()
        for index in (k.unsqueeze(-1), marks.column):
            at, inside = (x.reshape(*target.shape[:-1], 1) for x in placed(index, first, rows.classes))
            target.scatter_(-1, at, torch.where(inside, NOTHING, target.gather(-1, at)))
        rows = rows._replace(target=target)
    return state_of(Span(rows, first), options, marks, swept(rows, options, backend))


def with_rest(
    rows: Rows, options: RowOptions, marks: Marks, whole: Whole, rest: Whole, dtype: torch.dtype
) -> Whole:
    """The state of rows, calibrated where the top-1 leaves; rest: the merged states that `rest_of` made; dtype: that
    in which the state will be packed."""
    assert isinstance(whole, StudentState)
    assert isinstance(rest, StudentState)
    clip = clip_of(whole, marks.labelled, options)
    without_top1 = Rest(rest.m_t, rest.z_tau, rest.a)
    return recalibrated_where(whole, clip, without_top1, *inverse_temperatures(rows, options), dtype)


def finished(
    rows: Rows, options: RowOptions, marks: Marks, whole: Whole, divisors: Tensor, dtype: torch.dtype
) -> tuple[Tensor, State]:
    """Losses (N,) of rows whose parts have all been merged, and their packed states."""
    losses, _ = finished_rows(rows, options, marks, whole, divisors, None)
    state = packed(rows, options, whole, divisors)
    return losses.to(dtype), state._replace(sums=state.sums.to(dtype))


def write_gradient(
    span: Span,
    options: RowOptions,
    marks: Marks,
    backend: Backend,
    state: State,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """Writes one part's gradient (..., >= C) for `upstream` () or (N,), given the packed states of whole rows.

    A label or top-1 of another part is mapped to this part's first column, whose gradient is then corrected.
    """
    rows, first = span
    wide = vector_dtype(upstream.device)
    whole = unpacked(rows, options, state, wide)
    edge = rows._replace(
        logits=rows.logits[..., :1],
        target=None if rows.target is None else rows.target[..., :1],
        class_weight=None if rows.class_weight is None else rows.class_weight[:1],
        classes=1,
    )
    _, column = finished_rows(edge, options, marks, whole, state.divisors, upstream.to(wide), first)
    assert column is not None
    if rows.labels is not None:
        at = placed(marks.column.squeeze(-1), first, rows.classes)[0]
        rows = rows._replace(labels=torch.where(marks.labelled, at, torch.where(marks.ignored, -100, -1)))
    moved = state._replace(top1=placed(state.top1, first, rows.classes)[0])
    backend.row_gradient(rows, _of_part(options), moved, upstream, gradient)
    gradient[..., :1] = column.reshape(*gradient.shape[:-1], 1)
