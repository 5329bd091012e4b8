"""The computation: chunks of rows, the logits of a tile in reused buffers, and their gradients.

for each chunk of the rows that are not ignored
    student = hidden @ weight.T                      a product
    teacher = teacher_hidden @ teacher_weight.T      a product, unless logits were given
    student = loss(student, teacher)                 its gradient, in place of the student's logits
    d_hidden = student @ weight                      a product
    d_weight += student.T @ hidden                   a product
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autograd.memory import empty
from ..backends.reference import Whole
from ..distributed.group import telling
from ..distributed.sharded import agreed, cut, over_ranks
from ..options import RowOptions
from ..rows.call import Backend, State, columns_of, compute_dtype, recalibrates
from ..rows.vectors import check_finite, check_vectors, divisors_of, masks
from . import tiles
from .chunks import Chunk, chunks, flat
from .columns import Filled, Work, gradients, merged_state, part_rest, part_state
from .gradients import Found, Gradients
from .layers import Needs, Problem

_CALL = 256  # bytes per row of the call: packed states, losses, labels, weights
_MERGE = 1024  # bytes per row of a tile while states are merged, in f64
_REFERENCE = 14  # largest number of temporary (R, C) matrices of the compute dtype, where PyTorch replaces a kernel


class Swept(NamedTuple):
    """The results of a sweep."""

    losses: Tensor | None  # (N,) in the compute dtype, 0 in ignored rows; None if the states were given
    state: State  # of all N rows
    gradients: Found


@functools.lru_cache(maxsize=256)
def _per_row(options: RowOptions) -> RowOptions:
    """The options of a chunk: the divisors are part of its rows."""
    return dataclasses.replace(options, reduction="none", num_classes=None)


def cost(p: Problem, needs: Needs, backend: Backend, *, compacted: bool) -> tiles.Cost:
    """The memory that a tile needs."""
    weight, target = p.student.weight, p.rows.target
    logit = sum(head.dtype.itemsize for head in p.heads)
    if p.teacher is None and target is not None:
        copies = int(compacted or flat(target) is None) + int(recalibrates(p.rows, p.options))
        logit += copies * target.dtype.itemsize
    if p.student.softcap is not None and any(needs):
        logit += p.student.dtype.itemsize
    by_torch = backend is backends.load("reference")
    if by_torch:
        logit += _REFERENCE * compute_dtype(p.rows).itemsize
    row = _MERGE + sum(h.weight.shape[1] * (h.weight.dtype.itemsize + h.dtype.itemsize) for h in p.heads)
    row += weight.shape[1] * (p.student.dtype.itemsize + p.wide.itemsize)
    blocks = [2 * h.block * h.weight.shape[1] * h.dtype.itemsize for h in p.heads if h.widens]
    carried = 0
    if needs.weight and p.wide != weight.dtype:
        carried = weight.numel() * p.wide.itemsize
        blocks.append(2 * p.student.block * weight.shape[1] * p.wide.itemsize)
    fixed = _CALL * p.rows.n + max(blocks, default=0) + (weight.shape[0] * p.wide.itemsize if needs.bias else 0)
    return tiles.Cost(logit, row, fixed, carried)


class _Buffers:
    """Memory for the logits of a tile, shared by all tiles."""

    def __init__(self, p: Problem, tile: tiles.Tile, needs: Needs) -> None:
        self._p, device = p, p.rows.logits.device
        size = (tile.rows * tile.classes,)
        self._student = empty(size, p.student.dtype, device)
        self._teacher = None if p.teacher is None else empty(size, p.teacher.dtype, device)
        capped = p.student.softcap is not None and any(needs)
        self._gradient = empty(size, p.student.dtype, device) if capped else self._student

    def fill(self, hidden: Tensor, other: Tensor | None, first: int, last: int) -> Filled:
        """Logits (R, C) of the classes [first, last); other: the teacher's hidden states or logits."""

        def view(buffer: Tensor) -> Tensor:
            return buffer[: len(hidden) * (last - first)].view(len(hidden), last - first)

        student = view(self._student)
        self._p.student.logits(hidden, first, student)
        teacher = None if other is None else other[:, first:last]
        if self._p.teacher is not None and self._teacher is not None and other is not None:
            teacher = view(self._teacher)
            self._p.teacher.logits(other, first, teacher)
        return Filled(student, teacher, view(self._gradient), self._teacher is not None)


def _hidden(chunk: Chunk, p: Problem) -> tuple[Tensor, Tensor | None]:
    """The student's hidden states (R, Ds) and the teacher's (R, Dt) or its logits, as inputs of the products."""
    other = None if p.rows.target is None else chunk.matrix(p.rows.target)
    if other is not None and p.teacher is not None:
        other = other.to(p.teacher.dtype)
    return chunk.matrix(p.rows.logits).to(p.student.dtype), other


def _packed(chunk: Chunk, state: State) -> State:
    top1 = chunk.vector(state.top1) if len(state.top1) else state.top1
    return State(chunk.vector(state.sums), top1, state.divisors[:2])


def _no_gradients(p: Problem, needs: Needs) -> Found:
    """The gradients of a rank without classes."""
    tensors = (p.rows.logits, p.student.weight, p.student.bias)
    hidden, weight, bias = (
        None if x is None or not wanted else torch.zeros_like(x) for x, wanted in zip(tensors, needs)
    )
    return hidden, weight, bias


