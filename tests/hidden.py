"""Batches of hidden states and last layers, and the comparisons for the tests of the fused losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cudfast import (
    CUDOptions,
    LinearOptions,
)
from cudfast.linear import fused_linear_cud_loss

f64 = torch.float64
N, V, DS, DT = 70, 5000, 6, 9  # more rows than FEW, more classes than two of the narrowest tiles hold; all ragged
ROOMS = ("auto", "rows", "both")  # all at once; a few whole rows at a time; a few rows and some classes
BYTES = {"native": {"rows": 3_100_000, "both": 700_000}, "reference": {"rows": 24_000_000, "both": 6_000_000}}


def budget(room: str, backend: str = "native") -> Any:
    """Bytes for batches in float64; the reference backend takes many matrices beside the logits."""
    return "auto" if room == "auto" else BYTES[backend][room]


class Batch:
    """Both sides' hidden states and layers."""

    def __init__(self, dtype: torch.dtype = f64, *shape: int, classes: int = V) -> None:
        shape = shape or (N,)
        self.h = (torch.randn(*shape, DS, dtype=f64) * 2).to(dtype).requires_grad_()
        self.w = torch.randn(classes, DS, dtype=f64).to(dtype).requires_grad_()
        self.b = torch.randn(classes, dtype=f64).to(dtype).requires_grad_()
        self.th = (torch.randn(*shape, DT, dtype=f64) * 2).to(dtype)
        self.tw, self.tb = torch.randn(classes, DT, dtype=f64).to(dtype), torch.randn(classes, dtype=f64).to(dtype)
        self.labels = torch.randint(classes, shape)
        flat = self.labels.view(-1)
        if len(flat) > 3:
            flat[1], flat[3] = -1, -100

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.h, self.w, self.b

    @property
    def kwargs(self) -> dict[str, Tensor]:
        return {
            "student_bias": self.b,
            "teacher_hidden": self.th,
            "teacher_weight": self.tw,
            "teacher_bias": self.tb,
        }

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.h @ self.w.t() + self.b, self.th @ self.tw.t() + self.tb

    def fused(self, *, budget: Any = "auto", linear: Any = None, **options: Any) -> Tensor:
        linear = linear or LinearOptions(memory_budget=budget)
        return fused_linear_cud_loss(self.h, self.w, self.labels, CUDOptions(**options), linear, **self.kwargs)


def grads(loss: Tensor, leaves: tuple[Tensor, ...], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, upstream, retain_graph=True)


def close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    """Within `tolerance` of the largest entry."""
    for a, b in zip(got, wanted):
        assert a.shape == b.shape
        a, b = a.detach().double(), b.detach().double()
        if b.numel():
            assert (a - b).abs().max() <= tolerance * max(1e-3, float(b.abs().max()))
