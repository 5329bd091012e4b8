"""The CUD loss in plain PyTorch, as one would write it by hand; timing.py compares the library with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def cud_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    kd_weight: float,
    budget: float,
    margin: float,
) -> Tensor:
    """Return the mean loss of logits ``student`` and ``teacher`` [N, V] with ``labels`` [N]."""
    with torch.no_grad():
        p = teacher.softmax(1)
        top_p, top = p.max(1, keepdim=True)
        true = labels[:, None]
        gap = top_p - p.gather(1, true)
        moved = torch.minimum(budget * top_p, margin * gap)  # no gap, nothing to move
        p = p.scatter_add(1, top, -moved).scatter_add(1, true, moved)
        log_q = (p.clamp_min(1e-30).log() / temperature).log_softmax(1)
    log_s = (student / temperature).log_softmax(1)
    kl = functional.kl_div(log_s, log_q, reduction="batchmean", log_target=True)
    return kd_weight * temperature**2 * kl + (1 - kd_weight) * functional.cross_entropy(student, labels)
