"""csrc/row/element.h for Triton: the gradient of one element from the coefficients of its row."""

from __future__ import annotations

import triton
import triton.language as tl

from .row import E_S, LOG2E, NEVER, NOTHING, S_ONE, power


@triton.jit
def student_element(
    student_tau, teacher_tau, student_one, student_log, log_z, dt, ds, base, P: tl.constexpr, ONES: tl.constexpr
):
    """dL/ds_j without the label's share; NaN in a NaN row.                                        [element-student]"""
    student = tl.exp2(ds * base)
    g = student_tau * student - teacher_tau * tl.exp2(dt * base)
    if S_ONE & ONES:
        one = power(student, P) if P > 0 else tl.exp2(ds * LOG2E)
        if E_S & ONES:
            g += one * (student_one + student_log * tl.where(ds > NEVER, ds - log_z, 0.0))
        else:
            g += student_one * one
    return tl.where(ds == NOTHING, 0.0 * (student_tau + student_one), g)


@triton.jit
def teacher_element(one, log, x, inv_z, log_z):
    """dL/dz_j without the label's share; x = z_j - m. 0 log 0 is 0.                               [element-own]"""
    p = tl.exp2(x * LOG2E) * inv_z
    return p * (one + log * tl.where(x > NEVER, x - log_z, 0.0))
