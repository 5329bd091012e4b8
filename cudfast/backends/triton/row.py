"""csrc/row for Triton: the same functions, in the same order, under the same tags.

What is folded over columns comes as lanes (BLOCK,) in the computing type; what follows once per row are scalars in f64.
Exponentials are powers of two, with log2(e) and 1 / tau folded into one factor. The exact projection is not here.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)

# ---- csrc/row/state.h ----


# Student loss: state of one row, or of some of its columns                                          [state-student]
# (m_t, m_s, z_tau, s_tau, a, s_one, z_one, impossible); k, s_k and the label's logits are found once a row is whole.
@triton.jit
def power(e, P: tl.constexpr):
    """e^(x) from e^(x / P): temperatures 1, 2 and 4 need no second exponential."""
    if P >= 2:
        e = e * e
    if P >= 4:
        e = e * e
    return e


@triton.jit
def student_fold(z_tau, s_tau, a, s_one, z_one, impossible, dt, ds, base, P: tl.constexpr, ONES: tl.constexpr):
    """Adds the columns in dt = t - m_t and ds = s - m_s; base = log2(e) / tau.

    `a` waits for its 1 / tau. Where a logit is -inf, dt - ds is infinite or NaN and counts for nothing; +inf is a class
    that only the student excludes, and stays in `impossible`.
    """
    e_t = tl.exp2(dt * base)
    e_s = tl.exp2(ds * base)
    excess = dt - ds
    impossible = tl.maximum(impossible, excess)
    excess = tl.where(tl.abs(excess) < float("inf"), excess, 0.0)
    z_tau += e_t
    s_tau += e_s
    a += e_t * excess
    if ONES > 0:
        s_one += power(e_s, P) if P > 0 else tl.exp2(ds * LOG2E)
    if ONES > 1:
        z_one += power(e_t, P) if P > 0 else tl.exp2(dt * LOG2E)
    return z_tau, s_tau, a, s_one, z_one, impossible


@triton.jit
def below(part, whole):
    """Distance from a part's maximum to the whole's; an empty part has nothing to rescale."""
    return tl.where(part == NOTHING, 0.0, part - whole)


@triton.jit
def student_move(z_tau, s_tau, a, s_one, z_one, down_t, down_s, base, tau):
    """Sums as seen from maxima further up; tau = 1 where `a` waits for its 1 / tau.                 [merge-student]"""
    teacher = tl.exp2(down_t * base)
    student = tl.exp2(down_s * base)
    a = teacher * (a + z_tau * ((down_t - down_s) / tau))
    z_tau = teacher * z_tau
    s_tau = student * s_tau
    s_one = tl.exp2(down_s * LOG2E) * s_one
    z_one = tl.exp2(down_t * LOG2E) * z_one
    return z_tau, s_tau, a, s_one, z_one


# Teacher loss: (m, z, e)                                                                            [state-teacher]
@triton.jit
def teacher_fold(z, e, x):
    """Adds the columns in x = z_j - m; `e` counts in powers of two until the row is whole."""
    x = x * LOG2E
    p = tl.exp2(x)
    z += p
    e += p * tl.where(x > NOTHING, x, 0.0)
    return z, e


@triton.jit
def teacher_move(z, e, down, base):
    """e' = e^(m - m') (e + z (m - m')); base: what an exponent is multiplied by for exp2.           [merge-teacher]"""
    scale = tl.exp2(down * LOG2E)
    return scale * z, scale * (e + z * (down * base))


# ---- csrc/row/target.h ----


@triton.jit
def expm1(x):
    """e^x - 1 to a few roundings, by the quotient that forgives u's own rounding."""
    u = tl.exp(x)
    near = tl.where((u == 1.0) | (u == 0.0) | (u == float("inf")), 2.0, u)
    exact = (near - 1.0) * x / tl.log(near)
    return tl.where(u == 1.0, x, tl.where((u == 0.0) | (u == float("inf")), u - 1.0, exact))


@triton.jit
def log1p(x):
    """log(1 + x), the same way."""
    u = 1.0 + x
    near = tl.where((u == 1.0) | (u == 0.0), 2.0, u)
    return tl.where(u == 1.0, x, tl.where(u == 0.0, float("-inf"), tl.log(near) * x / (near - 1.0)))


@triton.jit
def wclip(u, budget, margin):
    """(r, t_k, t_y): moved mass times Z1 and the two new logits minus m_t; u = t_y - m_t.                    [clip]"""
    below_one = expm1(u)
    r = tl.minimum(budget, -margin * below_one)
    moves = r > 0
    inside = tl.where(moves, r, 0.5)
    t_k = tl.where(moves, log1p(-inside), 0.0)
    t_y = tl.where(moves, tl.log((1.0 + below_one) + inside), u)
    return r, t_k, t_y


@triton.jit
def replace(z_tau, a, impossible, m_t, m_s, s_k, t_y, s_y, r, new_t_k, new_t_y, tau):
    """The teacher's sums after the clip: two contributions leave, two come in.                            [replace]"""
    moves = r > 0
    w_k = (s_k - m_s) / tau
    w_y = (s_y - m_s) / tau
    blocked = moves & ((w_k == NOTHING) | (w_y == NOTHING))
    changes = moves & (w_k > NOTHING) & (w_y > NOTHING)
    w_k = tl.where(changes, w_k, 0.0)
    w_y = tl.where(changes, w_y, 0.0)
    new_k = tl.where(changes, new_t_k / tau, 0.0)
    new_y = tl.where(changes, new_t_y / tau, 0.0)
    old_y = tl.where(changes & (t_y > NOTHING), (t_y - m_t) / tau, 0.0)
    mass_k = tl.exp(new_k)
    mass_y = tl.exp(new_y)
    mass_old = tl.where(t_y > NOTHING, tl.exp(old_y), 0.0)
    new_z = z_tau + ((mass_k - 1.0) + mass_y) - mass_old
    new_a = a + ((mass_k * (new_k - w_k) + w_k) + mass_y * (new_y - w_y)) - mass_old * (old_y - w_y)
    return (
        tl.where(changes, new_z, z_tau),
        tl.where(changes, new_a, a),
        tl.where(blocked, 1.0, impossible),
    )


# ---- csrc/row/terms.h ----


@triton.jit
def row_weights(ignored, labelled, weight):
    """How much a row counts in each term: (kd, ce).                                                   [row-weights]"""
    kd = tl.where(ignored, 0.0, weight)
    return kd, tl.where(labelled, kd, 0.0)


@triton.jit
def kd_value(m_t, m_s, s_tau, z_tau, a, impossible, tau):
    """tau^2 KL(q || p) = tau^2 (a / z + log(s / z)); rounding below 0 is 0.                                    [kd]"""
    kl = a / z_tau + tl.log(s_tau / z_tau)
    kl = tl.where(kl < 0, 0.0, tau * tau * kl)
    kl = tl.where(impossible > 0, float("inf") + 0.0 * (z_tau * s_tau), kl)
    return tl.where((m_t == NOTHING) | (m_s == NOTHING), float("nan"), kl)


@triton.jit
def ce_value(s_one, s_y, m_s):
    """-log p_y = log S1 - (s_y - m_s)                                                                          [ce]"""
    return tl.log(s_one) - (s_y - m_s)


@triton.jit
def student_finish(
    m_t, m_s, z_tau, s_tau, a, s_one, impossible, s_k, t_y, s_y, labelled, tau, kd_weight, ce_weight, budget, margin,
    CLIP: tl.constexpr,
):  # fmt: skip
    """What a row comes to: (kd, ce, z_tau, impossible, r, t_k, t_y)."""
    ce = tl.where(labelled & (ce_weight > 0), ce_value(s_one, s_y, m_s), 0.0)
    r = tl.zeros_like(m_t)
    t_k = tl.zeros_like(m_t)
    new_t_y = t_y - m_t
    if CLIP:
        wrong = labelled & (t_y < m_t) & (kd_weight > 0)
        r, t_k, new_t_y = wclip(tl.where(wrong, t_y - m_t, 0.0), budget, margin)
        r = tl.where(wrong, r, 0.0)
        new_t_y = tl.where(r > 0, new_t_y, t_y - m_t)
    z_tau, a, impossible = replace(z_tau, a, impossible, m_t, m_s, s_k, t_y, s_y, r, t_k, new_t_y, tau)
    kd = tl.where(kd_weight > 0, kd_value(m_t, m_s, s_tau, z_tau, a, impossible, tau), 0.0)
    return kd, ce, z_tau, impossible, r, t_k, new_t_y


@triton.jit
def student_coefficients(s_tau, s_one, z_tau, tau, kd, ce):
    """(student_tau, teacher_tau, student_one, label) of dL/ds_j.                                 [student-gradient]"""
    return (
        tl.where(kd != 0, kd * tau / s_tau, 0.0),
        tl.where(kd != 0, kd * tau / z_tau, 0.0),
        tl.where(ce != 0, ce / s_one, 0.0),
        ce,
    )


@triton.jit
def raised(base, exponent):
    """base^exponent for base in [0, 1] and an exponent of any sign but below 0 at 0; 0^0 is 1."""
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
def teacher_finish(
    m, z, e, z_y, alpha, ce_weight, focal_weight, entropy_weight, gamma, threshold, scale, exponent,
    DIFFERENTIATE: tl.constexpr,
):  # fmt: skip
    """Value and slopes of Eq. 3: (value, entropy, slope, weight, log_z)."""
    log_z = tl.log(z)
    entropy = log_z - e / z
    log_p = (z_y - m) - log_z
    value = tl.where(ce_weight > 0, -ce_weight * log_p, 0.0)
    slope = tl.where(ce_weight > 0, -ce_weight, 0.0)
    f_value, f_slope = focal(log_p, gamma, alpha)
    value = value + tl.where(focal_weight > 0, focal_weight * f_value, 0.0)
    slope = slope + tl.where(focal_weight > 0, focal_weight * f_slope, 0.0)
    w_value, w_slope = gate(log_p, threshold, scale, exponent)
    weight = tl.where(entropy_weight > 0, entropy_weight * w_value, 0.0)
    value = value - tl.where(entropy_weight > 0, weight * entropy, 0.0)
    if DIFFERENTIATE:
        slope = slope - tl.where(entropy_weight > 0, entropy_weight * w_slope * entropy, 0.0)
    return value, entropy, slope, weight, log_z


@triton.jit
def teacher_coefficients(entropy, slope, weight, scale):
    """(one, log, label) of dL/dz_j = p_j (one + log * log p_j) + label 1[j = y].                 [teacher-gradient]"""
    return scale * (weight * entropy - slope), scale * weight, scale * slope


# ---- csrc/row/element.h ----


@triton.jit
def student_element(student_tau, teacher_tau, student_one, dt, ds, base, P: tl.constexpr, ONES: tl.constexpr):
    """dL/ds_j without the label's share; NaN in a NaN row.                                        [element-student]"""
    e_s = tl.exp2(ds * base)
    g = student_tau * e_s - teacher_tau * tl.exp2(dt * base)
    if ONES > 0:
        g += student_one * (power(e_s, P) if P > 0 else tl.exp2(ds * LOG2E))
    return tl.where(ds == NOTHING, 0.0 * (student_tau + student_one), g)


@triton.jit
def teacher_element(one, log, x, inv_z, log_z):
    """dL/dz_j without the label's share; x = z_j - m. 0 log 0 is 0.                               [element-teacher]"""
    p = tl.exp2(x * LOG2E) * inv_z
    return p * (one + log * tl.where(x > NOTHING, x - log_z, 0.0))
