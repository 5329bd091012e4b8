"""csrc/row/state.h: the state that a row of logits is reduced to, and the merge of two parts of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = -torch.inf


def first_top1(logits: Tensor) -> Tensor:
    """(N,) int64: index of the largest value of every row (N, V); the lowest index of equal values, on every device."""
    return (logits == logits.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)


class StudentState(NamedTuple):
    """State of rows, or of some of their columns, in a loss with a target.                         [state-student]

    A sum that is None is not needed. c_j is the weight of a class, 1 without class weights.
    """

    m_t: Tensor  # (N,) teacher maximum
    s_k: Tensor  # (N,) student logit at the teacher's top-1
    m_s: Tensor  # (N,) student maximum
    z_tau: Tensor  # (N,) sum exp((t - m_t) / tau_t)
    s_tau: Tensor  # (N,) sum exp((s - m_s) / tau)
    a: Tensor  # (N,) sum exp((t - m_t) / tau_t) * ((t - m_t) / tau_t - (s - m_s) / tau)
    s_one: Tensor  # (N,) sum exp(s - m_s)
    z_one: Tensor  # (N,) sum exp(t - m_t)
    t_y: Tensor  # (N,) teacher logit of the label
    s_y: Tensor  # (N,) student logit of the label
    impossible: Tensor  # (N,) 1 when some class has t finite and s = -inf
    e_s: Tensor | None  # (N,) sum exp(s - m_s) * (s - m_s)
    e_t: Tensor | None  # (N,) sum exp(t - m_t) * (t - m_t)
    s_two: Tensor | None  # (N,) sum exp(2 (s - m_s))
    b: Tensor | None  # (N,) sum exp((s - m_s) / tau) * ((s - m_s) / tau - (t - m_t) / tau_t)
    missing: Tensor | None  # (N,) number of classes with t = -inf and s finite
    uniform: Tensor | None  # (N,) sum c_j (s - m_s), as the next two over classes with s > -inf
    share: Tensor | None  # (N,) sum c_j
    possible: Tensor | None  # (N,) number of classes
    m_q: Tensor | None  # (N,) maximum that z_tau and a are relative to, once they are the calibrated target's; else inf
    k: Tensor  # (N,) int64, teacher's top-1


class StudentSums(NamedTuple):
    """What a sweep accumulates around known maxima."""

    z_tau: Tensor
    s_tau: Tensor
    a: Tensor
    s_one: Tensor
    z_one: Tensor
    impossible: Tensor
    e_s: Tensor
    e_t: Tensor
    s_two: Tensor
    b: Tensor
    missing: Tensor
    uniform: Tensor
    share: Tensor
    possible: Tensor


def finite(quotient: Tensor) -> Tensor:
    """A quotient of finite numbers, without overflow."""
    return quotient.clamp(min=torch.finfo(quotient.dtype).min)


def student_fold(
    dt: Tensor, ds: Tensor, inv_t: Tensor, inv_s: Tensor, class_weight: Tensor | None = None
) -> StudentSums:
    """Sums over the last axis of dt = t - m_t and ds = s - m_s (N, V); inverse temperatures (N, 1), c (V,)."""
    x, w = dt * inv_t, ds * inv_s
    teacher, student = x.exp(), w.exp()
    can_t, can_s = dt > NOTHING, ds > NOTHING  # not x and w, which may overflow
    excess = torch.where(can_t & can_s, finite(x) - finite(w), 0)
    u = torch.where(can_s, ds, 0)
    count = can_s.to(dt.dtype)
    c = count if class_weight is None else count * class_weight
    return StudentSums(
        teacher.sum(-1),
        student.sum(-1),
        (teacher * excess).sum(-1),
        ds.exp().sum(-1),
        dt.exp().sum(-1),
        (can_t & ~can_s).any(-1).to(dt.dtype),
        (ds.exp() * u).sum(-1),
        (dt.exp() * torch.where(can_t, dt, 0)).sum(-1),
        (2 * ds).exp().sum(-1),
        -(student * excess).sum(-1),
        (can_s & ~can_t).sum(-1).to(dt.dtype),
        (c * u).sum(-1),
        c.sum(-1),
        count.sum(-1),
    )


def _down(m: Tensor, to: Tensor) -> Tensor:
    """Distance from a part's maximum to the new one; 0 for an empty part."""
    return torch.where(m == NOTHING, 0, m - to)


