"""A small batch with every kind of row."""

from __future__ import annotations

import torch
from torch import Tensor

N, V, D = 6, 11, 4


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student (N, V), teacher (N, V), labels (N,) with an ignored and an unlabelled row, weight (N,)."""
    labels = torch.randint(V, (N,))
    labels[:2] = torch.tensor([-100, -1])
    return torch.randn(N, V), torch.randn(N, V), labels, torch.rand(N)


def heads() -> dict[str, Tensor]:
    """The teacher's arguments of a fused loss."""
    return {"teacher_hidden": torch.randn(N, D), "teacher_weight": torch.randn(V, D)}
