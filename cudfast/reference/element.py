"""csrc/row/element.h: the gradient of one element from the coefficients of its row."""

from __future__ import annotations

import torch
from torch import Tensor

from .state import NOTHING, finite
from .terms import RowGradient


def own_element(
    c: RowGradient, x: Tensor, s_one: Tensor, log_z: Tensor, class_weight: Tensor | float = 1.0
) -> Tensor:
    """dL/ds_j of the terms at temperature 1 without the label's share (N, V), x = s - m_s.           [element-own]"""
    can = x > NOTHING
    log_p = torch.where(can, x - log_z, 0)
    return x.exp() / s_one * (c.one + c.log * log_p) + torch.where(can, c.uniform * class_weight, 0)


def student_element(
    c: RowGradient,
    dt: Tensor,
    ds: Tensor,
    inv_t: Tensor,
    inv_s: Tensor,
    s_one: Tensor,
    log_z: Tensor,
    class_weight: Tensor | float = 1.0,
) -> Tensor:
    """dL/ds_j without the label's share (N, V); the others (N, 1).                               [element-student]"""
    x, w = dt * inv_t, ds * inv_s
    e = w.exp()
    g = c.student_tau * e - c.teacher_tau * x.exp()
    both = (dt > NOTHING) & (ds > NOTHING)
    g = g + c.reverse * e * torch.where(both & (c.reverse != 0), finite(w) - finite(x), 0)
    g = g + own_element(c, ds, s_one, log_z, class_weight)
    return torch.where(ds == NOTHING, 0 * (c.student_tau + c.one), g)  # NaN in a NaN row
