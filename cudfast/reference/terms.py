"""csrc/row/terms.h: the values that terms are functions of, the total over the terms, the gradient's coefficients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import RowOptions, WClip
from ..terms.term import Evaluated, RowValues
from .state import NOTHING, StudentState, TeacherState
from .target import Clip, TargetSums, replace, wclip


class RowWeights(NamedTuple):
    rows: Tensor  # (N,) in terms that need no label; 0 in excluded rows
    labelled: Tensor  # (N,) in the others; 0 in rows without a label


def row_weights(ignored: Tensor, labelled: Tensor, weight: Tensor) -> RowWeights:
    """The weight of a row, before its share of a mean.                                               [row-weights]"""
    rows = torch.where(ignored, 0, weight)
    return RowWeights(rows, torch.where(labelled, rows, 0))


def forward_kl_of(state: StudentState, target: TargetSums, tau: Tensor) -> Tensor:
    """tau^2 KL(q || p) = tau^2 (a / z + log(s / z)); rounding below 0 is 0.                                   [kd]"""
    kl = target.a / target.z_tau + (state.s_tau / target.z_tau).log()
    kl = torch.where(kl < 0, 0, tau * tau * kl)
    kl = torch.where(target.impossible > 0, torch.inf + 0 * (target.z_tau * state.s_tau), kl)
    return torch.where((state.m_t == NOTHING) | (state.m_s == NOTHING), torch.nan, kl)


def reverse_kl_of(state: StudentState, target: TargetSums, inv_t: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """tau^2 KL(p || q) = tau^2 (b / s + log(z / s)), and b / s; rounding below 0 is 0.                [reverse-kd]"""
    assert target.b is not None
    assert target.missing is not None
    mean = target.b / state.s_tau + (target.centre - state.m_t) * inv_t
    kl = mean + (target.z_tau / state.s_tau).log()
    kl = torch.where(kl < 0, 0, tau * tau * kl)
    kl = torch.where(target.missing > 0, torch.inf + 0 * (target.z_tau * state.s_tau), kl)
    return torch.where((state.m_t == NOTHING) | (state.m_s == NOTHING), torch.nan, kl), mean


def nll_of(state: StudentState | TeacherState) -> Tensor:
    """-log p_y = log S1 - (s_y - m_s)"""
    return state.s_one.log() - (state.s_y - state.m_s)


class Distilled(NamedTuple):
    """Student and calibrated target at their temperatures."""

    forward_kl: Tensor  # (N,)
    reverse_kl: Tensor
    s_tau: Tensor
    z_tau: Tensor
    mean: Tensor  # of the student's log p / q, without the normalisers
    centre: Tensor  # what z_tau is relative to: a logit
    clip: Clip
    impossible: Tensor  # (N,) bool


def clip_of(state: StudentState, labelled: Tensor, options: RowOptions) -> Clip:
    """W-Clip of the rows; zeros in rows that it leaves as they are."""
    zero = torch.zeros_like(state.m_s)
    if not isinstance(options.calibration, WClip):
        return Clip(zero, zero, zero)
    wrong = labelled & (state.t_y < state.m_t)
    found = wclip(state.t_y - state.m_t, options.calibration.budget, options.calibration.margin)
    return Clip(*(torch.where(wrong, value, 0) for value in found))


def distil(state: StudentState | TeacherState, labelled: Tensor, tau: Tensor, options: RowOptions) -> Distilled:
    """The calibrated target; zeros without a term that needs it."""
    zero = torch.zeros_like(state.m_s)
    if not options.distils or not isinstance(state, StudentState):
        return Distilled(zero, zero, zero, zero, zero, zero, Clip(zero, zero, zero), zero > 0)
    clip = clip_of(state, labelled, options)
    inv_t = teacher_inverse(tau, options)
    target = replace(state, clip, inv_t, 1 / tau)
    if state.m_q is not None:
        done = state.m_q < torch.inf
        now = (state.z_tau, state.a, state.impossible, target.b, target.missing, state.m_q)
        target = TargetSums(*(x if x is None else torch.where(done, x, y) for x, y in zip(now, target)))
    reverse, mean = zero, zero
    if target.b is not None:
        reverse, mean = reverse_kl_of(state, target, inv_t, tau)
    kl = forward_kl_of(state, target, tau)
    return Distilled(kl, reverse, state.s_tau, target.z_tau, mean, target.centre, clip, target.impossible > 0)


def teacher_inverse(tau: Tensor, options: RowOptions) -> Tensor:
    """1 / tau_t of rows whose students have the temperature tau."""
    return 1 / (tau if options.teacher_temperature is None else torch.full_like(tau, options.teacher_temperature))


def values_of(state: StudentState | TeacherState, target: Distilled) -> RowValues:
    """The values of rows that terms read."""
    log_z = state.s_one.log()
    zero = torch.zeros_like(log_z)
    entropy = zero if state.e_s is None else log_z - state.e_s / state.s_one
    uniform = zero
    if state.uniform is not None and state.share is not None and state.possible is not None:
        uniform = (state.uniform - state.share * log_z) / state.possible
    log_p = (state.s_y - state.m_s) - log_z
    return RowValues(target.forward_kl, target.reverse_kl, log_p, entropy, state.m_s + log_z, uniform)


class RowGradient(NamedTuple):
    """Coefficients of dL/ds_j.                                                                     [row-gradient]"""

    student_tau: Tensor  # (N,)
    teacher_tau: Tensor  # (N,)
    one: Tensor  # (N,) of p_j
    log: Tensor  # (N,) of p_j log p_j
    label: Tensor  # (N,) of 1[j = y]
    reverse: Tensor  # (N,) of exp((s_j - m_s) / tau) times the difference of the tempered logits
    uniform: Tensor  # (N,) of c_j


def coefficients(
    slopes: Evaluated, target: Distilled, state: StudentState | TeacherState, entropy: Tensor, tau: Tensor
) -> RowGradient:
    """The coefficients from the derivatives of the loss with respect to the values of a row."""
    zero = torch.zeros_like(tau)
    kl, back, log_p, h, lse, even = (zero + slope for slope in slopes[1:])
    reverse = torch.where(back != 0, back * tau / target.s_tau, 0)
    one, uniform = lse - log_p - torch.where(h != 0, h * entropy, 0), zero
    if state.share is not None and state.possible is not None:
        uniform = torch.where(even != 0, even / state.possible, 0)
        one = one - uniform * state.share
    return RowGradient(
        torch.where(kl != 0, kl * tau / target.s_tau, 0) - torch.where(back != 0, reverse * target.mean, 0),
        torch.where(kl != 0, kl * tau / target.z_tau, 0),
        one,
        -h,
        log_p,
        reverse,
        uniform,
    )


class RowEnd(NamedTuple):
    value: Tensor  # (N,)
    counts: Tensor  # (N,) bool, whether the gradient is anything but 0
    target: Distilled
    gradient: RowGradient
    log_z: Tensor  # (N,) log s_one


def finish(
    state: StudentState | TeacherState,
    labelled: Tensor,
    tau: Tensor,
    options: RowOptions,
    shares: RowWeights,
    own: Tensor,
    upstream: Tensor | None,
) -> RowEnd:
    """The end of rows. own (T, N) or (T, 1): the coefficients of the terms; a term of weight 0 is left out, also where
    it is infinite or NaN. upstream: () or (N,); None: 1."""
    target = distil(state, labelled, tau, options)
    at = values_of(state, target)
    zero = torch.zeros_like(tau)
    total = Evaluated(*(zero for _ in Evaluated._fields))
    counts = zero > 0
    for (*_, term), coefficient in zip(options.pieces, own):
        c = coefficient * (shares.labelled if term.needs_label else shares.rows)
        if term.needs_label:
            c = torch.where(labelled, c, 0)
        found = term.evaluate(at)
        up = c if upstream is None else c * upstream
        weights = (c, *(up for _ in found[1:]))
        total = Evaluated(*(sums + torch.where(w != 0, w * new, 0) for sums, w, new in zip(total, weights, found)))
        counts = counts | (up != 0)
    return RowEnd(total.value, counts, target, coefficients(total, target, state, at.entropy, tau), state.s_one.log())
