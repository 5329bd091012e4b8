// The end of a row: the values that terms are functions of, the total over the terms, and the coefficients of the
// gradient.                                                                                              Eq. 3, 9
//
// Scalars only, once per row. A gradient is a combination of the columns {p, p^(tau), q^(tau), p log p, 1[j=y]}; the
// coefficients are in RowGradient, and element.h applies them to the row.
#pragma once

#include "target.h"
#include "terms/cross_entropy.h"
#include "terms/entropy.h"
#include "terms/focal.h"
#include "terms/forward_kl.h"
#include "terms/reverse_kl.h"
#include "terms/uniform.h"
#include "terms/z_loss.h"

namespace cudfast {
namespace {

template <class R>
CUDFAST_HD inline Evaluated<R> evaluate(const Term& term, const RowValues<R>& at) {
  switch (term.kind) {
    case kForwardKl:
      return forward_kl(at);
    case kCrossEntropy:
      return cross_entropy(at);
    case kFocal:
      return focal(at, term);
    case kEntropy:
      return entropy(at);
    case kGatedEntropy:
      return gated_entropy(at, term);
    default:
      return z_loss(at);
  }
}

template <class R>
CUDFAST_HD inline Evaluated<R, ExtendedSlopes<R>> evaluate(const Term& term, const ExtendedValues<R>& at) {
  if (term.kind == kReverseKl) return reverse_kl(at);
  if (term.kind == kUniformShare) return uniform(at);
  const Evaluated<R> plain = evaluate(term, static_cast<const RowValues<R>&>(at));
  Evaluated<R, ExtendedSlopes<R>> found;
  found.value = plain.value;
  static_cast<Slopes<R>&>(found.slopes) = plain.slopes;
  return found;
}

// The sums of a row with a target, a mask of Needs. statistics: the teacher's at temperature 1, too.
CUDFAST_HD inline int needs_of(const Terms& terms, bool statistics) {
  const int one = statistics ? kStudentOne | kTeacherOne : terms.labelled || terms.partition ? kStudentOne : 0;
  return one | (terms.entropy ? kStudentEntropy : 0);
}

// ---- Reduction: the weight of a row, before its share of a mean ----                                [row-weights]

template <class R>
struct RowWeights {
  R rows = 0;      // in terms that need no label; 0 if the row is excluded
  R labelled = 0;  // in the others; 0 if the row has no label
};

template <class R>
CUDFAST_HD inline RowWeights<R> row_weights(bool ignored, bool labelled, R weight) {
  if (ignored) return {R(0), R(0)};
  return {weight, labelled ? weight : R(0)};
}

// A row's own coefficients, in place of the terms'. One that is not finite is NaN.
struct Coefficients {
  const double* first = nullptr;  // of term 0; null: the row has none
  int64_t stride = 0;             // from term to term

