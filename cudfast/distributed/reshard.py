"""Moves logits to other ranks, for models that are sharded at different classes. No other module sends logits."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..reference import NOTHING
from ..rows.checks import logits_of
from ..rows.layout import row_count
from ..rows.shard import Shard
from .group import ask, lost, telling


def reshard(logits: Tensor, width: int, process_group: Any) -> Tensor:
    """Redistributes the columns, in the order of the ranks, so that this rank has `width` of them.

    For a teacher that is not sharded at the same classes as the student. Each rank sends the columns that other ranks
    need, up to all of its logits. No gradient flows.

    Args:
        logits: (..., V_r) this rank's logits; the leading shape and the dtype are the same on all ranks.
        width: number of classes of this rank in the result, that of the student's logits. If the widths sum to more
            than the number of classes, the rest is filled with -inf; if to fewer, the last columns (padding that the
            other model does not have) are dropped.
        process_group: the ranks that hold the classes.

    Returns:
        (..., width), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as the losses over a process group.

    Example:
        >>> # teacher_logits = reshard(teacher_logits, student_logits.shape[-1], group)
    """
    shard = Shard.of(process_group)
    if shard is None:
        raise TypeError("process_group is None: expected the group whose ranks hold the classes")
    with telling(shard):
        logits = logits_of(logits, "logits", empty=True)
        if isinstance(width, bool) or not isinstance(width, int) or width < 0:
            raise ValueError(f"width={width!r}: expected the number of classes of this rank, an int >= 0")
    alike = {"leading shape": list(logits.shape[:-1]), "dtype": str(logits.dtype)}
    have = ask(shard, logits.device, {"classes": logits.shape[-1], **alike}).wait().sizes
    want = ask(shard, logits.device, {"classes": width, **alike}).wait().sizes
    rank, rows = dist.get_rank(process_group), row_count(logits)
    columns = logits.detach().reshape(rows, logits.shape[-1]).t().contiguous()
    found = columns.new_full((width, rows), NOTHING)
    send = [_shared(have, want, rank, other) for other in range(len(have))]
    take = [_shared(have, want, other, rank) for other in range(len(have))]
    there = found[: sum(take)]
    try:
        dist.all_to_all_single(there, columns[: sum(send)], take, send, group=process_group)
    except RuntimeError as error:
        raise lost(process_group, logits.device, error) from error
    return found.t().reshape(*logits.shape[:-1], width).contiguous()


def _shared(have: list[int], want: list[int], source: int, target: int) -> int:
    """Number of classes that one rank sends to another."""
    ends = tuple(accumulate(have))[source], tuple(accumulate(want))[target]
    begins = ends[0] - have[source], ends[1] - want[target]
    return max(0, min(ends) - max(begins))
