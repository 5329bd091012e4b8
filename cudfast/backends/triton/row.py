"""csrc/row/state.h and target.h for Triton: the same functions, in the same order, under the same tags.

Values that are summed over columns are lanes (BLOCK,) in the computing type; values per row are scalars in f64.
Exponentials are powers of two, with log2(e) and 1 / tau combined in one factor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...terms import term

NOTHING = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(-1e33)
LOWEST = tl.constexpr(-1.7976931348623157e308)
LOWEST_F32 = tl.constexpr(-3.4028234663852886e38)

# ---- csrc/row/state.h ----


# Student loss: state of one row, or of some of its columns                                          [state-student]
class OwnSums(NamedTuple):
    """Sums of the student alone, as in `cudfast.reference.StudentState`."""

    s_two: Any
    uniform: Any
    share: Any
    possible: Any


class StudentState(NamedTuple):
    """Maxima and sums relative to them; k, s_k and the label's logits are read after the last column.

    Maxima are scalars, the others lanes: (BLOCK,), or (BLOCK / WIDTH,) where threads add their columns first.
    """

    m_t: Any
    m_s: Any
    z_tau: Any
    s_tau: Any
    a: Any
    s_one: Any
    z_one: Any
    e_t: Any
    e_s: Any
    impossible: Any
    b: Any
    missing: Any
    own: Any


# ONES: the sums that are needed besides z_tau, s_tau and a, of these; the last five: see cudfast/terms/term.py.
S_ONE = tl.constexpr(1)
Z_ONE = tl.constexpr(2)
E_T = tl.constexpr(term.TEACHER_ENTROPY)  # with Z_ONE
E_S = tl.constexpr(term.STUDENT_ENTROPY)  # with S_ONE
REVERSE = tl.constexpr(term.REVERSE)  # b, missing
UNIFORM = tl.constexpr(term.UNIFORM)  # uniform, share, possible
SQUARE = tl.constexpr(term.SQUARE)  # s_two


class Bases(NamedTuple):
    """Factors of logits in exponents of two: log2(e) / tau."""

    student: Any
    teacher: Any  # None: the student's


@triton.jit
def teacher_base(bases):
    if bases.teacher is None:
        return bases.student
    return bases.teacher


@triton.jit
def unit_of(bases, tau):
    """What `a` and `b` of lanes are divided by in the end."""
    if bases.teacher is None:
        return tau
    return LOG2E


@triton.jit
def excess_of(dt, ds, bases):
    """The difference of the tempered logits times `unit_of`, where both are finite."""
    if bases.teacher is None:
        return dt - ds
    least = LOWEST if dt.dtype == tl.float64 else LOWEST_F32
    return tl.maximum(dt * bases.teacher, least) - tl.maximum(ds * bases.student, least)


@triton.jit
def power(e, P: tl.constexpr):
    """e^(x) from e^(x / P): temperatures 1, 2 and 4 need no second exponential."""
    if P >= 2:
        e = e * e
    if P >= 4:
        e = e * e
    return e


@triton.jit
def one_of(d, base, P: tl.constexpr):
    """e^d at temperature 1."""
    return power(tl.exp2(d * base), P) if P > 0 else tl.exp2(d * LOG2E)


@triton.jit
def student_fold(
    z_tau, s_tau, a, s_one, z_one, e_t, e_s, impossible, dt, ds, bases, P: tl.constexpr, ONES: tl.constexpr
):
    """Adds the columns in dt = t - m_t and ds = s - m_s.

    `a` is not yet divided by `unit_of`. If a logit is -inf, dt - ds is infinite or NaN and is left out of the sum;
    +inf marks a class that only the student excludes, and remains in `impossible`.
    """
    teacher = tl.exp2(dt * teacher_base(bases))
    student = tl.exp2(ds * bases.student)
    apart = dt - ds
    impossible = tl.maximum(impossible, apart)
    excess = tl.where(tl.abs(apart) < float("inf"), excess_of(dt, ds, bases), 0.0)
    z_tau += teacher
    s_tau += student
    a += teacher * excess
    if S_ONE & ONES:
        one = power(student, P) if P > 0 else tl.exp2(ds * LOG2E)
        s_one += one
        if E_S & ONES:
            e_s += one * tl.where(ds > NOTHING, ds, 0.0)
    if Z_ONE & ONES:
        one = power(teacher, P) if P > 0 else tl.exp2(dt * LOG2E)
        z_one += one
        if E_T & ONES:
            e_t += one * tl.where(dt > NOTHING, dt, 0.0)
    return z_tau, s_tau, a, s_one, z_one, e_t, e_s, impossible


@triton.jit
def reverse_fold(b, missing, dt, ds, bases):
    """`b` is not yet divided by `unit_of`; -inf marks a class that only the teacher excludes."""
    apart = dt - ds
    excess = tl.where(tl.abs(apart) < float("inf"), excess_of(dt, ds, bases), 0.0)
    return b - tl.exp2(ds * bases.student) * excess, missing + tl.where(apart == NOTHING, 1.0, 0.0)


@triton.jit
def own_fold(own, u, one, weight, ONES: tl.constexpr):
    """Adds the columns in u = s - m_s; one = e^u; weight: of classes, or None."""
    s_two, uniform, share, possible = own
    if SQUARE & ONES:
        s_two += one * one
    if UNIFORM & ONES:
        can = u > NOTHING
        u = tl.where(can, u, 0.0)
        possible += tl.where(can, 1.0, 0.0)
        if weight is None:
            uniform += u
            share = possible
        else:
            uniform += weight * u
            share += tl.where(can, weight, 0.0)
    return OwnSums(s_two, uniform, share, possible)


@triton.jit
def below(part, whole):
    """Distance from a part's maximum to that of the whole; 0 for an empty part."""
    return tl.where(part == NOTHING, 0.0, part - whole)


