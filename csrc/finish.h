// The end of a row, for CPU and GPU: its packed state, its loss and coefficients, and the columns with other gradients.
#pragma once

#include "launch.h"
#include "row/element.h"

namespace cudfast {
namespace {

// Packed vectors are f32 or f64.
CUDFAST_HD inline double get(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
}

CUDFAST_HD inline void put(void* data, bool wide, int64_t i, double value) {
  if (!data) return;
  if (wide) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// 0 if all rows are excluded; NaN for a weight of NaN.
CUDFAST_HD inline double share(double weight, double divisor) { return divisor > 0 ? weight / divisor : 0 * weight; }

// Columns whose gradient differs from that of the map: -1 is none.
struct Fixes {
  int64_t column[2] = {-1, -1};
  double value[2] = {0, 0};
};

// ---- Packed states; `more`: columns of a packed row after the state's, `entropy`: whether it has e_s ----

CUDFAST_HD inline void pack(const StudentState<double>& s, const Outputs& out, bool wide, int64_t row, bool entropy,
                            int more = 0) {
  if (!out.state) return;
  const int64_t first = row * (student_columns(entropy) + more);
  const double values[kStudentColumns] = {s.m_t,   s.s_k,   s.m_s, s.z_tau, s.s_tau,     s.a,
                                          s.s_one, s.z_one, s.t_y, s.s_y,   s.impossible};
  for (int i = 0; i < kStudentColumns; ++i) put(out.state, wide, first + i, values[i]);
  if (entropy) put(out.state, wide, first + kStudentColumns, s.e_s);
  if (out.top1) out.top1[row] = s.k;
}

CUDFAST_HD inline StudentState<double> unpack_student(const Outputs& from, bool wide, int64_t row, bool entropy,
                                                      int more = 0) {
  const int64_t first = row * (student_columns(entropy) + more);
  double v[kStudentColumns];
  for (int i = 0; i < kStudentColumns; ++i) v[i] = get(from.state, wide, first + i);
  const double e_s = entropy ? get(from.state, wide, first + kStudentColumns) : 0;
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], e_s, from.top1[row]};
}

CUDFAST_HD inline void pack(const TeacherState<double>& s, const Outputs& out, bool wide, int64_t row, bool) {
  if (!out.state) return;
  const double values[kTeacherColumns] = {s.m_s, s.s_one, s.e_s, s.s_y};
  for (int i = 0; i < kTeacherColumns; ++i) put(out.state, wide, row * kTeacherColumns + i, values[i]);
}

CUDFAST_HD inline TeacherState<double> unpack_teacher(const Outputs& from, bool wide, int64_t row) {
  double v[kTeacherColumns];
  for (int i = 0; i < kTeacherColumns; ++i) v[i] = get(from.state, wide, row * kTeacherColumns + i);
  return {v[0], v[1], v[2], v[3]};
}

// Calls f for the fields of a packed state, in the order of its columns (cudfast/rows/call.py).
template <class R, class F>
CUDFAST_HD inline void each_column(ExtendedState<R>& s, int sums, bool recalibrates, F f) {
  R* const always[] = {&s.m_t,   &s.s_k,   &s.m_s, &s.z_tau, &s.s_tau,     &s.a,
                       &s.s_one, &s.z_one, &s.t_y, &s.s_y,   &s.impossible};
  for (R* const field : always) f(*field);
  if (sums & kStudentEntropy) f(s.e_s);
  if (sums & kTeacherEntropy) f(s.e_t);
  if (sums & kSquare) f(s.s_two);
  if (sums & kReverse) f(s.b), f(s.missing);
  if (sums & kUniform) f(s.uniform), f(s.share), f(s.possible);
  if (recalibrates) f(s.m_q);
}
template <class R, class F>
CUDFAST_HD inline void each_column(ExtendedTeacherState<R>& s, int sums, bool, F f) {
  f(s.m_s), f(s.s_one), f(s.e_s), f(s.s_y);
  if (sums & kSquare) f(s.s_two);
  if (sums & kUniform) f(s.uniform), f(s.share), f(s.possible);
}
template <class State>
CUDFAST_HD inline int64_t columns_of(const Terms& terms, bool recalibrates) {
  int64_t count = 0;
  State state;
  each_column(state, terms.sums, recalibrates, [&](double&) { ++count; });
  return count;
}

template <class State>
CUDFAST_HD inline void pack(State s, const Terms& terms, bool recalibrates, const Outputs& out, bool wide,
                            int64_t row) {
  if (!out.state) return;
  int64_t at = row * columns_of<State>(terms, recalibrates);
  each_column(s, terms.sums, recalibrates, [&](double& field) { put(out.state, wide, at++, field); });
}
template <class State>
CUDFAST_HD inline State unpack(const Terms& terms, bool recalibrates, const Outputs& from, bool wide, int64_t row) {
  State s;
  int64_t at = row * columns_of<State>(terms, recalibrates);
  each_column(s, terms.sums, recalibrates, [&](double& field) { field = get(from.state, wide, at++); });
  return s;
}

// ---- The end of a row, and the columns that its map does not cover ----

template <template <class> class State, class End>
CUDFAST_HD inline void finish_row(const State<double>& state, bool labelled, double tau, RowWeights<double> weights,
                                  const Terms& terms, Divisors divisors, const Coefficients& own, double upstream,
                                  End& end) {
  const RowWeights<double> shares{share(weights.rows, divisors.rows), share(weights.labelled, divisors.labelled)};
  finish(state, labelled, tau, terms, shares, own, upstream, end);
}

// The gradient of one column without the label's share, in double.
CUDFAST_HD_CALLED double element_at(const RowEnd<double>& end, double dt, double ds, double inv_tau) {
  const StudentGradient<double> c{end.gradient.student_tau, end.gradient.teacher_tau, end.student_one};
  if (end.student_log == 0) return element<0, true, true>(c, dt, ds, inv_tau);
  return element<0, true, true>(StudentLogGradient<double>{c, end.student_log, end.log_z}, dt, ds, inv_tau);
}

// The label's column, and the two that the clip changed. The student's logits are those of the state: an in-place
// gradient has already overwritten the logits.
CUDFAST_HD inline Fixes fixes(const StudentState<double>& state, const RowEnd<double>& end, int64_t label, double tau) {
  Fixes f;
  if (label < 0) return f;
  const double inv_tau = 1 / tau;
  const Clip<double>& clip = end.target.clip;
  const double dt_y = end.gradient.teacher_tau == 0 ? 0 : clip.r > 0 ? clip.t_y : state.t_y - state.m_t;
  const double g_y = element_at(end, dt_y, state.s_y - state.m_s, inv_tau);
  f.column[0] = label;
  f.value[0] = state.s_y == kNothing<double> ? g_y : g_y + end.gradient.label;
  if (clip.r > 0) {
    f.column[1] = state.k;
    f.value[1] = element_at(end, clip.t_k, state.s_k - state.m_s, inv_tau);
  }
  return f;
}

// weights: c, or null.
inline Fixes fixes(const ExtendedState<double>& state, const ExtendedEnd<double>& end, int64_t label,
                   const void* weights, bool wide) {
  Fixes f;
  if (label < 0) return f;
  const double teacher = end.target.inverse.teacher, student = end.target.inverse.student;
  const Clip<double>& clip = end.target.clip;
  const bool moves = clip.r > 0, quiet = end.gradient.teacher_tau == 0 && end.gradient.reverse == 0;
  const auto element_of = [&](double t, double s, int64_t column) {
    const ExtendedStudentGradient<double> c{
        {{end.gradient.student_tau, end.gradient.teacher_tau, end.student_one}, end.student_log, end.log_z},
        end.gradient.reverse,
        end.gradient.uniform};
    const double dt = quiet ? 0 : t, ds = s - state.m_s;
    const Exponentials<double> e{exp(dt * teacher), exp(ds * student)};
    const double weight = weights ? get(weights, wide, column) : 1.0;
    return element<kReverse | kUniform, true, true>(c, e, exp(ds), dt, ds, teacher, student, weight);
  };
  const double shift = state.m_t - end.target.centre;
  const double g_y = element_of((moves ? clip.t_y : state.t_y - state.m_t) + shift, state.s_y, label);
  f.column[0] = label;
  f.value[0] = state.s_y == kNothing<double> ? g_y : g_y + end.gradient.label;
  if (moves) {
    f.column[1] = state.k;
    f.value[1] = element_of(clip.t_k + shift, state.s_k, state.k);
  }
  return f;
}

inline Fixes fixes(const ExtendedTeacherState<double>& state, const ExtendedEnd<double>& end, int64_t label,
                   const void* weights, bool wide) {
  Fixes f;
  if (label < 0 || end.gradient.label == 0) return f;
  const ExtendedTeacherGradient<double> c{{end.gradient.one, end.gradient.log}, end.gradient.uniform};
  const double weight = weights ? get(weights, wide, label) : 1.0;
  const double g_y = element(c, state.s_y - state.m_s, 1 / state.s_one, end.log_z, weight);
  f.column[0] = label;
  f.value[0] = state.s_y == kNothing<double> ? g_y : g_y + end.gradient.label;
  return f;
}

CUDFAST_HD inline Fixes fixes(const TeacherState<double>& state, const RowEnd<double>& end, int64_t label, double) {
  Fixes f;
  if (label < 0 || end.gradient.label == 0) return f;
  const TeacherGradient<double> c{end.gradient.one, end.gradient.log};
  const double g_y = element(c, state.s_y - state.m_s, 1 / state.s_one, end.log_z);
  f.column[0] = label;
  f.value[0] = state.s_y == kNothing<double> ? g_y : g_y + end.gradient.label;
  return f;
}

}  // namespace
}  // namespace cudfast
