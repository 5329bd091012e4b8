"""csrc/row/terms.h: each loss term, its value and the coefficients of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import CUDOptions, DUSOptions, WClip
from .state import NOTHING, StudentState, TeacherState
from .target import Clip, TargetSums, replace, wclip


class RowWeights(NamedTuple):
    kd: Tensor  # (N,) 0 where the row counts for nothing
    ce: Tensor  # (N,) 0 where the row has no label


def row_weights(ignored: Tensor, labelled: Tensor, weight: Tensor) -> RowWeights:
    """How much a row counts in each term.                                                            [row-weights]"""
    kd = torch.where(ignored, 0, weight)
    return RowWeights(kd, torch.where(labelled, kd, 0))


class StudentLoss(NamedTuple):
    kd: Tensor  # (N,) tau^2 KL, without its weight
    ce: Tensor  # (N,) -log p_y at temperature 1, without its weight
    z_tau: Tensor
    clip: Clip
    impossible: Tensor


def kd_value(state: StudentState, target: TargetSums, tau: Tensor) -> Tensor:
    """tau^2 KL(q || p) = tau^2 (a / z + log(s / z)); rounding below 0 is 0.                                   [kd]"""
    kl = target.a / target.z_tau + (state.s_tau / target.z_tau).log()
    kl = torch.where(kl < 0, 0, tau * tau * kl)
    kl = torch.where(target.impossible > 0, torch.inf + 0 * (target.z_tau * state.s_tau), kl)
    return torch.where((state.m_t == NOTHING) | (state.m_s == NOTHING), torch.nan, kl)


def ce_value(s_one: Tensor, s_y: Tensor, m_s: Tensor) -> Tensor:
    """-log p_y = log S1 - (s_y - m_s)                                                                         [ce]"""
    return s_one.log() - (s_y - m_s)


class StudentGradient(NamedTuple):
    """Coefficients of dL/ds_j.                                                                  [student-gradient]"""

    student_tau: Tensor  # (N,)
    teacher_tau: Tensor  # (N,)
    student_one: Tensor  # (N,)
    label: Tensor  # (N,)


def student_finish(state: StudentState, labelled: Tensor, tau: Tensor, options: CUDOptions) -> StudentLoss:
    """What a row comes to: the calibrated target, then every term."""
    zero = torch.zeros_like(state.m_t)
    clip = Clip(zero, zero, zero)
    ce = zero
    if options.ce_weight > 0:
        ce = torch.where(labelled, ce_value(state.s_one, state.s_y, state.m_s), 0)
    if not options.kd_weight > 0:
        return StudentLoss(zero, ce, zero, clip, zero > 0)
    if isinstance(options.calibration, WClip):
        wrong = labelled & (state.t_y < state.m_t)
        found = wclip(state.t_y - state.m_t, options.calibration.budget, options.calibration.margin)
        clip = Clip(*(torch.where(wrong, value, 0) for value in found))
    target = replace(state, clip, 1 / tau)
    return StudentLoss(kd_value(state, target, tau), ce, target.z_tau, clip, target.impossible > 0)


def student_coefficients(
    state: StudentState, loss: StudentLoss, tau: Tensor, kd: Tensor, ce: Tensor
) -> StudentGradient:
    """kd and ce are the rows' weights in each term, upstream gradient and divisors included."""
    return StudentGradient(
        torch.where(kd != 0, kd * tau / state.s_tau, 0),
        torch.where(kd != 0, kd * tau / loss.z_tau, 0),
        torch.where(ce != 0, ce / state.s_one, 0),
        ce,
    )


class Term(NamedTuple):
    value: Tensor  # (N,)
    slope: Tensor  # (N,) with respect to log p_y


def focal(log_p: Tensor, gamma: float, alpha: Tensor) -> Term:
    """alpha (1 - p)^gamma (-log p)                                                                          [focal]"""
    a = -torch.expm1(log_p)
    a_gamma = a**gamma
    ratio = torch.where(a > 0, log_p / a, -1)
    lost = log_p == NOTHING
    return Term(
        torch.where(lost, torch.inf, -alpha * a_gamma * log_p),
        torch.where(lost, -alpha, alpha * a_gamma * (gamma * (1 - a) * ratio - 1)),
    )


def gate(log_p: Tensor, o: DUSOptions) -> Term:
    """w = 1{p < threshold} + scale (1 - p)^power                                                             [gate]"""
    a = -torch.expm1(log_p)
    value = (1 - a < o.gate_threshold).to(a.dtype) + o.gate_scale * a**o.gate_power
    if not o.gate_power > 0:
        return Term(value, torch.zeros_like(a))
    slope = -o.gate_scale * o.gate_power * a ** (o.gate_power - 1) * (1 - a)
    return Term(value, torch.where(a > 0, slope, 0))


class TeacherLoss(NamedTuple):
    value: Tensor  # (N,)
    entropy: Tensor  # (N,) nats
    slope: Tensor  # (N,) of the whole loss with respect to log p_y, the entropy held fixed
    weight: Tensor  # (N,) of -H
    log_z: Tensor  # (N,)


def teacher_finish(state: TeacherState, alpha: Tensor, o: DUSOptions) -> TeacherLoss:
    """Value and slopes of Eq. 3."""
    log_z = state.z.log()
    entropy = log_z - state.e / state.z
    log_p = (state.z_y - state.m) - log_z
    value, slope, weight = torch.zeros_like(log_p), torch.zeros_like(log_p), torch.zeros_like(log_p)
    if o.ce_weight > 0:
        value, slope = value - o.ce_weight * log_p, slope - o.ce_weight
    if o.focal_weight > 0:
        f = focal(log_p, o.gamma, alpha)
        value, slope = value + o.focal_weight * f.value, slope + o.focal_weight * f.slope
    if o.entropy_weight > 0:
        w = gate(log_p, o)
        weight = o.entropy_weight * w.value
        value = value - weight * entropy
        if o.differentiate_gate:
            slope = slope - o.entropy_weight * w.slope * entropy
    return TeacherLoss(value, entropy, slope, weight, log_z)


class TeacherGradient(NamedTuple):
    """dL/dz_j = p_j (one + log * log p_j) + label 1[j = y]                                      [teacher-gradient]"""

    one: Tensor  # (N,)
    log: Tensor  # (N,)
    label: Tensor  # (N,)


def teacher_coefficients(loss: TeacherLoss, scale: Tensor) -> TeacherGradient:
    """scale (N,): upstream gradient over divisor, 0 where the row does not count."""
    return TeacherGradient(scale * (loss.weight * loss.entropy - loss.slope), scale * loss.weight, scale * loss.slope)