  CUDFAST_HD double of(const Terms& terms, int t) const {
    if (!first) return terms.term[t].coefficient;
    const double own = first[t * stride];
    return own + (own - own);
  }
};

// ---- The values of a row ----

// tau^2 KL(q || p) = tau^2 (a / z + log(s / z)); rounding below 0 is 0.                                          [kd]
template <class R>
CUDFAST_HD inline R forward_kl_of(const StudentState<R>& state, const TargetSums<R>& target, R tau) {
  if (state.m_t == kNothing<R> || state.m_s == kNothing<R>) return std::numeric_limits<R>::quiet_NaN();
  if (target.impossible > 0) return std::numeric_limits<R>::infinity() + 0 * (target.z_tau * state.s_tau);
  const R kl = target.a / target.z_tau + log(state.s_tau / target.z_tau);
  return kl < 0 ? R(0) : tau * tau * kl;
}

// tau^2 KL(p || q) = tau^2 (mean + log(z / s)), mean = b / s; rounding below 0 is 0.                    [reverse-kd]
template <class R>
CUDFAST_HD inline R reverse_kl_of(const StudentState<R>& state, R z_tau, R missing, R mean, R tau) {
  if (state.m_t == kNothing<R> || state.m_s == kNothing<R>) return std::numeric_limits<R>::quiet_NaN();
  if (missing > 0) return std::numeric_limits<R>::infinity() + 0 * (z_tau * state.s_tau);
  const R kl = mean + log(z_tau / state.s_tau);
  return kl < 0 ? R(0) : tau * tau * kl;
}

// Student and calibrated target at temperature tau; zeros without a term that needs them.
template <class R>
struct Distilled {
  R forward_kl = 0;
  R s_tau = 0, z_tau = 0;
  Clip<R> clip;
  bool impossible = false;
};
template <class R>
struct ExtendedDistilled : Distilled<R> {
  R reverse_kl = 0;
  R mean = 0;    // of the student's log p / q, without the normalisers
  R centre = 0;  // what z_tau is relative to: a logit
  Inverse<R> inverse = {};
};

template <class R>
CUDFAST_HD_CALLED void distil(const StudentState<R>& state, bool labelled, R tau, const Terms& terms,
                              Distilled<R>& found) {
  if (!terms.distils) return;
  const bool wrong = labelled && terms.clip && state.t_y < state.m_t;  // equal logits: no mass would move
  if (wrong) found.clip = wclip(state.t_y - state.m_t, R(terms.budget), R(terms.margin));
  const TargetSums<R> target = replace(state, found.clip, 1 / tau, 1 / tau);
  found.forward_kl = forward_kl_of(state, target, tau);
  found.s_tau = state.s_tau;
  found.z_tau = target.z_tau;
  found.impossible = target.impossible > 0;
}
template <class R>
CUDFAST_HD inline void distil(const TeacherState<R>&, bool, R, const Terms&, Distilled<R>&) {}

// W-Clip of a row; zeros if it leaves the row as it is.
template <class R>
CUDFAST_HD inline Clip<R> clip_of(const StudentState<R>& state, bool labelled, const Terms& terms) {
  if (!(labelled && terms.clip && state.t_y < state.m_t)) return {};
  return wclip(state.t_y - state.m_t, R(terms.budget), R(terms.margin));
}

template <class R>
CUDFAST_HD inline Inverse<R> inverse_of(const Terms& terms, R tau) {
  return {1 / (terms.teacher_temperature > 0 ? R(terms.teacher_temperature) : tau), 1 / tau};
}

template <class R>
CUDFAST_HD_CALLED void distil(const ExtendedState<R>& state, bool labelled, R tau, const Terms& terms,
                              ExtendedDistilled<R>& found) {
  if (!terms.distils) return;
  const Inverse<R> inverse = found.inverse = inverse_of(terms, tau);
  const Clip<R> clip = found.clip = clip_of(state, labelled, terms);
  const bool done = state.m_q < std::numeric_limits<R>::infinity();
  const TargetSums<R> target =
      done ? TargetSums<R>{state.z_tau, state.a, state.impossible}
           : replace(static_cast<const StudentState<R>&>(state), clip, inverse.teacher, inverse.student);
  found.forward_kl = forward_kl_of(state, target, tau);
  found.s_tau = state.s_tau;
  found.z_tau = target.z_tau;
  found.impossible = target.impossible > 0;
  found.centre = done ? state.m_q : state.m_t;
  if (!(terms.sums & kReverse)) return;
  R b = state.b, missing = state.missing;
  if (clip.r > 0) {
    const R w_k = (state.s_k - state.m_s) * inverse.student, w_y = (state.s_y - state.m_s) * inverse.student;
    const bool had_mass = state.t_y > kNothing<R>;
    if (w_k > kNothing<R>) b -= exp(w_k) * (clip.t_k * inverse.teacher);
    if (w_y > kNothing<R>) {
      b += exp(w_y) * ((had_mass ? (state.t_y - state.m_t) * inverse.teacher : w_y) - clip.t_y * inverse.teacher);
      if (!had_mass) missing -= 1;
    }
  }
  found.mean = b / state.s_tau + (found.centre - state.m_t) * inverse.teacher;
  found.reverse_kl = reverse_kl_of(state, target.z_tau, missing, found.mean, tau);
}
template <class R>
CUDFAST_HD inline void distil(const ExtendedTeacherState<R>&, bool, R, const Terms&, ExtendedDistilled<R>&) {}

// ---- The total ----

// dL/ds_j = student_tau e^((s_j - m_s) / tau) - teacher_tau e^((t_j - m_t) / tau) + p_j (one + log * log p_j) +
// label 1[j = y]                                                                                     [row-gradient]
template <class R>
struct RowGradient {
  R student_tau = 0;
  R teacher_tau = 0;
  R one = 0;
  R log = 0;
  R label = 0;
};

// d log_p / ds_j = 1[j = y] - p_j, d entropy / ds_j = -p_j (log p_j + H), d lse / ds_j = p_j.
template <class R>
CUDFAST_HD inline RowGradient<R> coefficients(const Slopes<R>& by, const Distilled<R>& target, R entropy, R tau,
                                              R upstream) {
  RowGradient<R> c;
  if (by.forward_kl != 0) {
    const R scaled = by.forward_kl * upstream * tau;
    c.student_tau = scaled / target.s_tau;
    c.teacher_tau = scaled / target.z_tau;
  }
  c.one = by.lse - by.log_p;
  if (by.entropy != 0) c.one -= by.entropy * entropy;
  c.one *= upstream;
  c.log = -by.entropy * upstream;
  c.label = by.log_p * upstream;
  return c;
}

template <class R>
struct ExtendedGradient : RowGradient<R> {
  R reverse = 0;  // of e^w (w - x)
  R uniform = 0;  // of c_j
};

// share, possible: see ExtendedState.
template <class R>
CUDFAST_HD inline ExtendedGradient<R> coefficients(const ExtendedSlopes<R>& by, const ExtendedDistilled<R>& target,
                                                   R entropy, R tau, R upstream, R share, R possible) {
  ExtendedGradient<R> c;
  static_cast<RowGradient<R>&>(c) =
      coefficients(static_cast<const Slopes<R>&>(by), static_cast<const Distilled<R>&>(target), entropy, tau, upstream);
  if (by.reverse_kl != 0) {
    c.reverse = by.reverse_kl * upstream * tau / target.s_tau;
    c.student_tau -= c.reverse * target.mean;
  }
  if (by.uniform != 0) {
    c.uniform = by.uniform * upstream / possible;
    c.one -= c.uniform * share;
  }
  return c;
}

// The end of a row; ExtendedEnd for a row with the sums of extended.h.
template <class R, class Values = RowValues<R>, class Target = Distilled<R>, class S = Slopes<R>,
          class Gradient = RowGradient<R>>
struct RowEnd {
  bool counts = false;  // whether the gradient is anything but 0
  R value = 0;
  R log_z = 0;  // log s_one; 0 if no term needs it
  Values at;
  Target target;
  S slopes;                            // of the total
  Gradient gradient;                   // times the upstream gradient
  R student_one = 0, student_log = 0;  // gradient.one and gradient.log over s_one, which a map with a target takes
};
template <class R>
using ExtendedEnd = RowEnd<R, ExtendedValues<R>, ExtendedDistilled<R>, ExtendedSlopes<R>, ExtendedGradient<R>>;

template <class R>
CUDFAST_HD inline void add(Slopes<R>& to, R c, const Slopes<R>& from) {
  to.forward_kl += c * from.forward_kl;
  to.log_p += c * from.log_p;
  to.entropy += c * from.entropy;
  to.lse += c * from.lse;
}
template <class R>
CUDFAST_HD inline void add(ExtendedSlopes<R>& to, R c, const ExtendedSlopes<R>& from) {
  add(static_cast<Slopes<R>&>(to), c, static_cast<const Slopes<R>&>(from));
  to.reverse_kl += c * from.reverse_kl;
  to.uniform += c * from.uniform;
}

// Value and slopes. shares: row weights over the divisors of a mean. A term of weight 0 is not evaluated, so it may be
// infinite or NaN.
template <class R, class V, class T, class S, class G>
CUDFAST_HD_CALLED void add_terms(const Terms& terms, bool labelled, RowWeights<R> shares, Coefficients own,
                                 RowEnd<R, V, T, S, G>& end) {
  R value = 0;
  S slopes;
  for (int t = 0; t < terms.count; ++t) {
    const Term& term = terms.term[t];
    const bool by_label = needs_label(term.kind);
    if (by_label && !labelled) continue;
    const R c = R(own.of(terms, t)) * (by_label ? shares.labelled : shares.rows);
    if (c == 0) continue;
    const Evaluated<R, S> found = evaluate(term, end.at);
    end.counts = true;
    value += c * found.value;
    add(slopes, c, found.slopes);
  }
  end.value = value;
  end.slopes = slopes;
}

// The values and the gradient of rows without the sums of extended.h, and of rows with them.
template <class State, class R>
CUDFAST_HD inline void add_values(const State&, RowEnd<R>&) {}
template <class State, class R>
CUDFAST_HD inline RowGradient<R> gradient_of(const State&, const RowEnd<R>& end, R tau, R upstream) {
  return coefficients(end.slopes, end.target, end.at.entropy, tau, upstream);
}
template <class State, class R>
CUDFAST_HD inline void add_values(const State& state, ExtendedEnd<R>& end) {
  end.at.reverse_kl = end.target.reverse_kl;
  if (state.possible > 0) end.at.uniform = (state.uniform - state.share * end.log_z) / state.possible;
}
template <class State, class R>
CUDFAST_HD inline ExtendedGradient<R> gradient_of(const State& state, const ExtendedEnd<R>& end, R tau, R upstream) {
  return coefficients(end.slopes, end.target, end.at.entropy, tau, upstream, state.share, state.possible);
}

// State: StudentState for a row with a target, TeacherState for one without, or the extended ones. end: a new one.
template <template <class> class State, class R, class V, class T, class S, class G>
CUDFAST_HD inline void finish(const State<R>& state, bool labelled, R tau, const Terms& terms, RowWeights<R> shares,
                              const Coefficients& own, R upstream, RowEnd<R, V, T, S, G>& end) {
  distil(state, labelled, tau, terms, end.target);
  end.at.forward_kl = end.target.forward_kl;
  if (terms.partition || (terms.labelled && labelled)) {
    end.log_z = log(state.s_one);
    end.at.lse = state.m_s + end.log_z;
    end.at.log_p = (state.s_y - state.m_s) - end.log_z;
    if (terms.entropy) end.at.entropy = end.log_z - state.e_s / state.s_one;
  }
  add_values(state, end);
  add_terms(terms, labelled, shares, own, end);
  end.counts &= upstream != 0;
  if (!end.counts) return;
  end.gradient = gradient_of(state, end, tau, upstream);
  if (end.gradient.one != 0) end.student_one = end.gradient.one / state.s_one;
  if (end.gradient.log != 0) end.student_log = end.gradient.log / state.s_one;
}

}  // namespace
}  // namespace cudfast
