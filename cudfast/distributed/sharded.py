"""A backend for rows whose classes are sharded over ranks: one sweep over this rank's classes, then one exchange of row
states. Every rank computes the rest of the loss, which has no size V, so backward needs no communication."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.parts import (
    Inverse,
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
from ..backends.reference import Marks, Whole, mark
from ..options import RowOptions
from ..reference import StudentState
from ..rows.call import Backend, Rows, State, compute_dtype, vector_dtype
from ..rows.shard import Shard
from ..rows.vectors import check_vectors, divisors_of, masks
from .group import Layout, as_bytes, ask, from_bytes, gather
from .projected import again, calibrated
from .projected import packed as with_target

_OF_A_RANK = ("save", "inplace", "backend")  # options that may differ between ranks
_SCALAR = ("temperature",)  # an option that is rows.scalar in a call


class Sharded:
    """A backend over a process group: the logits of each rank have some of the classes, labels refer to all classes."""

    def __init__(self, inner: Backend, shard: Shard) -> None:
        self._inner, self._shard = inner, shard

    def row_state(
        self,
        rows: Rows,
        options: RowOptions,
        *,
        statistics: bool,
        keep: bool,
        gradient: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """See `cudfast.rows.call.Backend`. The third divisor of the state is this rank's first class."""
        agreement = ask(self._shard, rows.logits.device, given_to(rows, options))
        layout = None
        if options.num_classes is not None or rows.constraints is not None:
            layout = agreement.wait()
            rows = cut(rows, options, layout.first)
        marks, asked, found = mark(rows, options), rows, None
        if rows.class_weight is not None:
            layout = layout or agreement.wait()
            rows = rows._replace(class_weight=weights_of(rows, layout.first, rows.classes))
        if rows.constraints is not None:
            assert layout is not None
            check(rows, options, layout)
            rows, found, picked = calibrated(rows, marks, self._shard.process_group, layout.first)
        plain = _plain(options) if found else options
        packed = swept(rows, plain, self._inner)
        if layout is None:
            layout = agreement.wait()
            check(rows, options, layout)
        span, group, inverse = Span(rows, layout.first), self._shard.process_group, inverse_temperatures(rows, plain)
        mine = state_of(span, plain, marks, packed)
        whole = merged(group, mine, compute_dtype(rows), inverse, top1=not found)
        if some_leave(group, rows, plain, marks, whole):
            assert isinstance(whole, StudentState)
            rest = merged(
                group,
                rest_of(span, plain, marks, whole.k, self._inner),
                compute_dtype(rows),
                inverse,
                top1=False,
            )
            whole = with_rest(rows, plain, marks, whole, rest, compute_dtype(rows))
        whole = refused(rows, options, layout, whole)
        divisors = divisors_of(rows, options)
        losses, state = finished(rows, plain, marks, whole, divisors, compute_dtype(rows))
        if found:
            state = with_target(state, found, picked)
        state = state._replace(divisors=torch.cat([divisors, divisors.new_tensor([layout.first])]))
        if gradient is not None:
            self.row_gradient(asked, options, state, losses.new_ones(()), gradient)
        if options.reduction != "none":
            losses = losses.sum(dtype=vector_dtype(losses.device)).to(losses.dtype)
        return losses, state if keep else None

    def row_gradient(
        self,
        rows: Rows,
        options: RowOptions,
        state: State,
        upstream: Tensor,
        gradient: Tensor,
    ) -> None:
        """See `cudfast.rows.call.Backend`; writes the gradient of this rank's classes."""
        first: Any = state.divisors[2].to(torch.int64)
        if options.num_classes is not None or rows.constraints is not None:
            first = int(first)
            rows = cut(rows, options, first)
        if rows.classes == 0:
            gradient.zero_()
            return
        rows = rows._replace(class_weight=weights_of(rows, first, rows.classes))
        marks = mark(rows, options)
        state = state._replace(divisors=state.divisors[:2])
        if rows.constraints is not None:
            rows, state = again(rows, options, marks, state, first)
            options = _plain(options)
        write_gradient(Span(rows, first), options, marks, self._inner, state, upstream, gradient)

    def scale(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        """See `cudfast.rows.call.Backend`."""
        return self._inner.scale(gradient, upstream)


def backend_of(options: RowOptions, device: torch.device, shard: Shard | None) -> Backend:
    """The backend of a call, over a process group if there is a shard."""
    found = backends.choose(options.backend, device)
    return found if shard is None else Sharded(found, shard)


def agreed(shard: Shard, rows: Rows, options: RowOptions) -> int:
    """This rank's first class, after a check of the call's vectors.

    Raises:
        ValueError, RuntimeError: the ranks' arguments are incompatible, or a value is out of range; on every rank.
    """
    said = {**given_to(rows, options), "gradient of the hidden states": rows.logits.requires_grad}
    layout = ask(shard, rows.logits.device, said).wait()  # all ranks or none must sum that gradient: else they hang
    check_vectors(_of_all(rows, options, layout), options)
    return layout.first


def over_ranks(
    shard: Shard,
    chunks: list[Whole],
    rest: Callable[[Tensor], list[Whole]],
    rows: Rows,
    options: RowOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, State]:
    """Losses (N,) and packed states of rows, from the states of this rank's classes in chunks of rows.

    rest: the same states without the teacher's top-1 (N,) and the label, which few calls need.
    """
    group, marks, inverse = shard.process_group, mark(rows, options), inverse_temperatures(rows, options)

    def all_ranks(chunks: list[Whole], *, top1: bool) -> Whole:
        return merged(group, _each(lambda *parts: torch.cat(parts), *chunks), dtype, inverse, top1=top1)

    whole = all_ranks(chunks, top1=True)
    if some_leave(group, rows, options, marks, whole):
        assert isinstance(whole, StudentState)
        whole = with_rest(rows, options, marks, whole, all_ranks(rest(whole.k), top1=False), dtype)
    assert isinstance(rows.num_items, Tensor)
    return finished(rows, options, marks, whole, rows.num_items, dtype)


def some_leave(group: Any, rows: Rows, options: RowOptions, marks: Marks, whole: Whole) -> bool:
    """Whether some row's sums have to be computed again without the top-1. Ranks whose rounding differs still agree."""
    there = leaving(rows, options, marks, whole)
    if there is None:
        return False
    return bool(gather(group, there.any().to(torch.uint8).reshape(1, 1)).any())


def merged(group: Any, mine: Whole, dtype: torch.dtype, inverse: Inverse, *, top1: bool) -> Whole:
    """The state of all ranks' classes, from one exchange in `dtype`. Without `top1`, the teacher's is not sent."""
    names = [name for name, x in zip(mine._fields, mine) if x is not None and name != "k"]
    columns = torch.stack([getattr(mine, name) for name in names], -1)
    index = mine.k if isinstance(mine, StudentState) and top1 else None
    found = gather(group, as_bytes(columns.to(dtype), index))  # (R, N, bytes)
    sums, k = from_bytes(found, len(names), dtype)
    parts: Whole = mine._replace(**dict(zip(names, sums.to(columns.dtype).unbind(-1))))
    if isinstance(parts, StudentState):
        none = torch.zeros(found.shape[:2], dtype=torch.int64, device=found.device)
        parts = parts._replace(k=none if k is None else k)
    while (count := len(parts.m_s)) > 1:  # neighbours first: their sums have similar size
        pairs = merge(_ranks(parts, 0, count - 1, 2), _ranks(parts, 1, count, 2), inverse)
        last = _ranks(parts, count - count % 2, count, 1)
        parts = _each(lambda a, b: torch.cat([a, b]), pairs, last)
    return _each(lambda x: x[0], parts)


def _each(f: Callable[..., Tensor], *states: Whole) -> Whole:
    """A state of f of every field; a sum that is left out stays None."""
    fields = (None if xs[0] is None else f(*xs) for xs in zip(*states))
    return type(states[0])(*fields)  # type: ignore[arg-type]


def _ranks(parts: Whole, begin: int, end: int, step: int) -> Whole:
    return _each(lambda x: x[begin:end:step], parts)


def cut(rows: Rows, options: RowOptions, first: int) -> Rows:
    """The rows without the columns beyond `num_classes`."""
    if options.num_classes is None:
        return rows
    return rows._replace(classes=max(0, min(rows.classes, options.num_classes - first)))


@functools.lru_cache(maxsize=256)
def _plain(options: RowOptions) -> RowOptions:
    """The options for rows whose teacher is already calibrated."""
    return dataclasses.replace(options, calibration=None)


@functools.lru_cache(maxsize=256)
def _fields(options: RowOptions) -> dict[str, Any]:
    found = {key: value for key, value in json.loads(options.text).items() if key not in _OF_A_RANK + _SCALAR}
    found["terms"] = [(name, term) for name, _, term in found["terms"]]
    return found | {f"coefficient of {name}": coefficient for name, coefficient, _ in options.terms}


def given_to(rows: Rows, options: RowOptions) -> dict[str, Any]:
    """The description of this rank's arguments for its header."""
    items = rows.num_items
    return {
        "classes": rows.classes,
        "leading shape": list(rows.logits.shape[:-1]),
        "compute dtype": str(compute_dtype(rows)),
        "teacher logits": rows.target is not None,
        "labels": _digest(rows.labels),
        "weight": _digest(rows.weight),
        "temperature": rows.scalar if rows.temperature is None else _digest(rows.temperature),
        "term_weights, smoothing or values per class": _digest(rows.coefficients),
        "class_weight": _digest(rows.class_weight),
        "num_items": _digest(items) if isinstance(items, Tensor) else items,
        "projection": _constraints(rows),
        **_fields(options),
    }


def _constraints(rows: Rows) -> str | None:
    if rows.constraints is None:
        return None
    tensors, flags = rows.constraints.packed()
    return ", ".join([flags, f"bounds {_digest(tensors[0])}", *(f"{x.numel()} members" for x in tensors[2::2])])


def _digest(x: Tensor | None) -> str | None:
    """A description of a vector that differs if the ranks' vectors differ; the values are included on a CPU only."""
    if x is None:
        return None
    return f"{x.numel()} values" + (
        f" (crc32 {zlib.crc32(x.detach().reshape(-1).contiguous().numpy().data):08x})" if x.is_cpu else ""
    )


def _of_all(rows: Rows, options: RowOptions, layout: Layout) -> Rows:
    return rows._replace(
        classes=layout.total if options.num_classes is None else min(layout.total, options.num_classes)
    )


def check(rows: Rows, options: RowOptions, layout: Layout) -> None:
    """Checks labels and other vectors if the host may read them; the result is the same on every rank."""
    if rows.logits.is_cpu or rows.constraints is not None:
        check_vectors(_of_all(rows, options, layout), options)


def refused(rows: Rows, options: RowOptions, layout: Layout, whole: Whole) -> Whole:
    """The state with NaN in rows whose label is out of range, on devices whose values the host does not read."""
    if rows.logits.is_cpu or rows.labels is None:
        return whole
    _, labelled = masks(rows, options)
    outside = labelled & ((rows.labels < 0) | (rows.labels >= _of_all(rows, options, layout).classes))
    return _each(lambda x: torch.where(outside, torch.nan, x) if x.is_floating_point() else x, whole)