@triton.jit
def distance(down_t, down_s, bases, unit):
    """The difference of two tempered distances.

    Those beyond FAR, of masked columns, would overflow in products that are then multiplied by 0.
    """
    if bases.teacher is None:
        by = (down_t - down_s) / unit
    else:
        by = (down_t * bases.teacher - down_s * bases.student) / unit
    return tl.maximum(tl.minimum(by, -FAR), FAR)


@triton.jit
def student_move(z_tau, s_tau, a, s_one, z_one, e_t, e_s, down_t, down_s, bases, unit):
    """Sums relative to larger maxima; unit: 1 if `a` is not yet divided by `unit_of`.               [merge-student]"""
    teacher = tl.exp2(down_t * teacher_base(bases))
    student = tl.exp2(down_s * bases.student)
    a = teacher * (a + z_tau * distance(down_t, down_s, bases, unit))
    z_tau = teacher * z_tau
    s_tau = student * s_tau
    one = tl.exp2(down_s * LOG2E)
    e_s = one * (e_s + s_one * tl.maximum(down_s, FAR))
    s_one = one * s_one
    one = tl.exp2(down_t * LOG2E)
    e_t = one * (e_t + z_one * tl.maximum(down_t, FAR))
    z_one = one * z_one
    return z_tau, s_tau, a, s_one, z_one, e_t, e_s


@triton.jit
def reverse_move(b, s_tau, down_t, down_s, bases, unit):
    """`b` relative to larger maxima; s_tau is relative to the old one."""
    return tl.exp2(down_s * bases.student) * (b - s_tau * distance(down_t, down_s, bases, unit))


@triton.jit
def own_move(own, down, ONES: tl.constexpr):
    """Sums relative to a larger maximum."""
    s_two, uniform, share, possible = own
    if SQUARE & ONES:
        one = tl.exp2(down * LOG2E)
        s_two = one * one * s_two
    if UNIFORM & ONES:
        uniform += share * tl.maximum(down, FAR)
    return OwnSums(s_two, uniform, share, possible)


