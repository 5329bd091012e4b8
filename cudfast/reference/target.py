"""csrc/row/target.h: the teacher's logits that change, and their new values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .state import NOTHING, StudentState, finite


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
    """The calibrated target's sums, relative to its reference and to the student's maximum."""

    z_tau: Tensor
    a: Tensor
    impossible: Tensor
    b: Tensor | None
    missing: Tensor | None
    centre: Tensor  # (N,) the reference: a logit


def replace(state: StudentState, clip: Clip, inv_t: Tensor, inv_s: Tensor) -> TargetSums:
    """The sums after the clip: two contributions are replaced.                                          [replace]"""
    moves = clip.r > 0
    can_k, can_y = state.s_k > NOTHING, state.s_y > NOTHING
    w_k, w_y = finite((state.s_k - state.m_s) * inv_s), finite((state.s_y - state.m_s) * inv_s)
    blocked = moves & ~(can_k & can_y)
    new_k, new_y = finite(clip.t_k * inv_t), finite(clip.t_y * inv_t)
    old_y = finite((state.t_y - state.m_t) * inv_t)
    had_mass = state.t_y > NOTHING
    dz = (new_k.exp() - 1) + new_y.exp()
    da = (new_k.exp() * (new_k - w_k) + w_k) + new_y.exp() * (new_y - w_y)
    dz = dz - torch.where(had_mass, old_y.exp(), 0)
    da = da - torch.where(had_mass, old_y.exp() * (old_y - w_y), 0)
    b = missing = None
    if state.b is not None and state.missing is not None:
        db = torch.where(can_k, -w_k.exp() * new_k, 0)
        db = db + torch.where(can_y, w_y.exp() * (torch.where(had_mass, old_y, w_y) - new_y), 0)
        b = state.b + torch.where(moves, db, 0)
        missing = state.missing - (moves & can_y & ~had_mass).to(state.missing.dtype)
    return TargetSums(
        state.z_tau + torch.where(moves, dz, 0),
        state.a + torch.where(moves & ~blocked, da, 0),
        torch.where(blocked, 1, state.impossible),
        b,
        missing,
        state.m_t,
    )


class Rest(NamedTuple):
    """The teacher's sums over all classes but the top-1 and the label."""

    m_t: Tensor  # (N,) maximum
    z_tau: Tensor  # (N,) relative to it
    a: Tensor  # (N,) and to the student's maximum of all classes


def leaves(state: StudentState, clip: Clip, inv_t: Tensor, inv_s: Tensor) -> Tensor:
    """(N,) bool: rows whose sums cannot lose the top-1 by subtraction, as it dominates them.              [leaves]"""
    target = replace(state, clip, inv_t, inv_s)
    blocked = (state.s_k == NOTHING) | (state.s_y == NOTHING)  # the forward divergence is infinite
    w_k, w_y = finite((state.s_k - state.m_s) * inv_s), finite((state.s_y - state.m_s) * inv_s)
    old_y = finite((state.t_y - state.m_t) * inv_t)
    left = w_k.abs() + torch.where(state.t_y > NOTHING, old_y.exp() * (old_y - w_y).abs(), 0)
    kl = target.a / target.z_tau + (state.s_tau / target.z_tau).log()
    stays = (target.z_tau >= state.z_tau / 8) & (blocked | (left <= 8 * target.z_tau * kl.clamp(min=1)))
    return (clip.r > 0) & ~stays


def recalibrated(
    state: StudentState, clip: Clip, rest: Rest, inv_t: Tensor, inv_s: Tensor, dtype: torch.dtype
) -> StudentState:
    """The state with the calibrated target's sums, from those of the other classes. m_q is rounded to the dtype in
    which the state is packed.                                                                       [recalibrated]"""
    m_q = state.m_t + torch.maximum(_below(rest.m_t, state.m_t), torch.maximum(clip.t_k, clip.t_y))
    m_q = m_q.to(dtype).to(m_q.dtype)
    down = torch.where(rest.m_t == NOTHING, 0, finite((rest.m_t - m_q) * inv_t))
    scale = down.exp()
    z, a, impossible = scale * rest.z_tau, scale * (rest.a + rest.z_tau * down), state.impossible
    for new, s in ((clip.t_k, state.s_k), (clip.t_y, state.s_y)):
        x, w = finite((new + (state.m_t - m_q)) * inv_t), finite((s - state.m_s) * inv_s)
        z, a = z + x.exp(), a + torch.where(s > NOTHING, x.exp() * (x - w), 0)
        impossible = torch.where(s > NOTHING, impossible, 1)
    return state._replace(m_q=m_q, z_tau=z, a=a, impossible=impossible)


def _below(m_r: Tensor, m_t: Tensor) -> Tensor:
    return torch.where(m_r == NOTHING, NOTHING, m_r - m_t)


class Masses(NamedTuple):
    """Log masses of the target on N, W and the rest; which bounds are active, and which cannot be met.    [masses]"""

    near: Tensor  # (N,)
    wrong: Tensor  # (N,)
    rest: Tensor  # (N,)
    near_binds: Tensor  # (N,) bool
    wrong_binds: Tensor  # (N,) bool
    no_near: Tensor  # (N,) bool, a mass is required on classes that have none
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
    n_alone, w_alone = n + (lost - not_wrong), w + (left - not_near)  # if only the other bound is active
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


NEVER = -1e8  # a class this far below the largest of its set is impossible, however near beta is to 0


def tempered_fold(x: Tensor, beta: Tensor) -> TemperedSums:
    """Sums over the last axis of x = t - m (N, V); beta (N, 1). With beta 0, every possible class has weight 1."""
    there = x > NEVER
    p = torch.where(beta == 0, there.to(x.dtype), (beta * x).exp())
    x = torch.where(there, x, 0)
    return TemperedSums(p.sum(-1), (p * x).sum(-1), (p * x * x).sum(-1))


def log_mass(state: TemperedState, beta: Tensor) -> Tensor:
    """log sum exp(beta t); -inf for a set without possible classes."""
    return torch.where(state.z > 0, beta * state.m + state.z.log(), NOTHING)


class Entropy(NamedTuple):
    value: Tensor  # (N,) nats
    slope: Tensor  # (N,) with respect to beta^2


def entropy(sets: tuple[TemperedState, ...], target: Masses, beta: Tensor) -> Entropy:
    """H = sum M (h - log M) over N, W and the rest, h the entropy within.                              [entropy]

    Its slope with respect to beta^2 is minus half a variance of t: within a set whose bound is active, and over the
    union of the other sets.
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
    """An end of the bracket around the temperature."""

    beta: Tensor  # (N,)
    value: Tensor  # (N,) entropy
    slope: Tensor  # (N,) NaN where it has not been summed


def temper(low: End, high: End, wanted: Tensor) -> Tensor:
    """The next beta between two ends, the entropy above `wanted` at `low`, below it at `high`.          [temper]

    For normally distributed logits the entropy is linear in beta^2. Therefore the first choice is the cubic through
    both ends, beta^2 as a function of the entropy, if its slopes show that it is monotone; without the slope at `high`,
    a parabola. The second choice is a Newton step that stays in its end's half of the bracket, preferably from the end
    whose entropy is nearer: in log(H - H_high) if that is small, since the entropy decays exponentially, otherwise in
    log(beta). The last choice is the middle.
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


def spread(low: End, high: End, step: Tensor, share: float) -> Tensor:
    """Another point for the same sweep as `step`, if steps do not converge: shares of log(beta).           [spread]"""
    least = torch.where(low.beta > 0, low.beta, torch.minimum(high.beta / 16, step / 4))
    return least * (high.beta / least) ** share
