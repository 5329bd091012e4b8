"""Inputs, the losses written with torch functions, and the ways to call the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..functional import cud_loss, dus_loss
from ..losses import CUDLoss, DUSLoss
from ..options import CUDOptions, DUSOptions
from .gate import Loss, Outcome
from .shapes import Shape

TEMPERATURE = 2.0

Forward = Callable[[], tuple[Tensor, Tensor]]
"""Returns the loss () and the logits (N, V) to differentiate it by."""


@dataclass(frozen=True)
class Inputs:
    """One batch."""

    student: Tensor  # (N, V), a leaf that requires grad
    teacher: Tensor  # (N, V)
    labels: Tensor  # (N,) int64
    gradient: Tensor  # (N, V) memory for the gradient
    scratch: Tensor  # (N, V) a copy of the student that is no leaf, for cases that overwrite it

    @property
    def plain(self) -> Tensor:
        """The student (N, V) without autograd."""
        return self.student.detach()

    def restore(self) -> None:
        """Restores the logits that the in-place mode has overwritten."""
        self.scratch.detach().copy_(self.plain)


def labels_for(teacher: Tensor) -> Tensor:
    """(N,) labels for logits (N, V): random in rows 0, 2, ..., for W-Clip; the teacher's top-1 in the others."""
    count, classes = teacher.shape
    labels = torch.randint(classes, (count,), device=teacher.device)
    labels[1::2] = teacher[1::2].argmax(-1)
    return labels


def make(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """A batch whose student has partly learned its teacher."""
    torch.manual_seed(0)
    teacher = torch.randn(shape.rows, shape.classes, device=device) * 3
    student = (teacher * 0.5 + torch.randn(shape.rows, shape.classes, device=device) * 2).to(dtype)
    teacher = teacher.to(dtype)
    return Inputs(
        student.requires_grad_(),
        teacher,
        labels_for(teacher),
        torch.full_like(teacher, torch.nan),  # unwritten elements fail the gate; the pages are already mapped
        student.clone(),
    )


# ---- PyTorch ----


def eager_cud(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean loss () of student and teacher logits (N, V), at the defaults of `CUDLoss`.

    The target is computed in place: a tenth faster than the other plain implementations.
    """
    p = teacher.softmax(-1)
    top, k = p.max(-1, keepdim=True)
    y = labels.unsqueeze(-1)
    moved = torch.minimum(0.5 * top, 0.7 * (top - p.gather(-1, y)))
    p.scatter_add_(-1, k, -moved).scatter_add_(-1, y, moved)
    target = p.log_().div_(TEMPERATURE).softmax(-1)
    kl = functional.kl_div((student / TEMPERATURE).log_softmax(-1), target, reduction="batchmean")
    return 0.8 * TEMPERATURE**2 * kl + 0.2 * functional.cross_entropy(student, labels)


def eager_dus(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss () of logits (N, V), at the defaults of `DUSLoss`."""
    log_p = logits.log_softmax(-1)
    log_p_y = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    wrong = 1 - log_p_y.exp()
    gate = (wrong > 0.5).to(wrong.dtype) + wrong
    return (-log_p_y - wrong**10 * log_p_y - 0.1 * gate.detach() * entropy).mean()


def compiled(loss: Loss) -> Loss:
    """The same function through torch.compile, specialised to its shapes. Resets the limit on their number."""
    torch.compiler.reset()
    found: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return found


def through(loss: Loss, logits: Tensor, *others: Tensor) -> Forward:
    """A PyTorch loss as a case."""
    return lambda: (loss(logits, *others), logits)


# ---- The library ----


def cud_cases(data: Inputs, **fields: Any) -> dict[str, Forward]:
    """Every way to call the student loss; `fields` are options."""
    common = {"temperature": TEMPERATURE, **fields}
    given, inplace = CUDOptions(**common), CUDOptions(inplace=True, **common)
    fresh, state = CUDLoss(**common), CUDLoss(save="state", **common)
    x, rest = data.student, (data.teacher, data.labels)

    return {
        "given gradient": lambda: (cud_loss(x, *rest, given, grad_out=data.gradient), x),
        "in place": lambda: (cud_loss(data.scratch, *rest, inplace), data.scratch),
        "fresh gradient": lambda: (fresh(x, *rest), x),
        'save="state"': lambda: (state(x, *rest), x),
    }


def dus_cases(data: Inputs, **fields: Any) -> dict[str, Forward]:
    """Every way to call the teacher loss; `fields` are options."""
    given, inplace = DUSOptions(**fields), DUSOptions(inplace=True, **fields)
    fresh, state = DUSLoss(**fields), DUSLoss(save="state", **fields)
    x, labels = data.student, data.labels

    return {
        "given gradient": lambda: (dus_loss(x, labels, given, grad_out=data.gradient), x),
        "in place": lambda: (dus_loss(data.scratch, labels, inplace), data.scratch),
        "fresh gradient": lambda: (fresh(x, labels), x),
        'save="state"': lambda: (state(x, labels), x),
    }


def with_gradient(forward: Forward) -> Callable[[], Outcome]:
    """Forward and backward."""

    def call() -> Outcome:
        loss, logits = forward()
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    return call
