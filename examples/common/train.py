"""One training loop for teachers and students."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Split
from .model import Net, Size, VectorSize

BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, V], row numbers [N]) -> scalar loss."""


@dataclass(frozen=True)
class Schedule:
    """``rate``: peak learning rate; it falls to zero along a cosine over ``epochs`` passes."""

    epochs: int
    rate: float
    batch: int


def adam(model: Net, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of every training; one fused pass over all weights beats sparse updates here."""
    return torch.optim.Adam(model.parameters(), lr=rate, fused=True)


def fit(
    size: Size | VectorSize,
    classes: int,
    rows: Split,
    loss: BatchLoss,
    schedule: Schedule,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> Net:
    """Train a new network on ``rows``; ``tick`` is called after each step. Deterministic for a given seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = size.build(classes)
    optimizer = adam(model, schedule.rate)
    steps = schedule.epochs * steps_per_epoch(rows, schedule.batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(schedule.epochs):
        for batch in rows.batches(schedule.batch, generator):
            optimizer.zero_grad()
            loss(model.read(rows, rows.string[batch]), batch).backward()
            optimizer.step()
            cosine.step()
            tick()
    return model


def steps_per_epoch(rows: Split, batch: int) -> int:
    """Return the number of batches that ``rows.batches(batch)`` yields."""
    return max(len(rows) // batch, 1)


@torch.no_grad()
def logits_of(model: Net, rows: Split, chunk: int = 4096) -> Tensor:
    """Logits [S, V] of every string of ``rows``."""
    return torch.cat([model.read(rows, which) for which in torch.arange(len(rows.bags)).split(chunk)])