@triton.jit
def own_added(left, right):
    return OwnSums(
        left.s_two + right.s_two,
        left.uniform + right.uniform,
        left.share + right.share,
        left.possible + right.possible,
    )


@triton.jit
def own_summed(own):
    """The sums of lanes in f64."""
    return OwnSums(
        tl.sum(own.s_two, 0).to(tl.float64),
        tl.sum(own.uniform, 0).to(tl.float64),
        tl.sum(own.share, 0).to(tl.float64),
        tl.sum(own.possible, 0).to(tl.float64),
    )


@triton.jit
def summed(state, unit):
    """The state with its lanes summed, in f64, and `a` and `b` divided by `unit_of`; impossible: 1 or 0."""
    # First, so that its registers are free during the other sums.
    excluded = tl.where(tl.max(state.impossible, 0) == float("inf"), 1.0, 0.0).to(tl.float64)
    return StudentState(
        state.m_t.to(tl.float64),
        state.m_s.to(tl.float64),
        tl.sum(state.z_tau, 0).to(tl.float64),
        tl.sum(state.s_tau, 0).to(tl.float64),
        tl.sum(state.a, 0).to(tl.float64) / unit,
        tl.sum(state.s_one, 0).to(tl.float64),
        tl.sum(state.z_one, 0).to(tl.float64),
        tl.sum(state.e_t, 0).to(tl.float64),
        tl.sum(state.e_s, 0).to(tl.float64),
        excluded,
        tl.sum(state.b, 0).to(tl.float64) / unit,
        tl.sum(state.missing, 0).to(tl.float64),
        own_summed(state.own),
    )


# Teacher loss: (m, z, e)                                                                            [state-teacher]
@triton.jit
def teacher_fold(z, e, x):
    """Adds the columns in x = z_j - m; `e` has base-2 logarithms until the last column."""
    x = x * LOG2E
    p = tl.exp2(x)
    z += p
    e += p * tl.where(x > NOTHING, x, 0.0)
    return z, e


@triton.jit
def teacher_move(z, e, down, base):
    """e' = e^(m - m') (e + z (m - m')); base: factor of exponents for exp2.                         [merge-teacher]"""
    scale = tl.exp2(down * LOG2E)
    z = scale * z
    return z, scale * e + z * tl.where(scale > 0, down * base, 0.0)


# ---- csrc/row/target.h ----

# CLIP: no W-Clip (0); W-Clip; W-Clip in a call whose top-1 may dominate the teacher's sums.
STAYS = tl.constexpr(1)
LEAVES = tl.constexpr(2)


@triton.jit
def expm1(x):
    """e^x - 1 to a few roundings, by a quotient in which the rounding of u cancels."""
    u = tl.exp(x)
    near = tl.where((u == 1.0) | (u == 0.0) | (u == float("inf")), 2.0, u)
    exact = (near - 1.0) * x / tl.log(near)
    return tl.where(u == 1.0, x, tl.where((u == 0.0) | (u == float("inf")), u - 1.0, exact))


@triton.jit
def log1p(x):
    """log(1 + x) to a few roundings, by the same method."""
    u = 1.0 + x
    near = tl.where((u == 1.0) | (u == 0.0), 2.0, u)
    return tl.where(u == 1.0, x, tl.where(u == 0.0, float("-inf"), tl.log(near) * x / (near - 1.0)))


class Clip(NamedTuple):
    """W-Clip of a row.                                                                                      [clip]"""

    r: Any  # moved mass times Z1; 0 when nothing moves
    t_k: Any  # new teacher logit of the top-1, minus m_t
    t_y: Any  # new teacher logit of the label, minus m_t


