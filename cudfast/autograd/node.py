"""The losses as differentiable functions, from the two sweeps of a backend.

Eager calls use `torch.autograd.Function`, whose overhead is a fraction of that of a Python custom op, which would
dominate for small batches. Under `torch.compile`, and for tensors that have no memory of their own, the same sweeps are
`torch.library` ops, which can be traced with fullgraph=True; these always compute the gradient in backward, from the
saved state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed.sharded import backend_of
from ..rows.call import Backend, Call, Rows, State
from ..rows.tensors import direct
from ..rows.vectors import check_finite
from .memory import gradient_like
from .ops import evaluate_op
from .shared import Once, keeps_gradient, save, saved, upstream_of


def _gradient_memory(rows: Rows, call: Call) -> Tensor:
    """The memory that the gradient is written to."""
    if call.options.inplace:
        return rows.logits.detach()
    return gradient_like(rows.logits) if call.grad_out is None else call.grad_out


def _wrote(rows: Rows, call: Call, gradient: Tensor) -> None:
    """Bumps the version counter of the overwritten tensor, so autograd raises instead of using stale data."""
    if call.options.inplace:
        torch.autograd.graph.increment_version(rows.logits)
    elif call.grad_out is not None:
        torch.autograd.graph.increment_version(gradient)


def _tensors(rows: Rows) -> tuple[Tensor | None, ...]:
    """The tensors of rows besides their constraints, in the order in which they are saved."""
    vectors = rows.labels, rows.weight, rows.temperature, rows.coefficients
    return rows.logits, rows.target, *vectors, rows.class_weight


# The node's arguments besides the logits, in one tuple: each argument of `apply` costs a third of a microsecond. The
# list receives the state if the caller needs it.
_Work = tuple[Rows, Call, Backend, list[State] | None]


class _Loss(torch.autograd.Function):
    """loss = sum over rows; differentiable in the logits only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: _Work) -> Tensor:
        rows, call, backend, kept = work
        options = call.options
        made = call.shard is None and keeps_gradient(rows, options)
        gradient = _gradient_memory(rows, call) if made else None
        loss, state = backend.row_state(
            rows,
            options,
            statistics=call.statistics,
            keep=gradient is None or kept is not None,
            gradient=gradient,
        )
        if kept is not None and state is not None:
            kept.append(state)
        ctx.plain = (call, backend, rows.scalar, rows.num_items, rows.classes, rows.constraints)
        # Unpacked only if the gradient is not computed yet: otherwise logits may change after the loss.
        if gradient is None:
            assert state is not None
            ctx.made, ctx.spent = None, False
            save(ctx, *_tensors(rows), *state)
        else:
            _wrote(rows, call, gradient)
            ctx.made, ctx.spent = (gradient, gradient._version), options.inplace
            if not options.inplace:
                save(ctx, *_tensors(rows))
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        if upstream is None:
            return None, None
        upstream = upstream_of(upstream)
        if not torch.is_grad_enabled():
            return _Loss._gradient(ctx, upstream), None
        if ctx.plain[0].options.inplace:
            raise RuntimeError("inplace=True cannot be used with create_graph=True: the logits are overwritten")
        logits = ctx.saved_tensors[0]  # create_graph=True
        with torch.no_grad():
            gradient = _Loss._gradient(ctx, upstream)
        return Once.apply(logits, upstream, gradient), None  # type: ignore[no-untyped-call]

    @classmethod
    def node(cls, logits: Tensor, work: _Work) -> Tensor:
        """`apply` without its check for functorch, which `check_call` makes; its cost matters for small batches."""
        loss: Tensor = super(torch.autograd.Function, cls).apply(logits, work)  # type: ignore[misc]
        return loss

    @staticmethod
    def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
        if ctx.made is None:
            return _Loss._made_now(ctx, upstream)
        gradient: Tensor
        gradient, version = ctx.made
        ctx.made = None  # returned once; a second backward computes it again
        if gradient._version != version:
            raise RuntimeError(
                "the gradient of this loss was overwritten before backward: its grad_out (or, with inplace=True, "
                "its logits) was written again in between. Give each loss memory of its own, or call backward first"
            )
        return ctx.plain[1].scale(gradient, upstream)  # type: ignore[no-any-return]

    @staticmethod
    def _made_now(ctx: Any, upstream: Tensor) -> Tensor:
        if ctx.spent:
            raise RuntimeError(
                "backward ran twice through a loss with inplace=True: the gradient has overwritten the logits. "
                "Use inplace=False with retain_graph=True."
            )
        call: Call
        backend: Backend
        call, backend, *rest = ctx.plain
        options = call.options
        logits, target, labels, weight, temperature, coefficients, class_weight, *states = saved(ctx)
        rows = Rows(logits, target, labels, weight, temperature, coefficients, *rest, class_weight)
        state: State | None = State(*states) if states else None
        if state is None:
            _, state = backend.row_state(rows, options, statistics=False, keep=True, gradient=None)
            assert state is not None
        out = _gradient_memory(rows, call)
        flat = upstream.reshape(-1) if upstream.dim() else upstream
        backend.row_gradient(rows, options, state, flat, out)
        _wrote(rows, call, out)
        ctx.spent = options.inplace
        return out


def evaluate(rows: Rows, call: Call) -> tuple[Tensor, State | None]:
    """The loss () or (N,), differentiable if gradients are required, and the state if statistics are."""
    options = call.options
    if not direct(*_tensors(rows)):
        return evaluate_op(rows, call)
    backend = backend_of(options, rows.logits.device, call.shard)
    reads_state = call.statistics or options.check_finite
    if torch.is_grad_enabled() and rows.logits.requires_grad:
        kept: list[State] | None = [] if reads_state else None
        loss = _Loss.node(rows.logits, (rows, call, backend, kept))
        state = kept[0] if kept else None
    else:
        loss, state = backend.row_state(
            rows, options, statistics=call.statistics, keep=reads_state, gradient=call.grad_out
        )
    if options.check_finite and state is not None:
        check_finite(rows, options, state)
    return loss, state
