"""Rows that are computed in tiles of classes, the parts of a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..backends.parts import (
    Span,
    finished,
    inverse_temperatures,
    leaving,
    merge,
    rest_of,
    state_of,
    swept,
    weights_of,
    with_rest,
    write_gradient,
)
from ..backends.reference import Whole, mark
from ..options import RowOptions
from ..reference import StudentState
from ..rows.call import Backend, Rows, State


class Filled(NamedTuple):
    """Logits of a tile."""

    student: Tensor  # (R, C)
    teacher: Tensor | None  # (R, C)
    gradient: Tensor  # (R, C) for the student's gradient: the logits' memory, unless they are needed after the loss
    owns_teacher: bool  # the teacher's logits are a buffer of the call


class Work(NamedTuple):
    """A chunk of rows."""

    rows: Rows  # of all V classes
    options: RowOptions
    backend: Backend
    fill: Callable[[int, int], Filled]  # logits of the classes [first, last)
    step: int  # classes of a tile
    offset: int = 0  # the first class of all tiles

    def tiles(self) -> Iterator[tuple[Filled, Span]]:
        """Yields logits, and the part of the rows that they belong to."""
        for first in range(0, max(1, self.rows.classes), self.step):  # a rank may have no classes
            last = min(first + self.step, self.rows.classes)
            filled = self.fill(first, last)
            part = self.rows._replace(
                logits=filled.student,
                target=filled.teacher,
                classes=last - first,
                class_weight=weights_of(self.rows, self.offset + first, last - first),
            )
            yield filled, Span(part, self.offset + first)


def part_state(work: Work) -> Whole:
    """State of rows whose tiles are summed one after another."""
    marks = mark(work.rows, work.options)

    def state(filled: Filled, span: Span) -> Whole:
        return state_of(span, work.options, marks, swept(span.rows, work.options, work.backend))

    return _summed(work, state)


def part_rest(work: Work, k: Tensor) -> Whole:
    """The same without the teacher's logits of its top-1 k (R,) and of the label."""
    marks = mark(work.rows, work.options)

    def state(filled: Filled, span: Span) -> Whole:
        return rest_of(span, work.options, marks, k, work.backend, overwrites=filled.owns_teacher)

    return _summed(work, state)


def _summed(work: Work, state: Callable[[Filled, Span], Whole]) -> Whole:
    inverse = inverse_temperatures(work.rows, work.options)
    return functools.reduce(lambda a, b: merge(a, b, inverse), (state(*tile) for tile in work.tiles()))


def merged_state(work: Work, dtype: torch.dtype) -> tuple[Tensor, State]:
    """Losses (R,) and states of rows in the compute dtype, from all of their tiles."""
    rows, options, whole = work.rows, work.options, part_state(work)
    marks = mark(rows, options)
    there = leaving(rows, options, marks, whole)
    if there is not None and bool(there.any()):
        assert isinstance(whole, StudentState)
        whole = with_rest(rows, options, marks, whole, part_rest(work, whole.k), dtype)
    return finished(rows, options, marks, whole, cast(Tensor, rows.num_items), dtype)


def gradients(work: Work, state: State, upstream: Tensor) -> Iterator[tuple[int, Filled]]:
    """Yields each tile's first class and logits, after writing the gradient for `upstream` () or (R,)."""
    marks = mark(work.rows, work.options)
    for filled, span in work.tiles():
        write_gradient(span, work.options, marks, work.backend, state, upstream, filled.gradient)
        yield cast(int, span.first) - work.offset, filled
