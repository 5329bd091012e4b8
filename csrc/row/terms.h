// Each loss term: its value and the coefficients of its gradient, side by side.                            Eq. 3, 9
//
// Scalars only, once per row. A term's gradient is a combination of the columns {p, p^(tau), q^(tau), p log p, 1[j=y]};
// the coefficients are in StudentGradient or TeacherGradient, and element.h applies them to the row.
#pragma once

#include "target.h"

namespace cudfast {

// Plain data without functions, so that files for different instruction sets can share it.
struct StudentOptions {
  double kd_weight;
  double ce_weight;
  bool clip;  // whether labelled rows are calibrated at all
  double budget;
  double margin;
};

struct TeacherOptions {
  double ce_weight;
  double focal_weight;
  double entropy_weight;
  double gamma;
  double gate_threshold;
  double gate_scale;
  double gate_power;
  bool differentiate_gate;
};

namespace {

// ---- Reduction: the weight of a row in each term ----                                              [row-weights]

template <class R>
struct RowWeights {
  R kd = 0;  // 0 if the row is excluded
  R ce = 0;  // 0 if the row has no label
};

template <class R>
CUDFAST_HD inline RowWeights<R> row_weights(bool ignored, bool labelled, R weight) {
  if (ignored) return {R(0), R(0)};
  return {weight, labelled ? weight : R(0)};
}

// ---- Student loss ----

template <class R>
struct StudentLoss {
  R kd = 0;  // tau^2 KL, without its weight
  R ce = 0;  // -log p_y of the student at temperature 1, without its weight
  R z_tau = 0;
  Clip<R> clip;
  bool impossible = false;
};

// tau^2 KL(q || p) = tau^2 (a / z + log(s / z)); rounding below 0 is 0.                                          [kd]
template <class R>
CUDFAST_HD inline R kd_value(const StudentState<R>& state, const TargetSums<R>& target, R tau) {
  if (state.m_t == kNothing<R> || state.m_s == kNothing<R>) return std::numeric_limits<R>::quiet_NaN();
  if (target.impossible > 0) return std::numeric_limits<R>::infinity() + 0 * (target.z_tau * state.s_tau);
  const R kl = target.a / target.z_tau + log(state.s_tau / target.z_tau);
  return kl < 0 ? R(0) : tau * tau * kl;
}

// -log p_y = log S1 - (s_y - m_s)                                                                               [ce]
template <class R>
CUDFAST_HD inline R ce_value(R s_one, R s_y, R m_s) {
  return log(s_one) - (s_y - m_s);
}

// Coefficients of dL/ds_j, the input of element.h for a row.                                      [student-gradient]
template <class R>
struct StudentGradient {
  R student_tau = 0;  // of exp((s_j - m_s) / tau):   kd tau / S_tau
  R teacher_tau = 0;  // of -exp((t_j - m_t) / tau):  kd tau / Z_tau
  R student_one = 0;  // of exp(s_j - m_s):           ce / S1
  R label = 0;        // of -1[j = y]:                ce
};

// The calibrated target and every term of a row. labelled: the row has a label, for the clip and for cross-entropy.
template <class R>
CUDFAST_HD inline StudentLoss<R> finish(const StudentState<R>& state, bool labelled, R tau,
                                        const StudentOptions& options) {
  StudentLoss<R> loss;
  if (labelled && options.ce_weight > 0) loss.ce = ce_value(state.s_one, state.s_y, state.m_s);
  if (!(options.kd_weight > 0)) return loss;
  const bool wrong = labelled && options.clip && state.t_y < state.m_t;  // equal logits: no mass would move
  if (wrong) loss.clip = wclip(state.t_y - state.m_t, R(options.budget), R(options.margin));
  const TargetSums<R> target = replace(state, loss.clip, 1 / tau);
  loss.kd = kd_value(state, target, tau);
  loss.z_tau = target.z_tau;
  loss.impossible = target.impossible > 0;
  return loss;
}

// kd and ce are the row's weights in each term, upstream gradient and divisors included.
template <class R>
CUDFAST_HD inline StudentGradient<R> coefficients(const StudentState<R>& state, const StudentLoss<R>& loss, R tau, R kd,
                                                  R ce) {
  StudentGradient<R> c;
  if (kd != 0) {
    c.student_tau = kd * tau / state.s_tau;
    c.teacher_tau = kd * tau / loss.z_tau;
  }
  if (ce != 0) {
    c.student_one = ce / state.s_one;
    c.label = ce;
  }
  return c;
}

// ---- Teacher loss (difficulty-aware uncertainty shaping) ----                                                Eq. 3

// Value of a term and its derivative with respect to log p_y.
template <class R>
struct Term {
  R value = 0;
  R slope = 0;
};

// alpha (1 - p)^gamma (-log p). The slope is alpha (gamma p a^(gamma-1) log p - a^gamma), a = 1 - p; log p / a tends to
// -1 as p approaches 1, so no negative power is needed.                                                      [focal]
template <class R>
CUDFAST_HD inline Term<R> focal(R log_p, R gamma, R alpha) {
  const R a = -std::expm1(log_p);
  const R a_gamma = std::pow(a, gamma);
  const R ratio = a > 0 ? log_p / a : R(-1);
  if (log_p == kNothing<R>) return {std::numeric_limits<R>::infinity(), -alpha};  // p log p is 0 there
  return {-alpha * a_gamma * log_p, alpha * a_gamma * (gamma * (1 - a) * ratio - 1)};
}

// w = 1{p < threshold} + scale (1 - p)^power; the step has no slope. At p = 1 the slope is multiplied by an entropy
// that vanishes faster, so its limit there is 0.                                                              [gate]
template <class R>
CUDFAST_HD inline Term<R> gate(R log_p, const TeacherOptions& o) {
  const R a = -std::expm1(log_p);
  Term<R> w;
  w.value = (1 - a < R(o.gate_threshold) ? R(1) : R(0)) + R(o.gate_scale) * std::pow(a, R(o.gate_power));
  if (o.gate_power > 0 && a > 0) w.slope = -R(o.gate_scale * o.gate_power) * std::pow(a, R(o.gate_power) - 1) * (1 - a);
  return w;
}

template <class R>
struct TeacherLoss {
  R value = 0;
  R entropy = 0;  // nats
  R slope = 0;    // of the whole loss with respect to log p_y, with the entropy held fixed
  R weight = 0;   // of -H: entropy_weight * w
  R log_z = 0;
};

template <class R>
CUDFAST_HD inline TeacherLoss<R> finish(const TeacherState<R>& state, R alpha, const TeacherOptions& o) {
  TeacherLoss<R> loss;
  loss.log_z = log(state.z);
  loss.entropy = loss.log_z - state.e / state.z;
  const R log_p = (state.z_y - state.m) - loss.log_z;
  if (o.ce_weight > 0) {
    loss.value -= R(o.ce_weight) * log_p;
    loss.slope -= R(o.ce_weight);
  }
  if (o.focal_weight > 0) {
    const Term<R> f = focal(log_p, R(o.gamma), alpha);
    loss.value += R(o.focal_weight) * f.value;
    loss.slope += R(o.focal_weight) * f.slope;
  }
  if (o.entropy_weight > 0) {
    const Term<R> w = gate(log_p, o);
    loss.weight = R(o.entropy_weight) * w.value;
    loss.value -= loss.weight * loss.entropy;
    if (o.differentiate_gate) loss.slope -= R(o.entropy_weight) * w.slope * loss.entropy;
  }
  return loss;
}

// dL/dz_j = p_j (one + log * log p_j) + label 1[j = y], and d log p_y / dz_j = 1[j = y] - p_j     [teacher-gradient]
template <class R>
struct TeacherGradient {
  R one = 0;
  R log = 0;
  R label = 0;
};

template <class R>
CUDFAST_HD inline TeacherGradient<R> coefficients(const TeacherLoss<R>& loss, R scale) {
  return {scale * (loss.weight * loss.entropy - loss.slope), scale * loss.weight, scale * loss.slope};
}

}  // namespace
}  // namespace cudfast
