"""csrc/row/terms.h for Triton: each loss term, and what the terms of a row come to. Scalars in f64, once per row.

A term is a function of four values of a row: tau^2 KL(q || p), log p_y, the entropy and log sum exp of the student.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row import LEAVES, NOTHING, Clip, expm1, replace, wclip
from .settings import HEADER, WIDTH, clip_of

FORWARD_KL, CROSS_ENTROPY, FOCAL, ENTROPY, GATED_ENTROPY, Z_LOSS = (tl.constexpr(kind) for kind in range(6))


@triton.jit
def row_weights(ignored, labelled, weight):
    """How much a row counts: (in every term, in those of the label).                                  [row-weights]"""
    rows = tl.where(ignored, 0.0, weight)
    return rows, tl.where(labelled, rows, 0.0)


# ---- the values of a row ----


@triton.jit
def forward_kl(m_t, m_s, s_tau, z_tau, a, impossible, tau):
    """tau^2 KL(q || p) = tau^2 (a / z + log(s / z)); rounding below 0 is 0.                                    [kd]"""
    kl = a / z_tau + tl.log(s_tau / z_tau)
    kl = tl.where(kl < 0, 0.0, tau * tau * kl)
    kl = tl.where(impossible > 0, float("inf") + 0.0 * (z_tau * s_tau), kl)
    return tl.where((m_t == NOTHING) | (m_s == NOTHING), float("nan"), kl)


@triton.jit
def clip_of_row(m_t, t_y, labelled, given):
    """W-Clip of a row; r is 0 if nothing moves."""
    wrong = labelled & (t_y < m_t)
    budget, margin = clip_of(given.settings)
    found = wclip(tl.where(wrong, t_y - m_t, 0.0), budget, margin)
    r = tl.where(wrong, found.r, 0.0)
    return Clip(r, found.t_k, tl.where(r > 0, found.t_y, t_y - m_t))


@triton.jit
def student_target(m_t, m_s, z_tau, s_tau, a, impossible, s_k, t_y, s_y, m_q, labelled, tau, given, CLIP: tl.constexpr):
    """The calibrated target of a row and its divergence: (tau^2 KL, z_tau, clip)."""
    clip = Clip(tl.zeros_like(m_t), tl.zeros_like(m_t), t_y - m_t)
    if CLIP:
        clip = clip_of_row(m_t, t_y, labelled, given)
        z, excess, excluded = replace(z_tau, a, impossible, m_t, m_s, s_k, t_y, s_y, clip, tau)
        if CLIP == LEAVES:  # the sums of a row with m_q are those of its target already
            done = m_q < float("inf")
            z_tau = tl.where(done, z_tau, z)
            a = tl.where(done, a, excess)
            impossible = tl.where(done, impossible, excluded)
        else:
            z_tau, a, impossible = z, excess, excluded
    return forward_kl(m_t, m_s, s_tau, z_tau, a, impossible, tau), z_tau, clip


# ---- the terms ----


@triton.jit
def raised(base, exponent):
    """base^exponent for base in [0, 1] and any exponent (not below 0 if base is 0); 0^0 is 1."""
    inside = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp(exponent * tl.log(inside)), tl.where(exponent == 0, 1.0, 0.0))


@triton.jit
def focal(log_p, gamma, alpha):
    """(value, slope) of alpha (1 - p)^gamma (-log p).                                                       [focal]"""
    a = -expm1(log_p)
    a_gamma = raised(a, gamma)
    ratio = tl.where(a > 0, log_p / tl.where(a > 0, a, 1.0), -1.0)
    lost = log_p == NOTHING
    value = tl.where(lost, float("inf"), -alpha * a_gamma * log_p)
    return value, tl.where(lost, -alpha, alpha * a_gamma * (gamma * (1.0 - a) * ratio - 1.0))


@triton.jit
def gate(log_p, threshold, scale, exponent):
    """(value, slope) of w = 1{p < threshold} + scale (1 - p)^power.                                          [gate]"""
    a = -expm1(log_p)
    value = tl.where(1.0 - a < threshold, 1.0, 0.0) + scale * raised(a, exponent)
    slope = -scale * exponent * raised(a, exponent - 1.0) * (1.0 - a)
    return value, tl.where((exponent > 0) & (a > 0), slope, 0.0)


@triton.jit
def coefficient(at, given, term, row, share):
    """A term's coefficient times the row's share of the mean: 0 where the row does not count, NaN if not finite."""
    c = tl.load(at)
    if given.coefficients is not None:  # (T, N), or (T, 1) with a step of 0
        step = given.coefficient_step
        c = tl.load(given.coefficients + term * tl.where(step > 0, tl.num_programs(0), 1) + row * step)
    c = tl.where(tl.abs(c) < float("inf"), c, float("nan"))
    return tl.where(share != 0, c * share, 0.0)


@triton.jit
def weighted(c, x):
    """c x; 0 for a weight of 0 even if x is not finite."""
    return tl.where(c != 0, c * x, 0.0)


@triton.jit
def total(row, rows_share, labelled_share, given, divergence, log_p, entropy, lse, KINDS: tl.constexpr):
    """(value, whether any term counts, slopes by KL, log p, entropy and lse) of a row's weighted terms."""
    zero = tl.zeros((), tl.float64)
    value, by_kl, by_log_p, by_entropy, by_lse = zero, zero, zero, zero, zero
    counts = tl.zeros((), tl.int1)
    for i in tl.static_range(len(KINDS) - 1, -1, -1):  # the usual lists need fewer registers from their ends
        at = given.settings + HEADER + WIDTH * i
        if (KINDS[i] == CROSS_ENTROPY) | (KINDS[i] == FOCAL) | (KINDS[i] == GATED_ENTROPY):
            c = coefficient(at, given, i, row, labelled_share)
        else:
            c = coefficient(at, given, i, row, rows_share)
        counts = counts | (c != 0)
        if KINDS[i] == FORWARD_KL:
            value += weighted(c, divergence)
            by_kl += c
        elif KINDS[i] == CROSS_ENTROPY:
            value -= weighted(c, log_p)
            by_log_p -= c
        elif KINDS[i] == FOCAL:
            term, slope = focal(log_p, tl.load(at + 1), tl.load(at + 2))
            value += weighted(c, term)
            by_log_p += weighted(c, slope)
        elif KINDS[i] == ENTROPY:
            value += weighted(c, entropy)
            by_entropy += c
        elif KINDS[i] == GATED_ENTROPY:
            w, slope = gate(log_p, tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
            value += weighted(c, w * entropy)
            by_log_p += weighted(c * tl.load(at + 4), slope * entropy)  # or w is a constant
            by_entropy += weighted(c, w)
        else:
            value += weighted(c, lse * lse)
            by_lse += weighted(c, 2.0 * lse)
    return value, counts, by_kl, by_log_p, by_entropy, by_lse


@triton.jit
def finish(row, rows_share, labelled_share, given, divergence, m_s, s_one, e_s, s_y, KINDS: tl.constexpr):
    """(value, whether any term counts, log_z, by_kl, one, log, label) of a row, with a target or without.

    dL/ds_j = by_kl d KL/ds_j + p_j (one + log * log p_j) + label 1[j = y].
    """
    log_z = tl.log(s_one)
    entropy = log_z - e_s / s_one
    value, counts, by_kl, by_log_p, by_entropy, by_lse = total(
        row, rows_share, labelled_share, given, divergence, (s_y - m_s) - log_z, entropy, m_s + log_z, KINDS
    )
    one = by_lse - by_log_p - tl.where(by_entropy != 0, by_entropy * entropy, 0.0)
    return value, counts, log_z, by_kl, one, -by_entropy, by_log_p


@triton.jit
def student_coefficients(s_tau, s_one, z_tau, tau, by_kl, one, log):
    """(student_tau, teacher_tau, student_one, student_log) of dL/ds_j.                              [row-gradient]"""
    return (
        tl.where(by_kl != 0, by_kl * tau / s_tau, 0.0),
        tl.where(by_kl != 0, by_kl * tau / z_tau, 0.0),
        tl.where(one != 0, one / s_one, 0.0),
        tl.where(log != 0, log / s_one, 0.0),
    )
