"""What the races from hidden states share: inputs, our way and PyTorch's to the gradients, and the bare products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cudfast import FusedLinearCUDLoss
from cudfast.bench.cases import TEMPERATURE, eager_cud, labels_for
from cudfast.bench.shapes import Shape

Found = tuple[Tensor, Tensor, Tensor]
"""Loss (), gradients of hidden states (N, Ds) and weight (V, Ds)."""


@dataclass(frozen=True)
class Sizes(Shape):
    """N rows, V classes, and the widths of both sides."""

    student: int = 0
    teacher: int = 0

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.classes:,}, Ds = {self.student}, Dt = {self.teacher}"

    def operations(self, *, teacher: bool = True) -> int:
        """2 N V D for each product: logits of both sides, gradients of hidden states and weight."""
        widths = 3 * self.student + (self.teacher if teacher else 0)
        return 2 * self.rows * self.classes * widths


@dataclass(frozen=True)
class Heads:
    """Hidden states and weights; the student's are leaves that require grad."""

    h: Tensor  # (N, Ds)
    w: Tensor  # (V, Ds)
    th: Tensor  # (N, Dt)
    tw: Tensor  # (V, Dt)
    labels: Tensor  # (N,)

    @property
    def teacher(self) -> dict[str, Tensor]:
        return {"teacher_hidden": self.th, "teacher_weight": self.tw}


def make(sizes: Sizes) -> Heads:
    """Logits with a standard deviation near 3, half of the labels the teacher's top-1."""
    torch.manual_seed(0)
    h, w = torch.randn(sizes.rows, sizes.student) * 2, torch.randn(sizes.classes, sizes.student)
    th, tw = torch.randn(sizes.rows, sizes.teacher) * 3, torch.randn(sizes.classes, sizes.teacher)
    w, tw = w / sizes.student**0.5, tw / sizes.teacher**0.5
    return Heads(h.requires_grad_(), w.requires_grad_(), th, tw, labels_for(th @ tw.t()))


def with_gradients(x: Heads, loss: Callable[[], Tensor]) -> Callable[[], Found]:
    """Forward and backward."""

    def call() -> Found:
        value = loss()
        first, second = torch.autograd.grad(value, (x.h, x.w))
        return value.detach(), first, second

    return call


def ours(x: Heads, **fields: Any) -> Callable[[], Found]:
    loss = FusedLinearCUDLoss(**{"temperature": TEMPERATURE, **fields})
    teacher = {} if fields.get("kd_weight") == 0 else x.teacher
    return with_gradients(x, lambda: loss(x.h, x.w, x.labels, **teacher))


def eager(x: Heads) -> Callable[[], Found]:
    return with_gradients(x, lambda: eager_cud(x.h @ x.w.t(), x.th @ x.tw.t(), x.labels))


def eager_ce(x: Heads) -> Callable[[], Found]:
    return with_gradients(x, lambda: functional.cross_entropy(x.h @ x.w.t(), x.labels))


def products(x: Heads, *, teacher: bool = True, given: bool = False) -> Callable[[], object]:
    """The products alone, into fresh memory as an expression would, or into memory that is there already."""
    h, w = x.h.detach(), x.w.detach()
    g = torch.randn(len(h), len(w))
    out = [torch.empty_like(g), torch.empty_like(g) if teacher else g, torch.empty_like(h), torch.empty_like(w)]

    def fresh_memory() -> object:
        s = h @ w.t()
        t = x.th @ x.tw.t() if teacher else None
        return s, t, g @ w, g.t() @ h

    def given_memory() -> object:
        torch.mm(h, w.t(), out=out[0])
        if teacher:
            torch.mm(x.th, x.tw.t(), out=out[1])
        torch.mm(g, w, out=out[2])
        return torch.mm(g.t(), h, out=out[3])

    return given_memory if given else fresh_memory
