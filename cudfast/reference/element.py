"""csrc/row/element.h: the gradient of one element from the coefficients of its row."""

from __future__ import annotations

import torch
from torch import Tensor

from .state import NOTHING
from .terms import RowGradient


def own_element(c: RowGradient, x: Tensor, s_one: Tensor, log_z: Tensor) -> Tensor:
    """dL/ds_j of the terms at temperature 1 without the label's share (N, V), x = s - m_s.           [element-own]"""
    log_p = torch.where(x > NOTHING, x - log_z, 0)
    return x.exp() / s_one * (c.one + c.log * log_p)


def student_element(c: RowGradient, dt: Tensor, ds: Tensor, inv_tau: Tensor, s_one: Tensor, log_z: Tensor) -> Tensor:
    """dL/ds_j without the label's share (N, V); the others (N, 1).                               [element-student]"""
    g = c.student_tau * (ds * inv_tau).exp() - c.teacher_tau * (dt * inv_tau).exp()
    g = g + own_element(c, ds, s_one, log_z)
    return torch.where(ds == NOTHING, 0 * (c.student_tau + c.one), g)  # NaN in a NaN row
