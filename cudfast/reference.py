"""The losses in plain PyTorch: the mirror of csrc/row.

Every function here has a twin of the same name in csrc/row (`student_merge` is `merge` of StudentState there), in the
same order and under the same equation tags; tests/test_mirrors.py walks them pair by pair. Tensors are (N,) where the
C++ has a scalar and (N, V) where it has a sweep. Nothing here is differentiated: gradients are written out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import CUDOptions, DUSOptions, WClip

NOTHING = -torch.inf


def first_top1(logits: Tensor) -> Tensor:
    """(N,) int64: the largest of every row (N, V), the first of equals on every device."""
    return (logits == logits.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)


# ---- csrc/row/state.h ----


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
    k: Tensor  # (N,) int64, teacher's top-1


class StudentSums(NamedTuple):
    """What a sweep accumulates around known maxima."""

    z_tau: Tensor
    s_tau: Tensor
    a: Tensor
    s_one: Tensor
    z_one: Tensor
    impossible: Tensor


def student_fold(dt: Tensor, ds: Tensor, inv_tau: Tensor) -> StudentSums:
    """Sums over the last axis of dt = t - m_t and ds = s - m_s (N, V); inv_tau (N, 1)."""
    x, w = dt * inv_tau, ds * inv_tau
    teacher, student = x.exp(), w.exp()
    both = (x > NOTHING) & (w > NOTHING)
    excess = torch.where(both, x - w, 0)
    impossible = ((x > NOTHING) & ~(w > NOTHING)).any(-1)
    return StudentSums(
        teacher.sum(-1),
        student.sum(-1),
        (teacher * excess).sum(-1),
        ds.exp().sum(-1),
        dt.exp().sum(-1),
        impossible.to(dt.dtype),
    )


def _down(m: Tensor, to: Tensor) -> Tensor:
    """Distance from a part's maximum to the new one; an empty part has nothing to rescale."""
    return torch.where(m == NOTHING, 0, m - to)


def student_merge(left: StudentState, right: StudentState, inv_tau: Tensor) -> StudentState:
    """State of the union of two disjoint sets of columns.                                           [merge-student]"""
    m_t, m_s = torch.maximum(left.m_t, right.m_t), torch.maximum(left.m_s, right.m_s)
    sums: list[Tensor] = []
    for part in (left, right):
        down_t, down_s = _down(part.m_t, m_t), _down(part.m_s, m_s)
        teacher, student = (down_t * inv_tau).exp(), (down_s * inv_tau).exp()
        a = teacher * (part.a + part.z_tau * ((down_t - down_s) * inv_tau))
        moved = (teacher * part.z_tau, student * part.s_tau, a, down_s.exp() * part.s_one, down_t.exp() * part.z_one)
        sums = [old + new for old, new in zip(sums, moved)] if sums else list(moved)
    from_left = torch.where(left.m_t == right.m_t, left.k <= right.k, left.m_t > right.m_t)
    return StudentState._make(
        (
            m_t,
            torch.where(from_left, left.s_k, right.s_k),
            m_s,
            *sums,
            torch.maximum(left.t_y, right.t_y),
            torch.maximum(left.s_y, right.s_y),
            torch.maximum(left.impossible, right.impossible),
            torch.where(from_left, left.k, right.k),
        )
    )


class TeacherState(NamedTuple):
    """State of rows in the teacher loss.                                                           [state-teacher]"""

    m: Tensor  # (N,) maximum
    z: Tensor  # (N,) sum exp(z_j - m)
    e: Tensor  # (N,) sum exp(z_j - m) * (z_j - m)
    z_y: Tensor  # (N,) logit of the label


class TeacherSums(NamedTuple):
    z: Tensor
    e: Tensor


def teacher_fold(x: Tensor) -> TeacherSums:
    """Sums over the last axis of x = z - m (N, V)."""
    p = x.exp()
    return TeacherSums(p.sum(-1), (p * torch.where(x > NOTHING, x, 0)).sum(-1))


def teacher_merge(left: TeacherState, right: TeacherState) -> TeacherState:
    """e' = e^(m - m') (e + z (m - m'))                                                              [merge-teacher]"""
    m = torch.maximum(left.m, right.m)
    z, e = torch.zeros_like(m), torch.zeros_like(m)
    for part in (left, right):
        down = _down(part.m, m)
        z = z + down.exp() * part.z
        e = e + down.exp() * (part.e + part.z * down)
    return TeacherState(m, z, e, torch.maximum(left.z_y, right.z_y))


# ---- csrc/row/target.h ----


class Clip(NamedTuple):
    """W-Clip of rows.                                                                                       [clip]"""

    r: Tensor  # (N,) moved mass times Z1; 0 when nothing moves
    t_k: Tensor  # (N,) new teacher logit of the top-1, minus m_t
    t_y: Tensor  # (N,) new teacher logit of the label, minus m_t


