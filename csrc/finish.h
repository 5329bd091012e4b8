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

// ---- Student loss; `stride` is the number of columns of a packed row ----

CUDFAST_HD inline void pack(const StudentState<double>& s, const Outputs& out, bool wide, int64_t row,
                            int stride = kStudentColumns) {
  if (!out.state) return;
  const double values[kStudentColumns] = {s.m_t,   s.s_k,   s.m_s, s.z_tau, s.s_tau,     s.a,
                                          s.s_one, s.z_one, s.t_y, s.s_y,   s.impossible};
  for (int i = 0; i < kStudentColumns; ++i) put(out.state, wide, row * stride + i, values[i]);
  if (out.top1) out.top1[row] = s.k;
}

CUDFAST_HD inline StudentState<double> unpack_student(const Outputs& from, bool wide, int64_t row,
                                                      int stride = kStudentColumns) {
  double v[kStudentColumns];
  for (int i = 0; i < kStudentColumns; ++i) v[i] = get(from.state, wide, row * stride + i);
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], from.top1[row]};
}

struct StudentRow {
  bool counts = false;  // whether the gradient is anything but 0
  double value = 0;
  StudentLoss<double> loss;
  StudentGradient<double> gradient;
};

CUDFAST_HD inline StudentRow finish_row(const StudentState<double>& state, bool labelled, double tau,
                                        RowWeights<double> weights, const StudentOptions& options, Divisors divisors,
                                        double upstream) {
  const double kd = options.kd_weight * share(weights.kd, divisors.kd);
  const double ce = options.ce_weight * share(weights.ce, divisors.ce);
  StudentRow out;
  out.counts = kd * upstream != 0 || ce * upstream != 0;
  out.loss = finish(state, labelled, tau, options);
  out.value = (kd != 0 ? kd * out.loss.kd : 0.0) + (ce != 0 ? ce * out.loss.ce : 0.0);
  out.gradient = coefficients(state, out.loss, tau, kd * upstream, ce * upstream);
  return out;
}

// The label's column, and the two that the clip changed. The student's logits are those of the state: an in-place
// gradient has already overwritten the logits.
CUDFAST_HD inline Fixes fixes(const StudentState<double>& state, const StudentRow& r, int64_t label, double tau) {
  Fixes f;
  if (label < 0) return f;
  const double inv_tau = 1 / tau;
  const bool clipped = r.loss.clip.r > 0;
  const double dt_y = r.gradient.teacher_tau == 0 ? 0 : clipped ? r.loss.clip.t_y : state.t_y - state.m_t;
  const double g_y = element<0, 1, true>(r.gradient, dt_y, state.s_y - state.m_s, inv_tau);
  f.column[0] = label;
  f.value[0] = state.s_y == kNothing<double> ? g_y : g_y - r.gradient.label;
  if (clipped) {
    f.column[1] = state.k;
    f.value[1] = element<0, 1, true>(r.gradient, r.loss.clip.t_k, state.s_k - state.m_s, inv_tau);
  }
  return f;
}

// ---- Teacher loss ----

CUDFAST_HD inline void pack(const TeacherState<double>& s, const Outputs& out, bool wide, int64_t row) {
  if (!out.state) return;
  const double values[kTeacherColumns] = {s.m, s.z, s.e, s.z_y};
  for (int i = 0; i < kTeacherColumns; ++i) put(out.state, wide, row * kTeacherColumns + i, values[i]);
}

CUDFAST_HD inline TeacherState<double> unpack_teacher(const Outputs& from, bool wide, int64_t row) {
  double v[kTeacherColumns];
  for (int i = 0; i < kTeacherColumns; ++i) v[i] = get(from.state, wide, row * kTeacherColumns + i);
  return {v[0], v[1], v[2], v[3]};
}

struct TeacherRow {
  bool counts = false;  // whether the gradient is anything but 0
  double value = 0;
  TeacherLoss<double> loss;
  TeacherGradient<double> gradient;
};

CUDFAST_HD inline TeacherRow finish_row(const TeacherState<double>& state, double alpha, RowWeights<double> weights,
                                        const TeacherOptions& options, Divisors divisors, double upstream) {
  const double scale = share(weights.ce, divisors.ce);
  TeacherRow out;
  if (scale == 0) return out;
  out.counts = scale * upstream != 0;
  out.loss = finish(state, alpha, options);
  out.value = scale * out.loss.value;
  out.gradient = coefficients(out.loss, scale * upstream);
  return out;
}

CUDFAST_HD inline Fixes fixes(const TeacherState<double>& state, const TeacherRow& r, int64_t label) {
  Fixes f;
  if (label < 0 || r.gradient.label == 0) return f;
  const double p = element(r.gradient, state.z_y - state.m, 1 / state.z, r.loss.log_z);
  f.column[0] = label;
  f.value[0] = state.z_y == kNothing<double> ? p : p + r.gradient.label;
  return f;
}

}  // namespace
}  // namespace cudfast
