"""csrc/row/element.h: the gradient of one element from the coefficients of its row."""

from __future__ import annotations

import torch
from torch import Tensor

from .state import NOTHING
from .terms import StudentGradient, TeacherGradient


def student_element(c: StudentGradient, dt: Tensor, ds: Tensor, inv_tau: Tensor) -> Tensor:
    """dL/ds_j without the label's share (N, V); coefficients and inv_tau (N, 1).                 [element-student]"""
    g = c.student_tau * (ds * inv_tau).exp() - c.teacher_tau * (dt * inv_tau).exp() + c.student_one * ds.exp()
    return torch.where(ds == NOTHING, 0 * (c.student_tau + c.student_one), g)  # NaN in a NaN row


def teacher_element(c: TeacherGradient, x: Tensor, inv_z: Tensor, log_z: Tensor) -> Tensor:
    """dL/dz_j without the label's share (N, V).                                                  [element-teacher]"""
    log_p = torch.where(x > NOTHING, x - log_z, 0)
    return x.exp() * inv_z * (c.one + c.log * log_p)
