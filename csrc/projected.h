// The end of a row whose target meets bounds, for CPU and GPU. The classes of a row are divided into three sets: near,
// wrong and the rest. The sweep over the rest masks the other two out, so that its mass is never a difference; those
// two are short lists, whose logits are gathered. The target is then one factor per set, used with the plain loss.
#pragma once

#include "finish.h"
#include "row/search.h"

namespace cudfast {
namespace {

struct ProjectedState : StudentState<double> {
  double beta = 1, centre = 0;           // the teacher's logits become t' = beta (t - centre); t at beta = 1
  double near = 0, wrong = 0, rest = 0;  // log of the target at each set's maximum, relative to the largest of them
  double confidence = 0, prob = 0;       // the teacher's probability of its top-1 and of the label
  double target = 0, moved = 0;          // the label's after calibration; mass that changed sets
  double relaxed = 0;                    // 1 if a bound was infeasible

  CUDFAST_HD double seen(double t) const { return beta == 1 ? t : beta * (t - centre); }
};

CUDFAST_HD inline void pack(const ProjectedState& s, const Outputs& out, bool wide, int64_t row, bool entropy) {
  if (!out.state) return;
  pack(static_cast<const StudentState<double>&>(s), out, wide, row, entropy, kProjectedColumns);
  const double values[kProjectedColumns] = {s.beta,       s.centre, s.near,   s.wrong, s.rest,
                                            s.confidence, s.prob,   s.target, s.moved, s.relaxed};
  const int64_t first = row * (student_columns(entropy) + kProjectedColumns) + student_columns(entropy);
  for (int i = 0; i < kProjectedColumns; ++i) put(out.state, wide, first + i, values[i]);
}

// The fields of a packed state that a gradient needs.
CUDFAST_HD inline ProjectedState unpack_projected(const Outputs& from, bool wide, int64_t row, bool entropy) {
  const int64_t first = row * (student_columns(entropy) + kProjectedColumns) + student_columns(entropy);
  const auto extra = [&](int i) { return get(from.state, wide, first + i); };
  ProjectedState state;
  static_cast<StudentState<double>&>(state) = unpack_student(from, wide, row, entropy, kProjectedColumns);
  state.beta = extra(0);
  state.centre = extra(1);
  state.near = extra(2);
  state.wrong = extra(3);
  state.rest = extra(4);
  return state;
}

// The near and the wrong classes of a row.
struct Apart {
  StudentState<double> sums[2];  // relative to the row's own student maximum
  double tops[2];                // t' that the sums are relative to; 0 for a set without classes
  bool near;                     // whether near classes, including the label, are summed separately
  double least, most;            // mass of the near, of the wrong classes
};

// The entropy of the target at inverse temperature beta, from the sums of its sets: near, wrong, rest.
CUDFAST_HD inline End<double> end_at(double beta, const TemperedState<double> (&sets)[3], double least, double most) {
  const Masses<double> target =
      masses(log_mass(sets[0], beta), log_mass(sets[1], beta), log_mass(sets[2], beta), least, most);
  return {beta, entropy(sets, target, beta)};
}

// log sum exp(beta t) over all sets.
CUDFAST_HD inline double log_total(const TemperedState<double> (&sets)[3], double beta) {
  return log_add(log_add(log_mass(sets[0], beta), log_mass(sets[1], beta)), log_mass(sets[2], beta));
}

// Turns the rest's state, with t_y, s_y, beta and centre, into that of the target: sums over all three sets, each with
// its factor. Statistics need log_one, log sum exp t, if beta is not 1, and t_k, the teacher's logit at its top-1.
CUDFAST_HD inline void complete(ProjectedState& state, const Apart& apart, double inv_tau, bool out_of_reach,
                                bool statistics, double log_one, double t_k) {
  const StudentState<double>* parts[3] = {apart.sums, apart.sums + 1, &state};
  double at[3], mass[3];  // log of the largest, and of all, relative to t'
  CUDFAST_UNROLL
  for (int i = 0; i < 3; ++i) {
    at[i] = parts[i]->m_t + (i < 2 ? apart.tops[i] : 0);
    mass[i] = parts[i]->z_one == 0 ? kNothing<double> : at[i] + log(parts[i]->z_one);
  }
  const double total = log_add(log_add(mass[0], mass[1]), mass[2]);
  if (!(total < std::numeric_limits<double>::infinity())) {  // NaN or +inf among the logits
    state.z_tau = state.a = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const Masses<double> target = masses(mass[0], mass[1], mass[2], apart.least, apart.most);
  const double log_m[3] = {target.near, target.wrong, target.rest};
  double offset[3], reference = kNothing<double>;
  CUDFAST_UNROLL
  for (int i = 0; i < 3; ++i) {
    offset[i] = mass[i] == kNothing<double> ? kNothing<double> : at[i] + (log_m[i] - (mass[i] - total));
    if (offset[i] > reference) reference = offset[i];
  }
  if (reference == kNothing<double>) return;  // no class is possible: m_t is -inf
  double z_tau = 0, a = 0, impossible = 0;
  CUDFAST_UNROLL
  for (int i = 0; i < 3; ++i) {
    if (offset[i] == kNothing<double>) continue;
    const double down = offset[i] - reference, factor = exp(down * inv_tau);
    z_tau += factor * parts[i]->z_tau;
    a += factor * (parts[i]->a + parts[i]->z_tau * (down * inv_tau));
    impossible = max(impossible, parts[i]->impossible);
  }
  state.z_tau = z_tau;
  state.a = a;
  state.impossible = impossible;
  state.near = offset[0] - reference;
  state.wrong = offset[1] - reference;
  state.rest = offset[2] - reference;
  if (state.m_t == kNothing<double>) state.m_t = 0;  // the rest is empty, but not the row
  state.relaxed = target.no_near || target.all_wrong || out_of_reach;
  if (!statistics) return;
  const double log_all = state.beta == 1 ? total : log_one;
  state.confidence = exp(t_k - log_all);
  state.prob = exp(state.t_y - log_all);
  const double change = apart.near ? log_m[0] - mass[0] : log_m[2] - mass[2];  // of the label's set
  if (state.t_y > kNothing<double>) state.target = exp(state.seen(state.t_y) + change);
  CUDFAST_UNROLL
  for (int i = 0; i < 3; ++i) state.moved += max(0.0, exp(log_m[i]) - exp(mass[i] - total));
}

// The label's gradient in double, since p_y - 1 is small in a confident row. top: see Apart::tops.
CUDFAST_HD inline double label_gradient(const ProjectedState& state, const RowEnd<double>& end, bool near, double top,
                                        double inv_tau) {
  const double reference = near ? top - state.near : state.m_t - state.rest;
  const double dt = state.t_y == kNothing<double> ? state.t_y : state.seen(state.t_y) - reference;
  const double g_y = element_at(end, dt, state.s_y - state.m_s, inv_tau);
  return state.s_y == kNothing<double> ? g_y : g_y + end.gradient.label;
}

}  // namespace
}  // namespace cudfast
