"""Hidden states before a last layer with sharded classes: replicated on all ranks, or sharded along their first axis.

The classes of each rank contribute a part of the gradient of every hidden state. This module sums the parts, once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..rows.shard import Shard
from .group import ask, gather, reduce, scattered


class _Whole(torch.autograd.Function):
    """Replicated hidden states: forward sends nothing, backward sums their gradient over the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return reduce(ctx.group, gradient.clone(memory_format=torch.contiguous_format)), None


class _Cut(torch.autograd.Function):
    """Sharded hidden states: forward gathers them, backward gives each rank the sum of its own part."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return _gathered(hidden, group, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        most = max(ctx.sizes)
        parts = [_padded(part, most) for part in gradient.split(ctx.sizes)]
        mine = ctx.sizes[dist.get_rank(ctx.group)]
        return scattered(ctx.group, parts)[:mine], None, None


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])


def _gathered(hidden: Tensor, group: Any, sizes: list[int]) -> Tensor:
    parts = gather(group, _padded(hidden, max(sizes)))
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def spread(hidden: Tensor, shard: Shard | None, sequence_sharded: bool) -> Tensor:
    """All hidden states (..., D) of the student. Backward sums their gradient over the ranks that hold the classes.

    Raises:
        ValueError: the hidden states of the ranks have incompatible shapes or dtypes.
    """
    if shard is None:
        if sequence_sharded:
            raise ValueError("sequence_sharded=True without process_group: expected both, or neither")
        return hidden
    group, wanted = shard.process_group, hidden.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        raise RuntimeError("the fused losses over a process group cannot be traced: call them outside of torch.compile")
    if not sequence_sharded:
        return cast(Tensor, _Whole.apply(hidden, group)) if wanted else hidden  # type: ignore[no-untyped-call]
    sizes = sizes_of(hidden, shard)
    if wanted:
        return cast(Tensor, _Cut.apply(hidden, group, sizes))  # type: ignore[no-untyped-call]
    return _gathered(hidden, group, sizes)


def sizes_of(hidden: Tensor, shard: Shard) -> list[int]:
    """Number of rows of each rank, along the first axis."""
    if hidden.dim() < 2:
        raise ValueError(
            f"sequence_sharded=True with hidden states of shape {tuple(hidden.shape)}: expected (S_r, ..., D), cut "
            "along the first axis"
        )
    alike = {"other axes of the hidden states": list(hidden.shape[1:]), "their dtype": str(hidden.dtype)}
    return ask(Shard(shard.group), hidden.device, {"classes": len(hidden), **alike}, empty=True).wait().sizes


def spread_teacher(hidden: Tensor, shard: Shard | None, sequence_sharded: bool) -> Tensor:
    """The same for the teacher's hidden states, which have no gradient."""
    if shard is None or not sequence_sharded:
        return hidden
    return _gathered(hidden, shard.process_group, sizes_of(hidden, shard))