def _moved(part: StudentState, m_t: Tensor, m_s: Tensor, inv_t: Tensor, inv_s: Tensor) -> StudentState:
    """The part's sums relative to larger maxima."""
    down_t, down_s = _down(part.m_t, m_t), _down(part.m_s, m_s)
    x, w = down_t * inv_t, down_s * inv_s
    teacher, student, one_t, one_s = x.exp(), w.exp(), down_t.exp(), down_s.exp()

    def some(value: Tensor | None, move: Callable[[Tensor], Tensor]) -> Tensor | None:
        return None if value is None else move(value)

    return part._replace(
        z_tau=teacher * part.z_tau,
        s_tau=student * part.s_tau,
        a=teacher * (part.a + part.z_tau * (x - w)),
        s_one=one_s * part.s_one,
        z_one=one_t * part.z_one,
        e_s=some(part.e_s, lambda e: one_s * (e + part.s_one * down_s)),
        e_t=some(part.e_t, lambda e: one_t * (e + part.z_one * down_t)),
        s_two=some(part.s_two, lambda s: one_s * one_s * s),
        b=some(part.b, lambda b: student * (b + part.s_tau * (w - x))),
        uniform=None if part.uniform is None or part.share is None else part.uniform + part.share * down_s,
    )


_ADDED = ("z_tau", "s_tau", "a", "s_one", "z_one", "e_s", "e_t", "s_two", "b", "missing", "uniform", "share", "possible")


def student_merge(left: StudentState, right: StudentState, inv_t: Tensor, inv_s: Tensor) -> StudentState:
    """State of the union of two disjoint sets of columns.                                           [merge-student]"""
    m_t, m_s = torch.maximum(left.m_t, right.m_t), torch.maximum(left.m_s, right.m_s)
    a, b = (_moved(part, m_t, m_s, inv_t, inv_s) for part in (left, right))
    from_left = torch.where(left.m_t == right.m_t, left.k <= right.k, left.m_t > right.m_t)
    sums = {name: None if getattr(a, name) is None else getattr(a, name) + getattr(b, name) for name in _ADDED}
    return left._replace(
        m_t=m_t,
        s_k=torch.where(from_left, left.s_k, right.s_k),
        m_s=m_s,
        t_y=torch.maximum(left.t_y, right.t_y),
        s_y=torch.maximum(left.s_y, right.s_y),
        impossible=torch.maximum(left.impossible, right.impossible),
        k=torch.where(from_left, left.k, right.k),
        **sums,
    )


class TeacherState(NamedTuple):
    """State of rows without a target. A sum that is None is not needed.                            [state-teacher]"""

    m_s: Tensor  # (N,) maximum
    s_one: Tensor  # (N,) sum exp(s - m_s)
    e_s: Tensor  # (N,) sum exp(s - m_s) * (s - m_s)
    s_y: Tensor  # (N,) logit of the label
    s_two: Tensor | None  # (N,) as in StudentState
    uniform: Tensor | None
    share: Tensor | None
    possible: Tensor | None


class TeacherSums(NamedTuple):
    s_one: Tensor
    e_s: Tensor
    s_two: Tensor
    uniform: Tensor
    share: Tensor
    possible: Tensor


def teacher_fold(x: Tensor, class_weight: Tensor | None = None) -> TeacherSums:
    """Sums over the last axis of x = s - m_s (N, V); c (V,)."""
    p = x.exp()
    can = x > NOTHING
    u, count = torch.where(can, x, 0), can.to(x.dtype)
    c = count if class_weight is None else count * class_weight
    return TeacherSums(
        p.sum(-1), (p * u).sum(-1), (2 * x).exp().sum(-1), (c * u).sum(-1), c.sum(-1), count.sum(-1)
    )


def teacher_merge(left: TeacherState, right: TeacherState) -> TeacherState:
    """e' = e^(m - m') (e + z (m - m'))                                                              [merge-teacher]"""
    m = torch.maximum(left.m_s, right.m_s)
    parts = []
    for part in (left, right):
        down = _down(part.m_s, m)
        one = down.exp()
        parts.append(
            part._replace(
                s_one=one * part.s_one,
                e_s=one * (part.e_s + part.s_one * down),
                s_two=None if part.s_two is None else one * one * part.s_two,
                uniform=None if part.uniform is None or part.share is None else part.uniform + part.share * down,
            )
        )
    a, b = parts
    names = ("s_one", "e_s", "s_two", "uniform", "share", "possible")
    sums = {name: None if getattr(a, name) is None else getattr(a, name) + getattr(b, name) for name in names}
    return left._replace(m_s=m, s_y=torch.maximum(left.s_y, right.s_y), **sums)