def wclip(u: Tensor, budget: float, margin: float) -> Clip:
    """r = min(budget, -margin * expm1(u)), u = t_y - m_t."""
    below_one = torch.expm1(u)
    r = torch.clamp(-margin * below_one, max=budget)
    moves = r > 0
    return Clip(r, torch.where(moves, torch.log1p(-r), 0), torch.where(moves, torch.log((1 + below_one) + r), u))


class TargetSums(NamedTuple):
    z_tau: Tensor
    a: Tensor
    impossible: Tensor


def replace(state: StudentState, clip: Clip, inv_tau: Tensor) -> TargetSums:
    """The teacher's sums after the clip: two contributions leave, two come in.                           [replace]"""
    moves = clip.r > 0
    w_k, w_y = (state.s_k - state.m_s) * inv_tau, (state.s_y - state.m_s) * inv_tau
    blocked = moves & ((w_k == NOTHING) | (w_y == NOTHING))
    changes = moves & ~blocked
    new_k, new_y = clip.t_k * inv_tau, clip.t_y * inv_tau
    old_y = (state.t_y - state.m_t) * inv_tau
    had_mass = state.t_y > NOTHING
    dz = (new_k.exp() - 1) + new_y.exp()
    da = (new_k.exp() * (new_k - w_k) + w_k) + new_y.exp() * (new_y - w_y)
    dz = dz - torch.where(had_mass, old_y.exp(), 0)
    da = da - torch.where(had_mass, old_y.exp() * (old_y - w_y), 0)
    return TargetSums(
        state.z_tau + torch.where(changes, dz, 0),
        state.a + torch.where(changes, da, 0),
        torch.where(blocked, 1, state.impossible),
    )


class Masses(NamedTuple):
    """Of the target on N, on W and on the rest, as logarithms; which bounds bind, and which cannot be met. [masses]"""

    near: Tensor  # (N,)
    wrong: Tensor  # (N,)
    rest: Tensor  # (N,)
    near_binds: Tensor  # (N,) bool
    wrong_binds: Tensor  # (N,) bool
    no_near: Tensor  # (N,) bool, a mass is wanted on classes that have none
    all_wrong: Tensor  # (N,) bool, all mass is on classes that may not have it


def masses(near: Tensor, wrong: Tensor, rest: Tensor, low: Tensor, high: Tensor) -> Masses:
    """The mass bounds q(N) >= low and q(W) <= high, from log masses on any common scale; complements are summed."""
    total = torch.logaddexp(torch.logaddexp(near, wrong), rest)
    n, w, r = near - total, wrong - total, rest - total
    not_near, not_wrong = torch.logaddexp(w, r), torch.logaddexp(n, r)
    no_near = (low > 0) & (n == NOTHING)
    all_wrong = (high < 1) & (not_wrong == NOTHING)
    low, high = torch.where(no_near, 0, low), torch.where(all_wrong, 1, high)  # the nearest that can be met
    log_low, log_high, left, lost = low.log(), high.log(), torch.log1p(-low), torch.log1p(-high)
    wrong_over, near_under = w > log_high, n < log_low
    n_alone, w_alone = n + (lost - not_wrong), w + (left - not_near)  # when only the other bound binds
    wrong_binds = torch.where(near_under, ~(w_alone <= log_high), wrong_over)
    near_binds = torch.where(wrong_over, ~(n_alone >= log_low), near_under)
    only_wrong, only_near = wrong_binds & ~near_binds, near_binds & ~wrong_binds
    both = torch.log(torch.clamp(1 - low - high, min=0))
    free_rest = torch.where(only_wrong, r + (lost - not_wrong), torch.where(only_near, r + (left - not_near), r))
    return Masses(
        torch.where(near_binds, log_low, torch.where(wrong_binds, n_alone, n)),
        torch.where(wrong_binds, log_high, torch.where(near_binds, w_alone, w)),
        torch.where(near_binds & wrong_binds, both, free_rest),
        near_binds,
        wrong_binds,
        no_near,
        all_wrong,
    )


class TemperedState(NamedTuple):
    """Sums of one set of classes at inverse temperature beta, x = t - m.                              [tempered]"""

    m: Tensor  # (N,) maximum
    z: Tensor  # (N,) sum exp(beta x)
    e: Tensor  # (N,) sum exp(beta x) x
    v: Tensor  # (N,) sum exp(beta x) x^2


class TemperedSums(NamedTuple):
    z: Tensor
    e: Tensor
    v: Tensor


NEVER = -1e8  # a class this far below the largest of its set never happens, however near beta comes to 0


def tempered_fold(x: Tensor, beta: Tensor) -> TemperedSums:
    """Sums over the last axis of x = t - m (N, V); beta (N, 1). Where it is 0, a class that can happen weighs 1."""
    there = x > NEVER
    p = torch.where(beta == 0, there.to(x.dtype), (beta * x).exp())
    x = torch.where(there, x, 0)
    return TemperedSums(p.sum(-1), (p * x).sum(-1), (p * x * x).sum(-1))


