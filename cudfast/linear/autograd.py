"""The sweeps as a differentiable loss: an autograd function in eager mode, torch.library ops under torch.compile.

For scalar reductions forward computes the gradients, since the logits exist there, and backward scales them if the
upstream gradient is not 1. With save="state", or one loss per row, backward computes the logits again, and the
gradients from the row states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import backends
from ..autograd.ops import items_tensor, packed_of
from ..autograd.shared import Once, grouped, keeps_gradient, save, saved, upstream_of
from ..options import parse, parse_linear
from ..rows.call import Constraints, State, coefficients, columns_of, compute_dtype, vector_dtype
from ..rows.layout import row_count
from ..rows.tensors import direct
from ..rows.vectors import check_items
from .gradients import Found
from .layers import NOTHING_NEEDED, Needs, Problem, Tensors, problem_of, tensors_of
from .sweep import sweep


def _made_in_forward(p: Problem) -> bool:
    return p.options.reduction != "none" and keeps_gradient(p.rows, p.options)


def _reduced(p: Problem, losses: Tensor) -> Tensor:
    if p.options.reduction == "none":
        return losses
    return losses.sum(dtype=vector_dtype(losses.device)).to(losses.dtype)


def _needs(p: Problem) -> Needs:
    """The gradients that a call needs: those of the inputs that require grad."""
    if not torch.is_grad_enabled():
        return NOTHING_NEEDED
    bias = p.student.bias
    return Needs(p.rows.logits.requires_grad, p.student.weight.requires_grad, bias is not None and bias.requires_grad)


class _LinearLoss(torch.autograd.Function):
    """Differentiable in the student's hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, p: Problem, statistics: bool, kept: list[State]
    ) -> Tensor:
        made = _made_in_forward(p)
        ctx.needs = Needs(*ctx.needs_input_grad[:3])
        found = sweep(p, ctx.needs if made else NOTHING_NEEDED, statistics=statistics)
        kept.append(found.state)
        ctx.made = found.gradients if made else None
        rows = p.rows
        ctx.plain = (rows.scalar, rows.num_items, rows.classes, rows.constraints, p.options, p.linear, p.shard)
        save(ctx, *tensors_of(p), *(() if made and p.shard is None else found.state))
        ctx.set_materialize_grads(False)
        assert found.losses is not None
        return _reduced(p, found.losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        gradients: Found = (None, None, None)
        if upstream is not None:
            upstream = upstream_of(upstream)
        if upstream is not None and not torch.is_grad_enabled():
            gradients = _LinearLoss._gradients(ctx, upstream)
        elif upstream is not None:  # create_graph=True
            x, _ = grouped(saved(ctx), Tensors)
            with torch.no_grad():
                made = _LinearLoss._gradients(ctx, upstream)
            once = (
                None if g is None else Once.apply(of, upstream, g)  # type: ignore[no-untyped-call]
                for of, g in zip((x.hidden, x.weight, x.bias), made)
            )
            gradients = cast(Found, tuple(once))
        return (*gradients, None, None, None)

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> Found:
        if ctx.made is not None:
            made: Found = ctx.made
            ctx.made = None  # returned once; a second backward computes them again
            scale = backends.choose(ctx.plain[-3].backend, upstream.device).scale
            return cast(Found, tuple(None if g is None else scale(g, upstream) for g in made))
        x, packed = grouped(saved(ctx), Tensors)
        p = problem_of(x, *ctx.plain)
        state = State(*packed) if packed else sweep(p, NOTHING_NEEDED, statistics=False).state
        return sweep(p, ctx.needs, statistics=False, state=state, upstream=_flat(upstream)).gradients


def _flat(upstream: Tensor) -> Tensor:
    return upstream.reshape(-1) if upstream.dim() else upstream


def evaluate(p: Problem, *, statistics: bool) -> tuple[Tensor, State]:
    """The loss () or (N,), differentiable if gradients are required, and the row states."""
    if not direct(*tensors_of(p)):
        return _evaluate_op(p, statistics=statistics)
    if any(_needs(p)):
        kept: list[State] = []
        student = p.student
        loss = _LinearLoss.apply(p.rows.logits, student.weight, student.bias, p, statistics, kept)  # type: ignore[no-untyped-call]
        return loss, kept[0]
    found = sweep(p, NOTHING_NEEDED, statistics=statistics)
    assert found.losses is not None
    return _reduced(p, found.losses), found.state


# ---- torch.library: the same sweeps, traceable ----


def _problem(
    x: Tensors,
    scalar: float,
    num_items: Tensor | None,
    classes: int,
    constraints: list[Tensor],
    options: str,
    flags: str,
    linear: str,
) -> Problem:
    bounds = Constraints.unpacked(constraints, flags)
    return problem_of(x, scalar, num_items, classes, bounds, parse(options), parse_linear(linear))


@torch.library.custom_op("cudfast::linear_state", mutates_args=())
def linear_state_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor | None,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    linear: str,
    statistics: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss () or (N,); states (N, columns), top-1 (N,) and divisors (2,); gradients of hidden, weight and bias for an
    upstream gradient of 1, (0,) if they are not needed or are computed in backward."""
    x = Tensors(
        hidden, weight, bias, target, teacher_weight, teacher_bias, labels, row_weight, temperature, coefficients,
        class_weight,
    )
    p = _problem(x, scalar, num_items, classes, constraints, options, flags, linear)
    check_items(p.rows, p.options)
    made = _made_in_forward(p)
    found = sweep(p, Needs(*needs) if made else NOTHING_NEEDED, statistics=statistics)
    assert found.losses is not None
    gradients = (hidden.new_empty(0) if g is None else g for g in found.gradients)
    return _reduced(p, found.losses), *found.state, *gradients  # type: ignore[return-value]


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        hidden.new_empty(0) if g is None or not needed else torch.empty_like(g).contiguous()
        for g, needed in zip((hidden, weight, bias), needs)
    )
    return first, second, third


@linear_state_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor | None,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    linear: str,
    statistics: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = Tensors(
        hidden, weight, bias, target, teacher_weight, teacher_bias, labels, row_weight, temperature, coefficients,
        class_weight,
    )
    p = _problem(x, scalar, num_items, classes, constraints, options, flags, linear)
    dtype = compute_dtype(p.rows)
    count = row_count(hidden)
    made = _made_in_forward(p)
    return (
        hidden.new_empty((count,) if p.options.reduction == "none" else (), dtype=dtype),
        hidden.new_empty((count, len(columns_of(p.rows, p.options))), dtype=dtype),
        hidden.new_empty((0 if target is None else count,), dtype=torch.int64),
        hidden.new_empty((2,), dtype=vector_dtype(hidden.device)),
        *_fake_gradients(hidden, weight, bias, needs if made else NOTHING_NEEDED),
    )


@torch.library.custom_op("cudfast::linear_gradient", mutates_args=())
def linear_gradient_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor | None,
    class_weight: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    linear: str,
    needs: list[bool],
    sums: Tensor,
    top1: Tensor,
    divisors: Tensor,
    upstream: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for `upstream` () or (N,), (0,) if they are not needed."""
    x = Tensors(
        hidden, weight, bias, target, teacher_weight, teacher_bias, labels, row_weight, temperature, coefficients,
        class_weight,
    )
    p = _problem(x, scalar, None, classes, constraints, options, flags, linear)
    found = sweep(p, Needs(*needs), statistics=False, state=State(sums, top1, divisors), upstream=_flat(upstream))
    first, second, third = (hidden.new_empty(0) if g is None else g for g in found.gradients)
    return first, second, third


@linear_gradient_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    temperature: Tensor | None,
    coefficients: Tensor | None,
    class_weight: Tensor | None,
    constraints: list[Tensor],
    scalar: float,
    classes: int,
    options: str,
    flags: str,
    linear: str,
    needs: list[bool],
    sums: Tensor,
    top1: Tensor,
    divisors: Tensor,
    upstream: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, bias, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, constraints, scalar, classes, options, flags, linear, _, needs = inputs
    x = Tensors(*tensors)
    _, sums, top1, divisors, *gradients = output
    ctx.plain = (scalar, classes, options, flags, linear, needs)
    ctx.bounds = len(constraints)
    ctx.made = any(g.numel() for g in gradients)
    if ctx.made:
        save(ctx, x.hidden, x.weight, x.bias, *gradients)
    else:
        save(ctx, *x, sums, top1, divisors, *constraints)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        *_, needs = ctx.plain
        if ctx.made:
            _, _, _, *made = saved(ctx)
            gradients = [(g * upstream).to(g.dtype) for g in made]
        else:
            tensors, state, constraints = grouped(saved(ctx), Tensors, State)
            gradients = list(linear_gradient_op(*tensors, constraints, *ctx.plain, *state, upstream))
        found = [g if needed else None for g, needed in zip(gradients, needs)]
    return (*found, *(None,) * 9, [None] * ctx.bounds, *(None,) * 7)


linear_state_op.register_autograd(_backward, setup_context=_setup)


def _evaluate_op(p: Problem, *, statistics: bool) -> tuple[Tensor, State]:
    rows = p.rows
    if p.shard is not None:
        raise RuntimeError(
            "the fused losses over a process group cannot be traced: call them outside of torch.compile, with tensors "
            "that have memory of their own (no fake, functional or meta tensors)"
        )
    options, constraints, flags = packed_of(rows, p.options)
    tensors = tensors_of(p)._replace(coefficients=coefficients(rows, p.options))
    loss, sums, top1, divisors, *_ = linear_state_op(
        *tensors,
        items_tensor(rows),
        constraints,
        rows.scalar,
        rows.classes,
        options,
        flags,
        p.linear.text,
        statistics,
        list(_needs(p)),
    )
    return loss, State(sums, top1, divisors)
