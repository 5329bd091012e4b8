"""csrc/row/state.h: the state that a row of logits is reduced to, and the merge of two parts of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = -torch.inf


def first_top1(logits: Tensor) -> Tensor:
    """(N,) int64: index of the largest value of every row (N, V); the lowest index of equal values, on every device."""
    return (logits == logits.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)


class StudentState(NamedTuple):
    """State of rows, or of some of their columns, in the student loss.                             [state-student]"""

    m_t: Tensor  # (N,) teacher maximum
    s_k: Tensor  # (N,) student logit at the teacher's top-1
    m_s: Tensor  # (N,) student maximum
    z_tau: Tensor  # (N,) sum exp((t - m_t) / tau)
    s_tau: Tensor  # (N,) sum exp((s - m_s) / tau)
    a: Tensor  # (N,) sum exp((t - m_t) / tau) * ((t - m_t) - (s - m_s)) / tau
    s_one: Tensor  # (N,) sum exp(s - m_s)
    z_one: Tensor  # (N,) sum exp(t - m_t)
    t_y: Tensor  # (N,) teacher logit of the label
    s_y: Tensor  # (N,) student logit of the label
    impossible: Tensor  # (N,) 1 when some class has t finite and s = -inf
    e_s: Tensor | None  # (N,) sum exp(s - m_s) * (s - m_s); None if no term reads the entropy
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


def finite(quotient: Tensor) -> Tensor:
    """A quotient of finite numbers, without overflow."""
    return quotient.clamp(min=torch.finfo(quotient.dtype).min)


def student_fold(dt: Tensor, ds: Tensor, inv_tau: Tensor) -> StudentSums:
    """Sums over the last axis of dt = t - m_t and ds = s - m_s (N, V); inv_tau (N, 1)."""
    x, w = dt * inv_tau, ds * inv_tau
    teacher, student = x.exp(), w.exp()
    can_t, can_s = dt > NOTHING, ds > NOTHING  # not x and w, which may overflow
    excess = torch.where(can_t & can_s, finite(x) - finite(w), 0)
    impossible = (can_t & ~can_s).any(-1)
    return StudentSums(
        teacher.sum(-1),
        student.sum(-1),
        (teacher * excess).sum(-1),
        ds.exp().sum(-1),
        dt.exp().sum(-1),
        impossible.to(dt.dtype),
        (ds.exp() * torch.where(ds > NOTHING, ds, 0)).sum(-1),
    )


def _down(m: Tensor, to: Tensor) -> Tensor:
    """Distance from a part's maximum to the new one; 0 for an empty part."""
    return torch.where(m == NOTHING, 0, m - to)


def student_merge(left: StudentState, right: StudentState, inv_tau: Tensor) -> StudentState:
    """State of the union of two disjoint sets of columns.                                           [merge-student]"""
    m_t, m_s = torch.maximum(left.m_t, right.m_t), torch.maximum(left.m_s, right.m_s)
    sums: list[Tensor] = []
    for part in (left, right):
        down_t, down_s = _down(part.m_t, m_t), _down(part.m_s, m_s)
        teacher, student = (down_t * inv_tau).exp(), (down_s * inv_tau).exp()
        a = teacher * (part.a + part.z_tau * ((down_t - down_s) * inv_tau))
        one = down_s.exp()
        moved = [teacher * part.z_tau, student * part.s_tau, a, one * part.s_one, down_t.exp() * part.z_one]
        if part.e_s is not None:
            moved.append(one * (part.e_s + part.s_one * down_s))
        sums = [old + new for old, new in zip(sums, moved)] if sums else moved
    from_left = torch.where(left.m_t == right.m_t, left.k <= right.k, left.m_t > right.m_t)
    return StudentState._make(
        (
            m_t,
            torch.where(from_left, left.s_k, right.s_k),
            m_s,
            *sums[:5],
            torch.maximum(left.t_y, right.t_y),
            torch.maximum(left.s_y, right.s_y),
            torch.maximum(left.impossible, right.impossible),
            sums[5] if len(sums) > 5 else None,
            torch.where(from_left, left.k, right.k),
        )
    )


class TeacherState(NamedTuple):
    """State of rows without a target.                                                              [state-teacher]"""

    m_s: Tensor  # (N,) maximum
    s_one: Tensor  # (N,) sum exp(s - m_s)
    e_s: Tensor  # (N,) sum exp(s - m_s) * (s - m_s)
    s_y: Tensor  # (N,) logit of the label


class TeacherSums(NamedTuple):
    s_one: Tensor
    e_s: Tensor


def teacher_fold(x: Tensor) -> TeacherSums:
    """Sums over the last axis of x = s - m_s (N, V)."""
    p = x.exp()
    return TeacherSums(p.sum(-1), (p * torch.where(x > NOTHING, x, 0)).sum(-1))


def teacher_merge(left: TeacherState, right: TeacherState) -> TeacherState:
    """e' = e^(m - m') (e + z (m - m'))                                                              [merge-teacher]"""
    m = torch.maximum(left.m_s, right.m_s)
    s_one, e_s = torch.zeros_like(m), torch.zeros_like(m)
    for part in (left, right):
        down = _down(part.m_s, m)
        s_one = s_one + down.exp() * part.s_one
        e_s = e_s + down.exp() * (part.e_s + part.s_one * down)
    return TeacherState(m, s_one, e_s, torch.maximum(left.s_y, right.s_y))
