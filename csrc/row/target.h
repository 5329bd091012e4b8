// Calibration: the teacher's logits that change, and their new values.                                 Eq. 2, 4-8
#pragma once

#include "extended.h"

namespace cudfast {
namespace {

// W-Clip moves delta = min(budget * p_k, margin * (p_k - p_y)) from the top-1 to the label. With u = t_y - m_t the
// partition function cancels: r = delta * Z1 = min(budget, -margin * expm1(u)).                              [clip]
template <class R>
struct Clip {
  R r = 0;    // moved mass times Z1; 0 if nothing moves
  R t_k = 0;  // new teacher logit of the top-1, minus m_t
  R t_y = 0;  // new teacher logit of the label, minus m_t
};

template <class R>
CUDFAST_HD inline Clip<R> wclip(R u, R budget, R margin) {
  Clip<R> clip;
  const R below_one = std::expm1(u);
  const R gap = -margin * below_one;
  clip.r = budget < gap ? budget : gap;
  clip.t_y = u;
  if (clip.r > 0) {  // r = 0 leaves both logits exactly as they are, for any u
    clip.t_k = std::log1p(-clip.r);
    clip.t_y = log((1 + below_one) + clip.r);
  }
  return clip;
}

// The teacher's sums after the clip: two contributions are replaced.                                      [replace]
template <class R>
struct TargetSums {
  R z_tau, a, impossible;
};

template <class R>
CUDFAST_HD inline TargetSums<R> replace(const StudentState<R>& state, const Clip<R>& clip, R inv_t, R inv_s) {
  TargetSums<R> sums{state.z_tau, state.a, state.impossible};
  if (!(clip.r > 0)) return sums;
  const R w_k = (state.s_k - state.m_s) * inv_s;
  const R w_y = (state.s_y - state.m_s) * inv_s;
  const R new_k = clip.t_k * inv_t;
  const R new_y = clip.t_y * inv_t;
  const R mass_k = exp(new_k);
  const R mass_y = exp(new_y);
  const bool had_mass = state.t_y > kNothing<R>;  // a label at -inf has no contribution
  const R old_y = (state.t_y - state.m_t) * inv_t;
  const R mass_old = had_mass ? exp(old_y) : R(0);
  sums.z_tau += (mass_k - 1) + mass_y;  // exp((t_k - m_t) / tau) was exactly 1
  sums.z_tau -= mass_old;
  if (w_k == kNothing<R> || w_y == kNothing<R>) {  // mass on a label or top-1 that is impossible for the student
    sums.impossible = 1;
    return sums;
  }
  sums.a += (mass_k * (new_k - w_k) + w_k) + mass_y * (new_y - w_y);
  if (had_mass) sums.a -= mass_old * (old_y - w_y);
  return sums;
}

// ---- W-Clip at low temperatures: where the top-1 dominates the teacher's tempered sums ----

// The teacher's sums over all classes but the top-1 and the label.
template <class R>
struct Rest {
  R m_t = kNothing<R>;  // maximum
  R z_tau = 0;          // relative to it
  R a = 0;              // and to the student's maximum of all classes
};

// Whether the sums cannot lose the top-1 by subtraction, as it dominates them.                             [leaves]
template <class R>
CUDFAST_HD inline bool leaves(const StudentState<R>& state, const Clip<R>& clip, const Inverse<R>& inverse) {
  if (!(clip.r > 0)) return false;
  const TargetSums<R> target = replace(state, clip, inverse.teacher, inverse.student);
  if (!(target.z_tau >= state.z_tau / 8)) return true;
  const R w_k = (state.s_k - state.m_s) * inverse.student, w_y = (state.s_y - state.m_s) * inverse.student;
  if (w_k == kNothing<R> || w_y == kNothing<R>) return false;  // the forward divergence is infinite
  const R old_y = (state.t_y - state.m_t) * inverse.teacher;
  const R left = std::fabs(w_k) + (state.t_y > kNothing<R> ? exp(old_y) * std::fabs(old_y - w_y) : R(0));
  const R kl = target.a / target.z_tau + log(state.s_tau / target.z_tau);
  return !(left <= 8 * target.z_tau * (kl < 1 ? R(1) : kl));
}

// The state with the calibrated target's sums, from those of the other classes. m_q has the packed type, which is f32
// unless `wide`, so a state loses nothing if it is packed.                                            [recalibrated]
template <class R>
CUDFAST_HD inline void recalibrate(ExtendedState<R>& state, const Clip<R>& clip, const Rest<R>& rest,
                                   const Inverse<R>& inverse, bool wide) {
  const bool some = rest.m_t > kNothing<R>;
  R lift = clip.t_k > clip.t_y ? clip.t_k : clip.t_y;
  if (some && rest.m_t - state.m_t > lift) lift = rest.m_t - state.m_t;
  const R m_q = state.m_t + lift;
  state.m_q = wide ? m_q : static_cast<R>(static_cast<float>(m_q));
  const R down = some ? (rest.m_t - state.m_q) * inverse.teacher : R(0);
  const R scale = exp(down);
  R z = scale * rest.z_tau, a = scale * (rest.a + rest.z_tau * down);
  const R t[2] = {clip.t_k, clip.t_y}, s[2] = {state.s_k, state.s_y};
  for (int i = 0; i < 2; ++i) {
    const R x = (t[i] + (state.m_t - state.m_q)) * inverse.teacher, w = (s[i] - state.m_s) * inverse.student;
    z += exp(x);
    if (s[i] == kNothing<R>) {
      state.impossible = 1;
    } else {
      a += exp(x) * (x - w);
    }
  }
  state.z_tau = z;
  state.a = a;
}

// ---- The exact projection, Eq. 2: bounds on the mass of N and of W, and on the entropy ----

template <class R>
CUDFAST_HD inline R log_add(R a, R b) {
  const R high = a > b ? a : b, low = a > b ? b : a;
  return high == kNothing<R> ? high : high + std::log1p(exp(low - high));
}

// Log masses of the target on N, W and the rest; which bounds are active, and which cannot be met.          [masses]
template <class R>
struct Masses {
  R near, wrong, rest;
  bool near_binds, wrong_binds;
  bool no_near;    // a mass is required on classes that have none
  bool all_wrong;  // all mass is on classes that may not have it
};

// q(N) >= low and q(W) <= high, from log masses on any common scale. Complements are summed, never subtracted.
template <class R>
CUDFAST_HD inline Masses<R> masses(R near, R wrong, R rest, R low, R high) {
  const R total = log_add(log_add(near, wrong), rest);
  const R n = near - total, w = wrong - total, r = rest - total;
  const R not_near = log_add(w, r), not_wrong = log_add(n, r);
  Masses<R> target{n, w, r, false, false, low > 0 && n == kNothing<R>, high < 1 && not_wrong == kNothing<R>};
  if (target.no_near) low = 0;  // the nearest that can be met
  if (target.all_wrong) high = 1;
  const R log_low = log(low), log_high = log(high), left = std::log1p(-low), lost = std::log1p(-high);
  const bool wrong_over = w > log_high, near_under = n < log_low;
  const R n_alone = n + (lost - not_wrong), w_alone = w + (left - not_near);  // if only the other bound is active
  target.wrong_binds = near_under ? !(w_alone <= log_high) : wrong_over;
  target.near_binds = wrong_over ? !(n_alone >= log_low) : near_under;
  if (target.near_binds && target.wrong_binds) {
    const R both = 1 - low - high;
    target.rest = both > 0 ? log(both) : kNothing<R>;
  } else if (target.wrong_binds) {
    target.near = n_alone;
    target.rest = r + (lost - not_wrong);
  } else if (target.near_binds) {
    target.wrong = w_alone;
    target.rest = r + (left - not_near);
  }
  if (target.near_binds) target.near = log_low;
  if (target.wrong_binds) target.wrong = log_high;
  return target;
}

// Sums of one set of classes at inverse temperature beta, x = t - m.                                       [tempered]
template <class R>
struct TemperedState {
  R m = 0;  // maximum
  R z = 0;  // sum exp(beta x)
  R e = 0;  // sum exp(beta x) x
  R v = 0;  // sum exp(beta x) x^2
};

template <class F>
struct TemperedSums {
  F z, e, v;
};

// A class this far below the largest of its set is impossible, however near beta is to 0.
constexpr float kNever = -1e8f;

// Flat: at beta = 0, where every possible class has weight 1.
template <bool Flat, class F>
CUDFAST_HD inline void fold(TemperedSums<F>& sums, F x, F beta) {
  const auto there = x > F(kNever);
  F p;
  if constexpr (Flat) {
    p = select(there, F(1), F(0));
  } else {
    p = exp(beta * x);
  }
  x = select(there, x, F(0));
  const F px = p * x;
  sums.z = sums.z + p;
  sums.e = sums.e + px;
  sums.v = sums.v + px * x;
}

// log sum exp(beta t); -inf for a set without possible classes.
template <class R>
CUDFAST_HD inline R log_mass(const TemperedState<R>& state, R beta) {
  return state.z == 0 ? kNothing<R> : beta * state.m + log(state.z);
}

// H = sum M (h - log M) over N, W and the rest, h the entropy within; its slope with respect to beta^2 is minus half a
// variance of t: within a set whose bound is active, and over the union of the other sets.                    [entropy]
template <class R>
struct Entropy {
  R value = 0;  // nats
  R slope = 0;
};

template <class R>
CUDFAST_HD inline Entropy<R> entropy(const TemperedState<R> (&sets)[3], const Masses<R>& target, R beta) {
  const R log_m[3] = {target.near, target.wrong, target.rest};
  const bool binds[3] = {target.near_binds, target.wrong_binds, false};
  R value = 0, variance = 0, shared = 0, mean = 0, free[3], at[3];
  CUDFAST_UNROLL
  for (int i = 0; i < 3; ++i) {
    free[i] = at[i] = 0;
    const TemperedState<R>& set = sets[i];
    if (set.z == 0 || log_m[i] == kNothing<R>) continue;
    const R m = exp(log_m[i]), centre = set.e / set.z;
    value += m * (log(set.z) - beta * centre - log_m[i]);
    variance += m * (set.v / set.z - centre * centre);
    at[i] = set.m + centre;
    free[i] = binds[i] ? R(0) : m;
    shared += free[i];
    mean += free[i] * at[i];
  }
  if (shared > 0) mean /= shared;
  CUDFAST_UNROLL
  for (int i = 0; i < 3; ++i) variance += free[i] * (at[i] - mean) * (at[i] - mean);
  return {value, -variance / 2};
}

// An end of the bracket around the temperature.
template <class R>
struct End {
  R beta;
  Entropy<R> found;  // the slope is NaN if it has not been summed
};

// The next beta between two ends, the entropy above `wanted` at `low`, below it at `high`.                     [temper]
//
// For normally distributed logits the entropy is linear in beta^2. Therefore the first choice is the cubic through both
// ends, beta^2 as a function of the entropy, if its slopes show that it is monotone; without the slope at `high`, a
// parabola. The second choice is a Newton step that stays in its end's half of the bracket, preferably from the end
// whose entropy is nearer: in log(H - H_high) if that is small, since the entropy decays exponentially, otherwise in
// log(beta). The last choice is the middle.
template <class R>
CUDFAST_HD inline R temper(const End<R>& low, const End<R>& high, R wanted) {
  const R drop = low.found.value - high.found.value, left = wanted - high.found.value, above = drop - left;
  const R u = low.beta * low.beta, width = high.beta * high.beta - u;
  const R w = above / drop, at_low = -drop / (width * low.found.slope);
  const R at_high = std::isnan(high.found.slope) ? 2 - at_low : -drop / (width * high.found.slope);
  const R s = w * (at_low + w * ((3 - 2 * at_low - at_high) + w * (at_low + at_high - 2)));
  if (at_low >= 0 && at_low <= 2 && at_high >= 0 && at_high <= 2 && s > 0 && s < 1) return std::sqrt(u + s * width);

  const R middle = low.beta > 0 ? std::sqrt(low.beta * high.beta) : high.beta / 4;
  R from_low = std::sqrt(-above / low.found.slope);
  if (low.beta > 0) {
    from_low = left < above ? low.beta + log(left / drop) * drop / (2 * low.beta * low.found.slope)
                            : low.beta * exp(-above / (2 * u * low.found.slope));
  }
  const R from_high = high.beta * exp(left / (2 * high.beta * high.beta * high.found.slope));
  const bool low_good = from_low > low.beta && from_low <= middle;
  const bool high_good = from_high < high.beta && from_high >= middle;
  if (low_good && (above < left || !high_good)) return from_low;
  return high_good ? from_high : middle;
}

// Another point for the same sweep as `step`, if steps do not converge: even shares of log(beta).             [spread]
template <class R>
CUDFAST_HD inline R spread(const End<R>& low, const End<R>& high, R step, R share) {
  R least = low.beta;
  if (!(least > 0)) least = high.beta / 16 < step / 4 ? high.beta / 16 : step / 4;
  return least * std::pow(high.beta / least, share);
}

}  // namespace
}  // namespace cudfast
