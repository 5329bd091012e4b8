"""Rows that are computed in tiles of classes, the parts of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..backends.parts import Span, finished, inverse_temperature, merge, state_of, swept, write_gradient
from ..backends.reference import Whole, mark
from ..options import RowOptions
from ..rows.call import Backend, Rows, State, compute_dtype


class Filled(NamedTuple):
    """Logits of a tile."""

    student: Tensor  # (R, C)
    teacher: Tensor | None  # (R, C)
    gradient: Tensor  # (R, C) for the student's gradient: the logits' memory, unless they are needed after the loss


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
            part = self.rows._replace(logits=filled.student, target=filled.teacher, classes=last - first)
            yield filled, Span(part, self.offset + first)


def part_state(work: Work) -> tuple[Whole, torch.dtype]:
    """State of rows whose tiles are summed one after another, and the compute dtype."""
    rows, options = work.rows, work.options
    marks, inv_tau = mark(rows, options), inverse_temperature(rows)
    whole: Whole | None = None
    for _, span in work.tiles():
        new = state_of(span, options, marks, swept(span.rows, options, work.backend))
        whole = new if whole is None else merge(whole, new, inv_tau)
        dtype = compute_dtype(span.rows)
    assert whole is not None
    return whole, dtype


def merged_state(work: Work) -> tuple[Tensor, State]:
    """Losses (R,) and states of rows, from all of their tiles."""
    whole, dtype = part_state(work)
    rows = work.rows
    return finished(rows, work.options, mark(rows, work.options), whole, cast(Tensor, rows.num_items), dtype)


def gradients(work: Work, state: State, upstream: Tensor) -> Iterator[tuple[int, Filled]]:
    """Yields each tile's first class and logits, after writing the gradient for `upstream` () or (R,)."""
    marks = mark(work.rows, work.options)
    for filled, span in work.tiles():
        write_gradient(span, work.options, marks, work.backend, state, upstream, filled.gradient)
        yield cast(int, span.first) - work.offset, filled
