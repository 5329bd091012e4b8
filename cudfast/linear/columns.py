"""Rows that are made some classes at a time: states of the parts merge, and each part has its share of the gradient.

A backend sees a part as rows of fewer classes. What such rows cannot say is added here: the label's logits, where the
label lives; and a column of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..backends.reference import mark, placed, student_rows, teacher_rows
from ..options import CUDOptions, DUSOptions
from ..reference import NOTHING, StudentState, TeacherState, student_merge, teacher_merge
from ..rows import Backend, Rows, State, vector_dtype


class Filled(NamedTuple):
    """Logits of a tile."""

    student: Tensor  # (R, C)
    teacher: Tensor | None  # (R, C)
    gradient: Tensor  # (R, C) for the student's gradient: its own memory unless it is needed after the loss


class Work(NamedTuple):
    """A chunk of rows."""

    rows: Rows  # of all V classes
    options: CUDOptions | DUSOptions
    backend: Backend
    fill: Callable[[int, int], Filled]  # logits of the classes [first, last)
    step: int  # classes of a tile

    def tiles(self) -> Iterator[tuple[int, Filled, Rows]]:
        """First class, logits, and the rows of that part (with labels of the whole)."""
        for first in range(0, self.rows.classes, self.step):
            last = min(first + self.step, self.rows.classes)
            filled = self.fill(first, last)
            part = self.rows._replace(logits=filled.student, target=filled.teacher, classes=last - first)
            yield first, filled, part


def _unpack(state: State, dtype: torch.dtype, options: CUDOptions | DUSOptions) -> StudentState | TeacherState:
    fields = state.sums.to(dtype).unbind(-1)
    return StudentState._make((*fields, state.top1)) if isinstance(options, CUDOptions) else TeacherState(*fields)


def merged_state(work: Work) -> tuple[Tensor, State]:
    """Losses (R,) and states of rows whose parts are folded one after the other, merged in f64."""
    rows, options = work.rows, work.options
    wide = vector_dtype(rows.logits.device)
    inv_tau = 1 / (rows.per_row if rows.per_row is not None else torch.tensor(rows.scalar, dtype=wide))
    marks = mark(rows, options)
    whole: StudentState | TeacherState | None = None
    for first, filled, part in work.tiles():
        alone = part._replace(labels=None, weight=None, num_items=None)
        _, packed = work.backend.row_state(alone, options, statistics=True, keep=True, gradient=None)
        assert packed is not None
        at, inside = placed(marks.column, first, part.classes)
        here = marks.labelled & inside.squeeze(-1)

        def label(logits: Tensor, at: Tensor = at, here: Tensor = here) -> Tensor:
            return torch.where(here, logits.gather(-1, at).squeeze(-1).to(wide), NOTHING)

        new = _unpack(packed, wide, options)
        if isinstance(new, StudentState):
            assert filled.teacher is not None
            new = new._replace(t_y=label(filled.teacher), s_y=label(filled.student), k=new.k + first)
            whole = new if whole is None else student_merge(cast(StudentState, whole), new, inv_tau)
        else:
            new = new._replace(z_y=label(filled.student))
            whole = new if whole is None else teacher_merge(cast(TeacherState, whole), new)
        dtype, top1 = packed.sums.dtype, packed.top1
    assert whole is not None
    divisors = cast(Tensor, rows.num_items)
    if isinstance(whole, StudentState):
        losses, _ = student_rows(rows, cast(CUDOptions, options), marks, whole, divisors, None)
        return losses.to(dtype), State(torch.stack(whole[:-1], -1).to(dtype), whole.k, divisors)
    losses, _ = teacher_rows(rows, cast(DUSOptions, options), marks, whole, divisors, None)
    return losses.to(dtype), State(torch.stack(whole, -1).to(dtype), top1, divisors)


def gradients(work: Work, state: State, upstream: Tensor) -> Iterator[tuple[int, Filled]]:
    """Every part in turn, its first class and its logits, the gradient for `upstream` () or (R,) written.

    A label or top-1 of another part is sent to this part's first column, whose gradient is then put right here.
    """
    rows, options = work.rows, work.options
    wide = vector_dtype(rows.logits.device)
    marks = mark(rows, options)
    whole = _unpack(state, wide, options)
    for first, filled, part in work.tiles():
        edge = part._replace(
            logits=filled.student[:, :1],
            target=None if filled.teacher is None else filled.teacher[:, :1],
            classes=1,
        )
        if isinstance(whole, StudentState):
            _, column = student_rows(
                edge, cast(CUDOptions, options), marks, whole, state.divisors, upstream.to(wide), first
            )
        else:
            _, column = teacher_rows(
                edge, cast(DUSOptions, options), marks, whole, state.divisors, upstream.to(wide), first
            )
        assert column is not None
        if part.labels is not None:
            label = placed(marks.column.squeeze(-1), first, part.classes)[0]
            part = part._replace(labels=torch.where(marks.labelled, label, part.labels))
        packed = state._replace(top1=placed(state.top1, first, part.classes)[0])
        work.backend.row_gradient(part, options, packed, upstream, filled.gradient)
        filled.gradient[:, :1] = column
        yield first, filled
