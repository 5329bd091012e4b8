"""The losses from the equations, in plain differentiable PyTorch: the oracle of the tests.

Nothing here is shared with the library. In float64 it is the truth; in the inputs' own dtype it is the eager PyTorch
that a user would have written, whose error is the limit for the error of the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE, UNLABELED = -100, -1


def calibrated(teacher: Tensor, labels: Tensor, budget: float, margin: float) -> Tensor:
    """W-Clip, Eq. 4-8: targets (N, V) at temperature 1; labels (N,) < 0 leave their row alone."""
    p = teacher.softmax(-1)
    p_k, k = p.max(-1)
    index = labels.clamp(min=0)
    p_y = p.gather(-1, index[:, None]).squeeze(-1)
    delta = torch.minimum(budget * p_k, margin * (p_k - p_y))
    delta = torch.where((labels >= 0) & (k != index), delta, torch.zeros_like(delta))
    classes = torch.arange(teacher.shape[-1])
    return p + delta[:, None] * ((classes == index[:, None]).to(p.dtype) - (classes == k[:, None]).to(p.dtype))


def cud_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    tau: float | Tensor = 2.0,
    kd: float = 0.8,
    ce: float = 0.2,
    budget: float = 0.5,
    margin: float = 0.7,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weighted terms of every row, KD (N,) and CE (N,), of student (N, V); 0 where a row has no such term."""
    if labels is None:
        labels = torch.full(student.shape[:1], UNLABELED)
    if isinstance(tau, Tensor):
        tau = tau.to(student.dtype)[:, None]
    marks = torch.where(labels == IGNORE, -1, labels)
    target = calibrated(teacher, marks, budget, margin) if clip else teacher.softmax(-1)
    q = (target.log() / tau).log_softmax(-1)
    log_p = (student / tau).log_softmax(-1)
    term = torch.where(q == -torch.inf, torch.zeros_like(q), q.exp() * (q - log_p))
    squared = tau.squeeze(-1) ** 2 if isinstance(tau, Tensor) else tau**2
    kl = squared * term.sum(-1)
    nll = F.cross_entropy(student, marks.clamp(min=0), reduction="none")
    kd_rows = torch.where(labels == IGNORE, torch.zeros_like(kl), kd * kl)
    ce_rows = torch.where(marks < 0, torch.zeros_like(nll), ce * nll)
    return kd_rows, ce_rows


def dus_rows(
    logits: Tensor,
    labels: Tensor,
    *,
    ce: float = 1.0,
    focal: float = 1.0,
    entropy: float = 0.1,
    gamma: float = 10.0,
    alpha: float | Tensor = 1.0,
    threshold: float = 0.5,
    scale: float = 1.0,
    power: float = 1.0,
    differentiate_gate: bool = False,
) -> Tensor:
    """Eq. 3 for every row (N,); 0 where the label is ignored."""
    index = labels.clamp(min=0)
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    log_p = -F.nll_loss(log_q, index, reduction="none")
    p = log_p.exp()
    if isinstance(alpha, Tensor):
        alpha = alpha[index]
    a = -torch.expm1(log_p)
    h = -torch.where(q == 0, torch.zeros_like(q), q * log_q).sum(-1)
    w = (p < threshold).to(p.dtype) + scale * a**power
    if not differentiate_gate:
        w = w.detach()
    loss = ce * -log_p + focal * -alpha * a**gamma * log_p - entropy * w * h
    return torch.where(labels == IGNORE, torch.zeros_like(loss), loss)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(loss, of)
    return g