@triton.jit
def wclip(u, budget, margin):
    """r = min(budget, -margin * expm1(u)), u = t_y - m_t."""
    below_one = expm1(u)
    r = tl.minimum(budget, -margin * below_one)
    moves = r > 0
    inside = tl.where(moves, r, 0.5)
    t_k = tl.where(moves, log1p(-inside), 0.0)
    t_y = tl.where(moves, tl.log((1.0 + below_one) + inside), u)
    return Clip(r, t_k, t_y)


@triton.jit
def finite(quotient):
    """A quotient of finite numbers in f64, without overflow; NaN remains."""
    return tl.where(quotient < LOWEST, LOWEST, quotient)


class TargetSums(NamedTuple):
    """Sums of a target, relative to its maximum and to the student's."""

    z_tau: Any
    a: Any
    impossible: Any
    b: Any
    missing: Any


@triton.jit
def replace(sums, m_t, m_s, s_k, t_y, s_y, clip, tau_t, tau, ONES: tl.constexpr):
    """The teacher's sums after the clip: two contributions are replaced.                                  [replace]"""
    z_tau, a, impossible, b, missing = sums
    moves = clip.r > 0
    can_k = s_k > NOTHING
    can_y = s_y > NOTHING
    changes = moves & can_k & can_y
    w_k = finite((s_k - m_s) / tau)
    w_y = finite((s_y - m_s) / tau)
    new_k = clip.t_k / tau_t
    new_y = finite(clip.t_y / tau_t)
    old_y = finite((t_y - m_t) / tau_t)
    mass_k = tl.exp(new_k)
    mass_y = tl.exp(new_y)
    mass_old = tl.exp(old_y)
    new_z = z_tau + ((mass_k - 1.0) + mass_y) - mass_old
    new_a = a + ((mass_k * (new_k - w_k) + w_k) + mass_y * (new_y - w_y)) - mass_old * (old_y - w_y)
    if REVERSE & ONES:
        had_mass = t_y > NOTHING
        at_k = tl.where(moves & can_k, tl.exp(w_k) * new_k, 0.0)
        at_y = tl.where(moves & can_y, tl.exp(w_y) * (tl.where(had_mass, old_y, w_y) - new_y), 0.0)
        b += at_y - at_k
        missing -= tl.where(moves & can_y & (had_mass == 0), 1.0, 0.0)
    return TargetSums(
        tl.where(moves, new_z, z_tau),
        tl.where(changes, new_a, a),
        tl.where(moves & (changes == 0), 1.0, impossible),
        b,
        missing,
    )


@triton.jit
def leaves(sums, s_tau, m_t, m_s, s_k, t_y, s_y, clip, tau_t, tau):
    """Whether the sums cannot lose the top-1 by subtraction, as it dominates them.                         [leaves]"""
    target = replace(sums, m_t, m_s, s_k, t_y, s_y, clip, tau_t, tau, 0)
    z = target.z_tau
    blocked = (s_k == NOTHING) | (s_y == NOTHING)  # the forward divergence is infinite
    w_k = finite((s_k - m_s) / tau)
    w_y = finite((s_y - m_s) / tau)
    old_y = finite((t_y - m_t) / tau_t)
    left = tl.abs(w_k) + tl.where(t_y > NOTHING, tl.exp(old_y) * tl.abs(old_y - w_y), 0.0)
    kl = target.a / z + tl.log(s_tau / z)
    stays = (z >= sums.z_tau / 8.0) & (blocked | (left <= 8.0 * z * tl.where(kl < 1, 1.0, kl)))
    return (clip.r > 0) & (stays == 0)


