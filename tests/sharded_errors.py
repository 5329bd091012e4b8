"""Ranks with incompatible arguments: every rank raises an error that names one that differs."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor import distribute_tensor

from cudfast import CUDLoss, DUSLoss, FusedLinearDUSLoss
from cudfast.distributed import reshard

from .shards import N, V, agree, batch, case, f32, f64, groups, mine, refused


@case
def teachers_that_are_cut_elsewhere() -> None:
    """Refused, unless they are moved; a teacher with fewer or more padded classes than the student."""
    everyone, last = dist.group.WORLD, dist.get_rank() == 3
    error = ValueError if last else RuntimeError
    refused(error, "width=-1", of=lambda: reshard(torch.ones(2, 3), -1 if last else 4, everyone))
    refused(TypeError, "process_group is None", of=lambda: reshard(torch.ones(2, 3), 3, None))
    for group, widths in groups():
        s, t, labels = batch(f64)
        there = widths[::-1] if widths[0] != widths[-1] else [V - len(widths) + 1] + [1] * (len(widths) - 1)
        part, elsewhere = mine(s, group, widths), mine(t, group, there)
        loss = CUDLoss(process_group=group)
        refused(
            (ValueError, RuntimeError), "cut at the same classes", of=functools.partial(loss, part, elsewhere, labels)
        )
        moved = reshard(elsewhere, part.shape[-1], group)
        assert torch.equal(moved, mine(t, group, widths))
        for short in (t[:, :90], torch.cat([t, t], -1)):
            whole = torch.cat([short, torch.full_like(t, -torch.inf)], -1)[:, :V]
            there = [short.shape[-1] - 3 * (len(widths) - 1)] + [3] * (len(widths) - 1)
            moved = reshard(mine(short, group, there), part.shape[-1], group)
            assert torch.equal(moved, mine(whole, group, widths))


@case
def ranks_that_do_not_go_together() -> None:
    """All ranks raise an error that names one that differs, and the group can be used again."""
    rank, group = dist.get_rank(), dist.group.WORLD
    s, t, labels = batch(f32)
    s, t, inside = s[:, :8], t[:, :8], labels % 32
    odd = inside.clone()
    odd[5] += 1

    def call(rows: int = N, labels: Any = inside, **options: Any) -> Tensor:
        return CUDLoss(process_group=group, **options)(s[:rows], t[:rows], labels[:rows])

    same = "expected the same on every rank"
    refused(ValueError, "rank 2 ", "leading shape = [7]", "rank 0 [11]", same, of=lambda: call(7 if rank == 2 else N))
    refused(
        ValueError,
        "rank 3 ",
        "coefficient of forward_kl = 0.5",
        "0.8",
        same,
        of=lambda: call(kd_weight=0.5 if rank == 3 else 0.8),
    )
    refused(ValueError, "rank 1 ", "temperature", same, of=lambda: call(temperature=3.0 if rank == 1 else 2.0))
    refused(ValueError, "rank 1 ", "labels", "crc32", of=lambda: call(labels=odd if rank == 1 else inside))
    refused(ValueError, "labels[1] = 95: expected a class in [0, 32)", of=lambda: call(labels=labels))
    refused(
        ValueError,
        "rank 2 gave class_offset=17",
        "[8, 16)",
        "expected class_offset=16",
        of=lambda: call(class_offset=8 * rank + (rank > 1)),
    )
    refused(
        ValueError, "rank 0 gave class_offset=0, and rank 1 none", of=lambda: call(class_offset=None if rank else 0)
    )
    error = ValueError if rank == 1 else RuntimeError
    words = ("9 classes on this rank",) if rank == 1 else ("rank 1 refused its arguments", "9 classes on this rank")
    wide = torch.randn(N, 9)
    refused(error, *words, of=lambda: CUDLoss(process_group=group)(wide if rank == 1 else s, t, labels))
    refused(ValueError, "no rank", of=lambda: CUDLoss(process_group=group)(s[:, :0], t[:, :0], labels))
    refused(
        ValueError,
        "32 classes in all",
        "for 9",
        of=lambda: DUSLoss(alpha=torch.ones(9), process_group=group)(s, labels.abs() % 9),
    )
    pair = next(iter(groups()))[0]
    if rank > 1:
        words = ("rank 1 of the group (rank 3 of all)", "leading shape")
        refused(ValueError, *words, of=lambda: DUSLoss(process_group=pair)(s[rank:], labels[rank:] % 16))
    agree(group, [24] * 4, CUDLoss, {}, batch(f32)[:2], labels)


@case
def heads_that_do_not_go_together() -> None:
    """No rank hangs if one refuses its arguments or needs no gradient; DTensors together with plain tensors."""
    rank, group = dist.get_rank(), dist.group.WORLD
    h, w, labels = torch.randn(N, 5), torch.randn(24, 5, requires_grad=True), torch.arange(N)

    def call(hidden: Tensor = h, labels: Any = labels, **options: Any) -> Tensor:
        return FusedLinearDUSLoss(process_group=group, **options)(hidden, w, labels)

    error = TypeError if rank == 1 else RuntimeError
    refused(error, "labels is None", of=lambda: call(labels=None if rank == 1 else labels))
    error = ValueError if rank == 1 else RuntimeError
    refused(error, "memory_budget=100 bytes", of=lambda: call(memory_budget=100 if rank == 1 else 1 << 20))
    wanted = h.clone().requires_grad_(rank != 1)
    refused(ValueError, "rank 1 was given gradient of the hidden states = False", of=lambda: call(wanted))
    mesh = init_device_mesh("cpu", (4,))
    s, t = h[:, :4], distribute_tensor(h, mesh, [Cut(1)])
    refused(TypeError, "teacher_logits is a DTensor", of=lambda: CUDLoss()(h, t, labels % 5))
    labels_ = distribute_tensor(labels, mesh, [Cut(0)])
    refused(TypeError, "labels is a DTensor", of=lambda: DUSLoss(process_group=group)(s, labels_))
    items = (labels_ >= 0).sum()
    refused(TypeError, "num_items is a DTensor", of=lambda: DUSLoss()(t, labels_ % 5, num_items=items))
    refused(TypeError, "hidden is a DTensor", of=lambda: call(distribute_tensor(h, mesh, [Cut(0)])))
    assert bool(call().isfinite())


def rank_dies() -> None:
    """The error of the other ranks names it. The last case: the group cannot be used afterwards."""
    s, t, labels = batch(f32)
    if dist.get_rank() == 2:
        os._exit(0)
    try:
        found = str(CUDLoss(process_group=dist.group.WORLD)(s, t, labels))
    except RuntimeError as error:
        found = str(error)
    assert "rank 2" in found, found
    assert "cannot be reached any more" in found, found
    assert "Timed out" not in found, found
