"""From two sweeps to a differentiable loss.

Eager calls go through `torch.autograd.Function`: its cost a call is a fraction of a Python custom op's, which for small
batches would be the whole cost. Under `torch.compile`, and with tensors that have no memory of their own, the same
sweeps go through `torch.library` ops, which trace with fullgraph=True; there the gradient is always made in backward,
from the saved state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..distributed.projected import TOPS
from ..distributed.sharded import Sharded
from ..options import CUDOptions, DUSOptions, cross_entropy, parse
from ..rows.call import Backend, Call, Constraints, Rows, State, columns_of, compute_dtype, vector_dtype
from ..rows.layout import row_count
from ..rows.shard import Shard
from ..rows.tensors import addressable, direct
from ..rows.vectors import check_items, masks, row_name
from .memory import LARGE, empty


def keeps_gradient(rows: Rows, options: CUDOptions | DUSOptions) -> bool:
    """Whether the gradient is made in forward. A float16 gradient made before the loss scale arrives rounds to 0."""
    if options.inplace and options.check_finite:  # the check comes before anything is overwritten
        return False
    if options.save == "auto":
        return options.reduction != "none" and rows.logits.dtype != torch.float16
    return options.save == "gradient"


def _gradient_memory(rows: Rows, call: Call) -> Tensor:
    """Where the gradient goes."""
    if call.options.inplace:
        return rows.logits.detach()
    return _new(rows.logits) if call.grad_out is None else call.grad_out


def _new(logits: Tensor) -> Tensor:
    if logits.nbytes < LARGE:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return empty(logits.shape, logits.dtype, logits.device)


def check_finite(rows: Rows, options: CUDOptions | DUSOptions, state: State) -> None:
    bad = state.sums.isnan().any(-1)
    for maximum in (0, 2) if isinstance(options, CUDOptions) else (0,):
        bad = bad | (state.sums[:, maximum] == -torch.inf)
    counts, labelled = masks(rows, options)
    bad = bad & (counts if isinstance(options, CUDOptions) else labelled)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row_name(rows, row)} holds NaN, +inf, or nothing but -inf, so its loss is NaN; "
            "check the model's outputs, or mask the row with ignore_index"
        )


def _wrote(rows: Rows, call: Call, gradient: Tensor) -> None:
    """Tells autograd what was overwritten, so that whoever saved it raises instead of lying."""
    if call.options.inplace:
        torch.autograd.graph.increment_version(rows.logits)
    elif call.grad_out is not None:
        torch.autograd.graph.increment_version(gradient)


# What the node needs besides the logits, as one argument: each costs a third of a microsecond. The list receives the
# state when the caller reads it.
_Work = tuple[Rows, Call, Backend, list[State] | None]


class Once(torch.autograd.Function):
    """The gradient, with a second derivative that is an error."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, upstream: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "cudfast losses have no second derivative: the gradient was differentiated again (create_graph=True, a "
            "gradient penalty, a Hessian). Write the loss in plain PyTorch where that is needed."
        )


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, which refuses what was made under torch.inference_mode: that has no version to check."""
    ctx.unversioned = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    if ctx.unversioned:
        tensors = tuple(None if i in ctx.unversioned else x for i, x in enumerate(tensors))
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Any, ...]:
    """What `save` was given."""
    if not ctx.unversioned:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    return tuple(ctx.unversioned.get(i, x) for i, x in enumerate(ctx.saved_tensors))


def upstream_of(gradient: Tensor) -> Tensor:
    """An upstream gradient as kernels read it.

    Raises:
        RuntimeError: a batch of them.
    """
    if addressable(gradient):
        return gradient
    if torch._C._functorch.is_batchedtensor(gradient) or torch._C._functorch.is_legacy_batchedtensor(gradient):
        raise RuntimeError(
            "cudfast losses take one upstream gradient at a time: leave out is_grads_batched=True of "
            "torch.autograd.grad, and vectorize=True of torch.autograd.functional.jacobian"
        )
    gradient = gradient.clone()  # waits for a collective, and settles a negative bit
    if addressable(gradient):
        return gradient
    raise RuntimeError(
        f"the upstream gradient is a {type(gradient).__name__}, without memory of its own, and the loss was computed "
        "from ordinary tensors: call the loss and backward in the same mode"
    )


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
        # Unpacked only while the gradient is still to be made: logits changed after the loss are no error otherwise.
        if gradient is None:
            assert state is not None
            ctx.made, ctx.spent = None, False
            save(ctx, logits, rows.target, rows.labels, rows.weight, rows.per_row, *state)
        else:
            _wrote(rows, call, gradient)
            ctx.made, ctx.spent = (gradient, gradient._version), options.inplace
            if not options.inplace:
                save(ctx, logits, rows.target, rows.labels, rows.weight, rows.per_row)
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
            raise RuntimeError("inplace=True does not go with create_graph=True: the logits are overwritten")
        logits = ctx.saved_tensors[0]  # create_graph=True
        with torch.no_grad():
            gradient = _Loss._gradient(ctx, upstream)
        return Once.apply(logits, upstream, gradient), None  # type: ignore[no-untyped-call]

    @classmethod
    def node(cls, logits: Tensor, work: _Work) -> Tensor:
        """`apply` without its look for functorch: `check_call` has had that, and small batches feel it."""
        loss: Tensor = super(torch.autograd.Function, cls).apply(logits, work)  # type: ignore[misc]
        return loss

    @staticmethod
    def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
        if ctx.made is None:
            return _Loss._made_now(ctx, upstream)
        gradient: Tensor
        gradient, version = ctx.made
        ctx.made = None  # handed over once; a second backward makes it again
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
        logits, target, labels, weight, per_row, *states = saved(ctx)
        rows = Rows(logits, target, labels, weight, per_row, *rest)
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


def _backend(options: CUDOptions | DUSOptions, device: torch.device, shard: Shard | None) -> Backend:
    found = backends.choose(options.backend, device)
    return found if shard is None else Sharded(found, shard)


def evaluate(rows: Rows, call: Call) -> tuple[Tensor, State | None]:
    """The loss () or (N,), differentiable where that is wanted, and the state when statistics are."""
    options = call.options
    if not direct(rows.logits, rows.target, rows.labels, rows.weight, rows.per_row):
        return _evaluate_op(rows, call)
    backend = _backend(options, rows.logits.device, call.shard)
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


# ---- torch.library: the same two sweeps, traceable ----


def parsed_of(options: str, target: Tensor | None) -> CUDOptions | DUSOptions:
    """Of a call: without a target, cross-entropy is what is left of the student loss."""
    parsed = parse(options)
    return cross_entropy(parsed) if isinstance(parsed, CUDOptions) and target is None else parsed


def packed_of(rows: Rows, options: CUDOptions | DUSOptions) -> tuple[str, list[Tensor], str]:
    """Options and constraints as an op takes them: a text, tensors, and what those are."""
    if rows.constraints is None:
        return options.text, [], ""
    return options.text, *rows.constraints.packed()


@torch.library.custom_op("cudfast::row_state", mutates_args=())
def row_state_op(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    per_row: Tensor | None,
    num_items: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    shard: str,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First sweep: loss () or (N,), states (N, columns), top-1 (N,), divisors (2,), or (3,) of a shard."""
    bounds = Constraints.unpacked(constraints, flags)
    rows = Rows(logits, target, labels, weight, per_row, scalar, num_items, classes, bounds)
    parsed = parsed_of(options, target)
    check_items(rows, parsed)
    backend = _backend(parsed, logits.device, Shard.parsed(shard))
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
    per_row: Tensor | None,
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
    rows = Rows(logits, target, labels, weight, per_row, scalar, num_items, classes, bounds)
    parsed = parsed_of(options, target)
    dtype = compute_dtype(rows)
    student = isinstance(parsed, CUDOptions)
    columns = columns_of(rows, parsed) + (TOPS if shard and bounds is not None else ())
    count = row_count(logits)
    return (
        logits.new_empty((count,) if parsed.reduction == "none" else (), dtype=dtype),
        logits.new_empty((count, len(columns)), dtype=dtype),
        logits.new_empty((count if student else 0,), dtype=torch.int64),
        logits.new_empty((3 if shard else 2,), dtype=vector_dtype(logits.device)),
    )


