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


def nll_of(state: StudentState | TeacherState) -> Tensor:
    """-log p_y = log S1 - (s_y - m_s)"""
    return state.s_one.log() - (state.s_y - state.m_s)


class Distilled(NamedTuple):
    """Student and calibrated target at temperature tau."""

    forward_kl: Tensor  # (N,)
    s_tau: Tensor
    z_tau: Tensor
    clip: Clip
    impossible: Tensor  # (N,) bool


def distil(state: StudentState | TeacherState, labelled: Tensor, tau: Tensor, options: RowOptions) -> Distilled:
    """The calibrated target; zeros without a term that needs it."""
    zero = torch.zeros_like(state.m_s)
    clip = Clip(zero, zero, zero)
    if not options.distils or not isinstance(state, StudentState):
        return Distilled(zero, zero, zero, clip, zero > 0)
    if isinstance(options.calibration, WClip):
        wrong = labelled & (state.t_y < state.m_t)
        found = wclip(state.t_y - state.m_t, options.calibration.budget, options.calibration.margin)
        clip = Clip(*(torch.where(wrong, value, 0) for value in found))
    target = replace(state, clip, 1 / tau)
    kl = forward_kl_of(state, target, tau)
    return Distilled(kl, state.s_tau, target.z_tau, clip, target.impossible > 0)


def values_of(state: StudentState | TeacherState, target: Distilled) -> RowValues:
    """The values of rows that terms read."""
    log_z = state.s_one.log()
    entropy = torch.zeros_like(log_z) if state.e_s is None else log_z - state.e_s / state.s_one
    return RowValues(target.forward_kl, (state.s_y - state.m_s) - log_z, entropy, state.m_s + log_z)


class RowGradient(NamedTuple):
    """Coefficients of dL/ds_j.                                                                     [row-gradient]"""

    student_tau: Tensor  # (N,)
    teacher_tau: Tensor  # (N,)
    one: Tensor  # (N,) of p_j
    log: Tensor  # (N,) of p_j log p_j
    label: Tensor  # (N,) of 1[j = y]


def coefficients(slopes: Evaluated, target: Distilled, entropy: Tensor, tau: Tensor) -> RowGradient:
    """The coefficients from the derivatives of the loss with respect to the values of a row."""
    zero = torch.zeros_like(tau)
    kl, log_p, h, lse = (zero + slope for slope in slopes[1:])
    return RowGradient(
        torch.where(kl != 0, kl * tau / target.s_tau, 0),
        torch.where(kl != 0, kl * tau / target.z_tau, 0),
        lse - log_p - torch.where(h != 0, h * entropy, 0),
        -h,
        log_p,
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
    total = Evaluated(zero, zero, zero, zero, zero)
    counts = zero > 0
    for (_, _, term), coefficient in zip(options.terms, own):
        c = coefficient * (shares.labelled if term.needs_label else shares.rows)
        if term.needs_label:
            c = torch.where(labelled, c, 0)
        found = term.evaluate(at)
        up = c if upstream is None else c * upstream
        weights = (c, up, up, up, up)
        total = Evaluated(*(sums + torch.where(w != 0, w * new, 0) for sums, w, new in zip(total, weights, found)))
        counts = counts | (up != 0)
    return RowEnd(total.value, counts, target, coefficients(total, target, at.entropy, tau), state.s_one.log())
