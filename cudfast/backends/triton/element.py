"""csrc/row/element.h for Triton: the gradient of one element from the coefficients of its row."""

from __future__ import annotations

import triton
import triton.language as tl

from .row import E_S, LOG2E, NEVER, NOTHING, REVERSE, S_ONE, UNIFORM, excess_of, power, teacher_base


@triton.jit
def student_element(c, dt, ds, weight, bases, P: tl.constexpr, ONES: tl.constexpr):
    """dL/ds_j without the label's share; NaN in a NaN row. c: `pieces.StudentGradient`.           [element-student]"""
    student = tl.exp2(ds * bases.student)
    g = c.student_tau * student - c.teacher_tau * tl.exp2(dt * teacher_base(bases))
    if REVERSE & ONES:
        excess = tl.where(tl.abs(dt - ds) < float("inf"), excess_of(dt, ds, bases), 0.0)
        g -= c.reverse * (student * excess)
    if S_ONE & ONES:
        one = power(student, P) if P > 0 else tl.exp2(ds * LOG2E)
        if E_S & ONES:
            g += one * (c.student_one + c.student_log * tl.where(ds > NEVER, ds - c.log_z, 0.0))
        else:
            g += c.student_one * one
    if UNIFORM & ONES:
        g += c.uniform if weight is None else c.uniform * weight
    return tl.where(ds == NOTHING, 0.0 * (c.student_tau + c.student_one), g)


@triton.jit
def teacher_element(c, x, weight, ONES: tl.constexpr):
    """dL/dz_j without the label's share; x = z_j - m. 0 log 0 is 0. c: `pieces.TeacherGradient`.      [element-own]"""
    p = tl.exp2(x * LOG2E) * c.inv_z
    g = p * (c.one + c.log * tl.where(x > NEVER, x - c.log_z, 0.0))
    if UNIFORM & ONES:
        g += tl.where(x > NOTHING, c.uniform if weight is None else c.uniform * weight, 0.0)
    return g