def log_mass(state: TemperedState, beta: Tensor) -> Tensor:
    """log sum exp(beta t); -inf for a set without classes that can happen."""
    return torch.where(state.z > 0, beta * state.m + state.z.log(), NOTHING)


class Entropy(NamedTuple):
    value: Tensor  # (N,) nats
    slope: Tensor  # (N,) with respect to beta^2


def entropy(sets: tuple[TemperedState, ...], target: Masses, beta: Tensor) -> Entropy:
    """H = sum M (h - log M) over N, W and the rest, h the entropy within.                              [entropy]

    Its slope with respect to beta^2 is minus half a variance of t: within a set whose mass is bound, and over the union
    of the sets that share what is left.
    """
    value, variance, shared, mean = (torch.zeros_like(beta) for _ in range(4))
    parts = []
    for state, log_m, binds in zip(sets, target[:3], (target.near_binds, target.wrong_binds, None)):
        there = (state.z > 0) & (log_m > NOTHING)
        m = torch.where(there, log_m.exp(), 0)
        z = torch.where(state.z > 0, state.z, 1)
        centre = state.e / z
        value = value + torch.where(there, m * (z.log() - beta * centre - log_m), 0)
        variance = variance + m * (state.v / z - centre * centre)
        free = m if binds is None else torch.where(binds, 0, m)
        at = torch.where(there, state.m + centre, 0)
        shared, mean = shared + free, mean + free * at
        parts.append((free, at))
    mean = torch.where(shared > 0, mean / shared, 0)
    for free, at in parts:
        variance = variance + free * (at - mean) ** 2
    return Entropy(value, -variance / 2)


class End(NamedTuple):
    """An end of a bracket around the temperature that is looked for."""

    beta: Tensor  # (N,)
    value: Tensor  # (N,) entropy
    slope: Tensor  # (N,) NaN where nobody has summed it


def temper(low: End, high: End, wanted: Tensor) -> Tensor:
    """The next beta between two ends, the entropy above `wanted` at `low`, below it at `high`.          [temper]

    Over beta^2 the entropy of normal logits is a straight line. So the first choice is the cubic through both ends,
    beta^2 as a function of the entropy, wherever its slopes say that it is monotone; without the one at `high`, a
    parabola. Else a Newton step that stays in its end's half of the bracket, from the end whose entropy is nearer if it
    does: in log(H - H_high) where that is small, since entropy dies exponentially, else in log(beta). Else the middle.
    """
    drop, left = low.value - high.value, wanted - high.value
    above = drop - left
    u = low.beta * low.beta
    width = high.beta * high.beta - u
    w, at_low = above / drop, -drop / (width * low.slope)
    at_high = torch.where(high.slope.isnan(), 2 - at_low, -drop / (width * high.slope))
    s = w * (at_low + w * ((3 - 2 * at_low - at_high) + w * (at_low + at_high - 2)))
    smooth = (at_low >= 0) & (at_low <= 2) & (at_high >= 0) & (at_high <= 2) & (s > 0) & (s < 1)

    middle = torch.where(low.beta > 0, torch.sqrt(low.beta * high.beta), high.beta / 4)
    from_low = torch.where(
        left < above,
        low.beta + torch.log(left / drop) * drop / (2 * low.beta * low.slope),
        low.beta * torch.exp(-above / (2 * u * low.slope)),
    )
    from_low = torch.where(low.beta > 0, from_low, torch.sqrt(-above / low.slope))
    from_high = high.beta * torch.exp(left / (2 * high.beta * high.beta * high.slope))
    low_good = (from_low > low.beta) & (from_low <= middle)
    high_good = (from_high < high.beta) & (from_high >= middle)
    use_low = low_good & ((above < left) | ~high_good)
    step = torch.where(use_low, from_low, torch.where(high_good, from_high, middle))
    return torch.where(smooth, torch.sqrt(u + s * width), step)


# ---- csrc/row/terms.h ----


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


# ---- csrc/row/element.h ----


def student_element(c: StudentGradient, dt: Tensor, ds: Tensor, inv_tau: Tensor) -> Tensor:
    """dL/ds_j without the label's share (N, V); coefficients and inv_tau (N, 1).                 [element-student]"""
    g = c.student_tau * (ds * inv_tau).exp() - c.teacher_tau * (dt * inv_tau).exp() + c.student_one * ds.exp()
    return torch.where(ds == NOTHING, 0 * (c.student_tau + c.student_one), g)  # NaN in a NaN row


def teacher_element(c: TeacherGradient, x: Tensor, inv_z: Tensor, log_z: Tensor) -> Tensor:
    """dL/dz_j without the label's share (N, V).                                                  [element-teacher]"""
    log_p = torch.where(x > NOTHING, x - log_z, 0)
    return x.exp() * inv_z * (c.one + c.log * log_p)