@triton.jit
def recalibrated(rest, m_t, m_s, s_k, s_y, impossible, clip, tau_t, tau, R: tl.constexpr):
    """(m_q, z_tau, a, impossible) of the calibrated target, from (m_r, z, a) of the classes besides the top-1 and the
    label. m_q is rounded to R, in which it is stored.                                                [recalibrated]"""
    m_r, z, a = rest
    there = m_r > NOTHING
    lift = tl.maximum(tl.where(there, m_r - m_t, NOTHING), tl.maximum(clip.t_k, clip.t_y))
    m_q = (m_t + lift).to(R).to(tl.float64)
    down = tl.where(there, finite((m_r - m_q) / tau_t), 0.0)
    scale = tl.exp(down)
    z = scale * z
    a = scale * a + z * down
    x_k = finite((clip.t_k + (m_t - m_q)) / tau_t)
    x_y = finite((clip.t_y + (m_t - m_q)) / tau_t)
    mass_k = tl.exp(x_k)
    mass_y = tl.exp(x_y)
    z += mass_k + mass_y
    a += mass_k * (x_k - finite((s_k - m_s) / tau))
    a += mass_y * (x_y - finite((s_y - m_s) / tau))
    return m_q, z, a, tl.where((s_k > NOTHING) & (s_y > NOTHING), impossible, 1.0)


# The exact projection, Eq. 2. Logarithms of masses and entropies are (COUNT,): one per temperature.
class Masses(NamedTuple):
    """The log masses of a target's three sets, and which bounds are active or infeasible: scalars of a row."""

    near: Any
    wrong: Any
    rest: Any
    near_binds: Any
    wrong_binds: Any
    no_near: Any
    all_wrong: Any


@triton.jit
def log_add(a, b):
    high = tl.where(a > b, a, b)  # not tl.maximum, which drops a NaN
    down = tl.where(high == NOTHING, 0.0, tl.where(a > b, b, a) - high)
    return high + log1p(tl.exp(down))


@triton.jit
def masses(near, wrong, rest, low, high):
    """The target's masses from those of the teacher and the bounds on near and wrong.                       [masses]"""
    total = log_add(log_add(near, wrong), rest)
    n = near - total
    w = wrong - total
    r = rest - total
    not_near = log_add(w, r)
    not_wrong = log_add(n, r)
    no_near = (low > 0) & (n == NOTHING)
    all_wrong = (high < 1) & (not_wrong == NOTHING)
    low = tl.where(no_near, 0.0, low)  # the nearest that can be met
    high = tl.where(all_wrong, 1.0, high)
    log_low = tl.log(low)
    log_high = tl.log(high)
    left = log1p(-low)
    lost = log1p(-high)
    wrong_over = w > log_high
    near_under = n < log_low
    n_alone = n + (lost - not_wrong)  # if only the other bound is active
    w_alone = w + (left - not_near)
    wrong_binds = tl.where(near_under, (w_alone <= log_high) == 0, wrong_over)
    near_binds = tl.where(wrong_over, (n_alone >= log_low) == 0, near_under)
    both = tl.log(tl.maximum(1.0 - low - high, 0.0))
    r = tl.where(wrong_binds, r + (lost - not_wrong), tl.where(near_binds, r + (left - not_near), r))
    r = tl.where(near_binds & wrong_binds, both, r)
    n = tl.where(near_binds, log_low, tl.where(wrong_binds, n_alone, n))
    w = tl.where(wrong_binds, log_high, tl.where(near_binds, w_alone, w))
    return Masses(n, w, r, near_binds, wrong_binds, no_near, all_wrong)


NEVER = tl.constexpr(-1e8)  # a class this far below the largest of its set is impossible


# State of a set                                                                                          [tempered]
class TemperedState(NamedTuple):
    """Sums of a set relative to m, each weighted with exp(beta (t - m)): scalars of a row."""

    m: Any
    z: Any
    e: Any  # times t - m
    v: Any  # times (t - m)^2


@triton.jit
def tempered_fold(x, beta):
    """A class's contributions to (z, e, v), x = t - m; with beta 0, every possible class has weight 1."""
    there = x > NEVER
    x = tl.where(there, x, 0.0)
    p = tl.where(there, tl.exp2((beta * LOG2E) * x), 0.0)
    px = p * x
    return p, px, px * x


@triton.jit
def log_mass(m, z, beta):
    """log sum exp(beta t); -inf for a set without possible classes."""
    return tl.where(z > 0, beta * m + tl.log(tl.where(z > 0, z, 1.0)), NOTHING)


