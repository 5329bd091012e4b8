"""The two sweeps as torch.library ops, which can be traced with fullgraph=True.

The gradient is always computed in backward, from the saved state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..distributed.sharded import backend_of
from ..options import RowOptions, parse
from ..rows.call import Call, Constraints, Rows, State, coefficients, columns_of, compute_dtype, vector_dtype
from ..rows.layout import row_count
from ..rows.shard import Shard
from ..rows.vectors import check_finite, check_items
from .memory import gradient_like
from .shared import grouped, save, saved


def packed_of(rows: Rows, options: RowOptions) -> tuple[str, list[Tensor], str]:
    """Options and constraints as an op takes them: the options as text, tensors, and flags that describe them."""
    if rows.constraints is None:
        return options.text, [], ""
    return options.text, *rows.constraints.packed()


@torch.library.custom_op("cudfast::row_state", mutates_args=())
def row_state_op(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    shard: str,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First sweep: loss () or (N,), states (N, columns), top-1 (N,), divisors (2,), or (3,) for a shard."""
    bounds = Constraints.unpacked(constraints, flags)
    rows = Rows(logits, target, labels, weight, temperature, coefficients, scalar, num_items, classes, bounds, class_weight)
    parsed = parse(options)
    check_items(rows, parsed)
    backend = backend_of(parsed, logits.device, Shard.parsed(shard))
    loss, state = backend.row_state(rows, parsed, statistics=statistics, keep=True, gradient=None)
    assert state is not None
    if parsed.check_finite:
        check_finite(rows, parsed, state)
    return loss, *state


@row_state_op.register_fake
def _(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    shard: str,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounds = Constraints.unpacked(constraints, flags)
    rows = Rows(logits, target, labels, weight, temperature, coefficients, scalar, num_items, classes, bounds, class_weight)
    parsed = parse(options)
    dtype = compute_dtype(rows)
    columns = columns_of(rows, parsed, sharded=bool(shard))
    count = row_count(logits)
    return (
        logits.new_empty((count,) if parsed.reduction == "none" else (), dtype=dtype),
        logits.new_empty((count, len(columns)), dtype=dtype),
        logits.new_empty((0 if target is None else count,), dtype=torch.int64),
        logits.new_empty((3 if shard else 2,), dtype=vector_dtype(logits.device)),
    )


@torch.library.custom_op("cudfast::row_gradient", mutates_args=())
def row_gradient_op(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor,
    class_weight: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    shard: str,
    sums: Tensor,
    top1: Tensor,
    divisors: Tensor,
    upstream: Tensor,
) -> Tensor:
    """Second sweep: the gradient (..., >= V) for `upstream` () or (N,)."""
    bounds = Constraints.unpacked(constraints, flags)
    rows = Rows(logits, target, labels, weight, temperature, coefficients, scalar, None, classes, bounds, class_weight)
    parsed = parse(options)
    backend = backend_of(parsed, logits.device, Shard.parsed(shard))
    gradient = gradient_like(logits)
    backend.row_gradient(rows, parsed, State(sums, top1, divisors), upstream, gradient)
    return gradient


@row_gradient_op.register_fake
def _(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor,
    class_weight: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    shard: str,
    sums: Tensor,
    top1: Tensor,
    divisors: Tensor,
    upstream: Tensor,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _Tensors(NamedTuple):
    """The tensors of a call besides its constraints, in the order in which an op takes them."""

    logits: Tensor
    target: Tensor | None
    labels: Tensor | None
    weight: Tensor | None
    temperature: Tensor | None
    coefficients: Tensor
    class_weight: Tensor | None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, constraints, scalar, classes, options, flags, shard, _ = inputs
    _, *state = output
    ctx.plain = scalar, classes, options, flags, shard
    save(ctx, *tensors, *state, *constraints)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    tensors, state, constraints = grouped(saved(ctx), _Tensors, State)
    gradient = None
    if upstream is not None:
        gradient = row_gradient_op(*tensors, constraints, *ctx.plain, *state, upstream)
    return (gradient, *(None,) * 7, [None] * len(constraints), *(None,) * 6)


row_state_op.register_autograd(_backward, setup_context=_setup)


def items_tensor(rows: Rows) -> Tensor | None:
    """num_items as a tensor for an op, so that a new value does not compile a new graph."""
    items, device = rows.num_items, rows.logits.device
    if items is None:
        return None
    if isinstance(items, Tensor):
        return items.to(device, vector_dtype(device))
    return torch.ones((), dtype=vector_dtype(device), device=device) * items  # a product is traced with a symbol


def evaluate_op(rows: Rows, call: Call) -> tuple[Tensor, State]:
    if rows.logits.is_meta and call.options.backend != "auto":
        backends.choose(call.options.backend, rows.logits.device)
    options, constraints, flags = packed_of(rows, call.options)
    loss, *state = row_state_op(
        rows.logits,
        rows.target,
        rows.labels,
        rows.weight,
        rows.temperature,
        coefficients(rows, call.options),
        rows.class_weight,
        items_tensor(rows),
        constraints,
        rows.scalar,
        rows.classes,
        options,
        flags,
        "" if call.shard is None else call.shard.text,
        call.statistics,
    )
    return loss, State(*state)