@torch.library.custom_op("cudfast::row_gradient", mutates_args=())
def row_gradient_op(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    per_row: Tensor | None,
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
    rows = Rows(logits, target, labels, weight, per_row, scalar, None, classes, bounds)
    parsed = parsed_of(options, target)
    backend = _backend(parsed, logits.device, Shard.parsed(shard))
    gradient = _new(logits)
    backend.row_gradient(rows, parsed, State(sums, top1, divisors), upstream, gradient)
    return gradient


@row_gradient_op.register_fake
def _(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    per_row: Tensor | None,
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, labels, weight, per_row, _, constraints, *plain, _ = inputs
    _, sums, top1, divisors = output
    ctx.plain = plain
    save(ctx, logits, target, labels, weight, per_row, sums, top1, divisors, *constraints)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    *tensors, sums, top1, divisors = saved(ctx)[:8]
    constraints = list(saved(ctx)[8:])
    gradient = None
    if upstream is not None:
        gradient = row_gradient_op(*tensors, constraints, *ctx.plain, sums, top1, divisors, upstream)
    return (gradient, *(None,) * 5, [None] * len(constraints), *(None,) * 6)


row_state_op.register_autograd(_backward, setup_context=_setup)


def items_tensor(rows: Rows) -> Tensor | None:
    """num_items as an op takes it, so that a number which changes makes no new graph."""
    items, device = rows.num_items, rows.logits.device
    if items is None:
        return None
    if isinstance(items, Tensor):
        return items.to(device, vector_dtype(device))
    return torch.ones((), dtype=vector_dtype(device), device=device) * items  # a product is traced with a symbol


def _evaluate_op(rows: Rows, call: Call) -> tuple[Tensor, State]:
    if rows.logits.is_meta and call.options.backend != "auto":
        backends.choose(call.options.backend, rows.logits.device)
    options, constraints, flags = packed_of(rows, call.options)
    loss, *state = row_state_op(
        rows.logits,
        rows.target,
        rows.labels,
        rows.weight,
        rows.per_row,
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