@triton.jit
def entropy_share(state, log_m, beta):
    """(mass, entropy, variance within, mean) of a set, all 0 if it has no mass."""
    m, z, e, v = state
    there = (z > 0) & (log_m > NOTHING)
    log_m = tl.where(there, log_m, 0.0)
    mass = tl.where(there, tl.exp(log_m), 0.0)
    z = tl.where(z > 0, z, 1.0)
    centre = e / z
    value = mass * (tl.log(z) - beta * centre - log_m)
    return mass, value, mass * (v / z - centre * centre), tl.where(there, m + centre, 0.0)


@triton.jit
def entropy(near, wrong, rest, target, beta):
    """(value, slope) of H = sum M (h - log M) over N, W and the rest; slope with respect to beta^2.        [entropy]"""
    mass_0, value_0, variance_0, at_0 = entropy_share(near, target.near, beta)
    mass_1, value_1, variance_1, at_1 = entropy_share(wrong, target.wrong, beta)
    mass_2, value_2, variance_2, at_2 = entropy_share(rest, target.rest, beta)
    free_0 = tl.where(target.near_binds, 0.0, mass_0)
    free_1 = tl.where(target.wrong_binds, 0.0, mass_1)
    shared = free_0 + free_1 + mass_2
    mean = tl.where(shared > 0, free_0 * at_0 + free_1 * at_1 + mass_2 * at_2, 0.0)
    mean = mean / tl.where(shared > 0, shared, 1.0)
    variance = variance_0 + variance_1 + variance_2
    variance += free_0 * (at_0 - mean) * (at_0 - mean)
    variance += free_1 * (at_1 - mean) * (at_1 - mean)
    variance += mass_2 * (at_2 - mean) * (at_2 - mean)
    return value_0 + value_1 + value_2, -variance / 2


@triton.jit
def temper(low, low_value, low_slope, high, high_value, high_slope, wanted):
    """The next beta between two ends, the entropy above `wanted` at `low`, below it at `high`.              [temper]"""
    drop = low_value - high_value
    left = wanted - high_value
    above = drop - left
    u = low * low
    width = high * high - u
    w = above / drop
    at_low = -drop / (width * low_slope)
    at_high = tl.where(high_slope == high_slope, -drop / (width * high_slope), 2.0 - at_low)
    s = w * (at_low + w * ((3.0 - 2.0 * at_low - at_high) + w * (at_low + at_high - 2.0)))
    smooth = (at_low >= 0) & (at_low <= 2) & (at_high >= 0) & (at_high <= 2) & (s > 0) & (s < 1)
    cubic = tl.sqrt(tl.where(smooth, u + s * width, 1.0))

    from_zero = low == 0
    middle = tl.where(from_zero, high / 4.0, tl.sqrt(low * high))
    some = tl.where(from_zero, 1.0, low)
    in_value = low + tl.log(left / drop) * drop / (2.0 * some * low_slope)
    in_beta = low * tl.exp(-above / (2.0 * some * some * low_slope))
    from_low = tl.where(left < above, in_value, in_beta)
    from_low = tl.where(from_zero, tl.sqrt(-above / low_slope), from_low)
    from_high = high * tl.exp(left / (2.0 * high * high * high_slope))
    low_good = (from_low > low) & (from_low <= middle)
    high_good = (from_high < high) & (from_high >= middle)
    use_low = low_good & ((above < left) | (high_good == 0))
    step = tl.where(use_low, from_low, tl.where(high_good, from_high, middle))
    return tl.where(smooth, cubic, step)


@triton.jit
def spread(low, high, step, share):
    """Another point for the same sweep as `step`, if steps do not converge: shares of log(beta).            [spread]"""
    least = tl.where(low > 0, low, tl.minimum(high / 16.0, step / 4.0))
    return least * tl.exp(share * tl.log(high / least))