def _chunk(
    work: Work,
    packed: State | None,
    upstream: Tensor,
    dtype: torch.dtype,
    *,
    cut: bool,
    statistics: bool,
    wanted: bool,
) -> tuple[Tensor | None, State, Iterable[tuple[int, Filled]]]:
    """Losses (R,) unless the states are given, states, and the tiles with their gradients if those are needed."""
    loss = None
    if cut:
        if packed is None:
            loss, packed = merged_state(work, dtype)
        return loss, packed, gradients(work, packed, upstream) if wanted else ()
    filled = work.fill(0, work.rows.classes)
    rows = work.rows._replace(logits=filled.student, target=filled.teacher)
    if packed is None:
        gradient = filled.gradient if wanted else None
        loss, packed = work.backend.row_state(rows, work.options, statistics=statistics, keep=True, gradient=gradient)
        assert packed is not None
    elif wanted:
        work.backend.row_gradient(rows, work.options, packed, upstream, filled.gradient)
    return loss, packed, [(0, filled)] if wanted else ()


@torch.no_grad()
def sweep(
    p: Problem, needs: Needs, *, statistics: bool, state: State | None = None, upstream: Tensor | None = None
) -> Swept:
    """Losses, states and gradients; or, given the states of an earlier sweep, gradients for `upstream` () or (N,).

    Raises:
        ValueError: a label, weight, temperature or coefficient out of range; a budget that is too small; and errors of
            the backend.
    """
    options, device = _per_row(p.options), p.rows.logits.device
    backend = backends.choose(options.backend, device)
    first = 0
    if p.shard is None:
        check_vectors(p.rows, options)
    counts, _ = masks(p.rows, options)
    index = None if bool(counts.all()) else counts.nonzero().squeeze(-1)
    count = p.rows.n if index is None else len(index)
    with telling(p.shard if state is None else None):
        tile = tiles.choose(
            count,
            p.rows.classes,
            cost(p, needs, backend, compacted=index is not None),
            p.linear.bytes,
            whole=p.rows.constraints is not None,
        )
    if p.shard is not None:
        first = agreed(p.shard, p.rows, p.options) if state is None else int(state.divisors[2])
        p = p._replace(rows=cut(p.rows, p.options, first))
    rows = p.rows
    parted = p.shard is not None or tile.classes < rows.classes
    dtype = compute_dtype(rows)
    losses, given = None, state
    if given is None:
        losses = torch.zeros(rows.n, dtype=dtype, device=device)
        sums = torch.zeros((rows.n, len(columns_of(rows, options))), dtype=dtype, device=device)
        top1 = torch.zeros(0 if rows.target is None else rows.n, dtype=torch.int64, device=device)
        state = State(sums, top1, divisors_of(rows, p.options))
    assert state is not None
    kept = state
    divisors = state.divisors[:2]
    if upstream is None:
        upstream = torch.ones((), dtype=dtype, device=device)
    found = Gradients(p, needs, cut=parted, chunks=-(-count // tile.rows))
    buffers = _Buffers(p, tile, needs) if count else None

    def work_of(chunk: Chunk) -> tuple[Tensor, Work]:
        assert buffers is not None
        hidden, other = _hidden(chunk, p)
        rows_here = chunk.rows(rows, divisors)._replace(logits=hidden, target=other)
        fill = functools.partial(buffers.fill, hidden, other)
        return hidden, Work(rows_here, options, backend, fill, max(1, tile.classes), first)

    def keep(chunk: Chunk, loss: Tensor, packed: State) -> None:
        assert losses is not None
        chunk.put(losses, loss)
        chunk.put(kept.sums, packed.sums)
        if len(kept.top1):
            chunk.put(kept.top1, packed.top1)

    with torch.autocast(device.type, enabled=False):
        if p.shard is not None and given is None:
            if count:
                every = Chunk(0, count, index)
                none = rows.logits.new_empty((count, 0))
                all_rows = every.rows(rows, divisors)._replace(
                    logits=none, target=None if rows.target is None else none
                )

                def states(of: Callable[[Chunk, Work], Whole]) -> list[Whole]:
                    return [of(chunk, work_of(chunk)[1]) for chunk in chunks(count, index, tile.rows)]

                def rest(k: Tensor) -> list[Whole]:
                    return states(lambda chunk, work: part_rest(work, k[chunk.begin : chunk.end]))

                parts = states(lambda _, work: part_state(work))
                keep(every, *over_ranks(p.shard, parts, rest, all_rows, options, dtype))
                if options.check_finite:
                    check_finite(rows, options, kept)
            given = state = state._replace(divisors=torch.cat([divisors, divisors.new_tensor([first])]))
        if p.shard is not None and not (rows.classes and any(needs)):
            return Swept(losses, state, _no_gradients(p, needs))
        for chunk in chunks(count, index, tile.rows):
            hidden, work = work_of(chunk)
            above = chunk.vector(upstream) if upstream.dim() else upstream
            before = None if given is None else _packed(chunk, given)
            loss, packed, tiles_here = _chunk(
                work, before, above, dtype, cut=parted, statistics=statistics, wanted=any(needs)
            )
            if loss is not None:
                keep(chunk, loss, packed)
                if options.check_finite:
                    check_finite(work.rows, options, packed)
            for begin, filled in tiles_here:
                p.student.uncap(filled.gradient, filled.student)
                found.add(chunk, hidden, begin, filled.gradient)
            found.end(chunk)
    return Swept(losses, state, found.found(None if index is None else ~counts))
