// The two losses as the driver in launch.cpp sees them: fold a block of a row, merge, finish the row, map a block.
#pragma once

#include <algorithm>
#include <vector>

#include "../row/element.h"
#include "simd.h"
#include "sweeps.h"

namespace cudfast {
namespace {

// Single elements of one row; finding the row divides, so it is done once.
struct Element {
  char* row;
  DType dtype;

  Element(const Matrix& m, int64_t index) : row(m.at(index, 0)), dtype(m.dtype) {}
  double load(int64_t column) const {
    double value;
    widen(row + column * size_of(dtype), dtype, 1, &value);
    return value;
  }
  void store(int64_t column, double value) const { narrow(&value, 1, dtype, row + column * size_of(dtype)); }
};

inline double load(const Matrix& m, int64_t row, int64_t column) { return Element(m, row).load(column); }
inline void store(const Matrix& m, int64_t row, int64_t column, double value) { Element(m, row).store(column, value); }

// Packed vectors are f32 or f64.
inline double get(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
}

inline void put(void* data, bool wide, int64_t i, double value) {
  if (!data) return;
  if (wide) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// Temperatures whose exponentials at temperature 1 are powers of those at tau.
inline bool is_power(double tau) { return tau == 1 || tau == 2 || tau == 4; }

inline double share(double weight, double divisor) { return divisor > 0 ? weight / divisor : 0.0; }

constexpr int64_t kFetchColumns = 1 << 16;  // f32: 1.25 MiB in all
constexpr int64_t kFetchAhead = 256;

// What again() says of the blocks of a row once all are folded: one that has to be folded again, or these.
constexpr int64_t kNone = -1, kEvery = -2;

struct StudentLossOfRows {
  using State = StudentState<double>;
  static constexpr int columns = kStudentColumns;

  const Rows& rows;
  const StudentOptions& options;
  Divisors divisors;
  bool wide;
  bool statistics;
  Matrix gradient;  // data null when the first sweep is not followed by the second

  StudentBlock block(int64_t row, int64_t column, int n, Kept kept) const {
    const double tau = rows.value_at(row);
    const int power = is_power(tau) ? static_cast<int>(tau) : 0;
    const int ones = statistics ? 2 : options.ce_weight > 0 ? 1 : 0;
    return {rows.logits.at(row, column),
            rows.target.at(row, column),
            rows.logits.dtype,
            rows.target.dtype,
            wide,
            n,
            power,
            ones,
            1 / tau,
            kept,
            kept.teacher ? soon(row, column) : nullptr,
            gradient.dtype};
  }

  const StudentLossOfRows& prepared(int64_t, const State*) const { return *this; }
  int64_t again(int64_t, int, const std::vector<State>&) const { return kNone; }

  State fold(int64_t row, int64_t column, int n, Kept kept) const { return fold(block(row, column, n, kept), column); }
  State fold(const StudentBlock& b, int64_t column) const {
    StudentBlockState part;
    sweeps().student_state(b, part);
    return state_of(part, column);
  }
  static State state_of(const StudentBlockState& part, int64_t column) {
    State state;
    state.m_t = part.m_t;
    state.m_s = part.m_s;
    state.z_tau = part.z_tau;
    state.s_tau = part.s_tau;
    state.a = part.a;
    state.s_one = part.s_one;
    state.z_one = part.z_one;
    state.impossible = part.impossible;
    state.k = column;  // the block of the maximum; complete() finds the column
    return state;
  }

  State merged(int64_t row, const State& left, const State& right) const {
    return merge(left, right, 1 / rows.value_at(row));
  }

  void complete(int64_t row, State& state) const {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, rows.classes - state.k));
    state.k += sweeps().find(rows.target.at(row, state.k), rows.target.dtype, wide, n, state.m_t);
    state.s_k = load(rows.logits, row, state.k);
    if (rows.labelled(row)) {
      state.t_y = load(rows.target, row, rows.labels[row]);
      state.s_y = load(rows.logits, row, rows.labels[row]);
    }
  }

  // `stride`: columns from row to row.
  void pack(const State& s, int64_t row, const Outputs& out, int stride = columns) const {
    if (!out.state) return;
    const double values[columns] = {s.m_t,   s.s_k,   s.m_s, s.z_tau, s.s_tau,     s.a,
                                    s.s_one, s.z_one, s.t_y, s.s_y,   s.impossible};
    for (int i = 0; i < columns; ++i) put(out.state, wide, row * stride + i, values[i]);
    if (out.top1) out.top1[row] = s.k;
  }

  State unpack(int64_t row, const Outputs& from, int stride = columns) const {
    double v[columns];
    for (int i = 0; i < columns; ++i) v[i] = get(from.state, wide, row * stride + i);
    return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], from.top1[row]};
  }

  // The row's own loss and gradient map, from its state.
  struct Row {
    bool counts = false;  // whether the gradient is anything but 0
    double value = 0;
    StudentLoss<double> loss;
    StudentGradient<double> gradient;
  };

  Row finish_row(int64_t row, const State& state, double upstream) const {
    const bool labelled = rows.labelled(row);
    const double tau = rows.value_at(row);
    const RowWeights<double> weights = row_weights(rows.ignored(row), labelled, rows.weight_at(row));
    const double kd = options.kd_weight * share(weights.kd, divisors.kd);
    const double ce = options.ce_weight * share(weights.ce, divisors.ce);
    Row out;
    out.counts = kd * upstream != 0 || ce * upstream != 0;
    out.loss = finish(state, labelled, tau, options);
    out.value = (kd != 0 ? kd * out.loss.kd : 0.0) + (ce != 0 ? ce * out.loss.ce : 0.0);
    out.gradient = coefficients(state, out.loss, tau, kd * upstream, ce * upstream);
    return out;
  }

  // Whether the gradient's own memory can hold the student's exponentials until they become the gradient.
  bool keeps_in_gradient() const {
    return gradient.dtype == (wide ? DType::f64 : DType::f32) && gradient.data != rows.logits.data;
  }

  // What to fetch for writing beside a column of the first sweep: where its exponential will be written in a moment, or
  // where its gradient will, if a row, its exponentials and its gradient stay in a second-level cache until then.
  const char* soon(int64_t row, int64_t column) const {
    if (keeps_in_gradient()) return gradient.at(row, column + kFetchAhead);
    return rows.classes * (wide ? 2 : 1) <= kFetchColumns ? gradient.at(row, column) : nullptr;
  }

  // Exponentials can serve the second sweep when the temperature is a power.
  bool keeps(int64_t row) const { return is_power(rows.value_at(row)); }

  // part: the block's own state when its exponentials were kept, else null.
  void map(int64_t row, int64_t column, int n, const State& state, const State* part, const Row& r, const Matrix& g,
           Kept kept) const {
    map(block(row, column, n, kept), row, column, state, part, r, g);
  }
  void map(StudentBlock b, int64_t row, int64_t column, const State& state, const State* part, const Row& r,
           const Matrix& g) const {
    StudentBlockMap m{state.m_t,
                      state.m_s,
                      r.gradient.student_tau,
                      r.gradient.teacher_tau,
                      r.gradient.student_one,
                      r.loss.impossible,
                      g.at(row, column),
                      g.dtype};
    if (!part || r.loss.impossible) {
      b.kept = {};
    } else {
      const double inv_tau = 1 / rows.value_at(row);
      m.teacher_tau *= rescale(below(part->m_t, state.m_t) * inv_tau);
      m.student_tau *= rescale(below(part->m_s, state.m_s) * inv_tau);
      m.student_one *= rescale(below(part->m_s, state.m_s));
    }
    if (r.gradient.teacher_tau == 0) {  // what is read for statistics only must not turn 0 into NaN
      b.t = b.s;
      b.t_dtype = b.s_dtype;
      b.kept.teacher = b.kept.student;
      b.view = {};
      m.m_t = m.m_s;
      m.teacher_tau = 0;
    }
    sweeps().student_gradient(b, m);
  }

  // Coordinates that the sweep cannot know: the label, and the two that the clip changed. With g == logits the
  // student's values are gone by now, so they come from the state.
  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    if (!rows.labelled(row)) return;
    const double inv_tau = 1 / rows.value_at(row);
    const bool clipped = r.loss.clip.r > 0;
    const auto at = [&](double s, double dt) { return element<0, 1, true>(r.gradient, dt, s - state.m_s, inv_tau); };
    const double dt_y = r.gradient.teacher_tau == 0 ? 0 : clipped ? r.loss.clip.t_y : state.t_y - state.m_t;
    const double g_y = at(state.s_y, dt_y);
    store(g, row, rows.labels[row], state.s_y == kNothing<double> ? g_y : g_y - r.gradient.label);
    if (clipped) store(g, row, state.k, at(state.s_k, r.loss.clip.t_k));
  }
};

struct TeacherLossOfRows {
  using State = TeacherState<double>;
  static constexpr int columns = kTeacherColumns;

  const Rows& rows;
  const TeacherOptions& options;
  Divisors divisors;
  bool wide;

  TeacherBlock block(int64_t row, int64_t column, int n) const {
    return {rows.logits.at(row, column), rows.logits.dtype, wide, n};
  }

  const TeacherLossOfRows& prepared(int64_t, const State*) const { return *this; }
  int64_t again(int64_t, int, const std::vector<State>&) const { return kNone; }

  State fold(int64_t row, int64_t column, int n, Kept) const {
    TeacherBlockState part;
    sweeps().teacher_state(block(row, column, n), part);
    State state;
    state.m = part.m;
    state.z = part.z;
    state.e = part.e;
    return state;
  }

  State merged(int64_t, const State& left, const State& right) const { return merge(left, right); }

  void complete(int64_t row, State& state) const {
    if (rows.labelled(row)) state.z_y = load(rows.logits, row, rows.labels[row]);
  }

  void pack(const State& s, int64_t row, const Outputs& out) const {
    if (!out.state) return;
    const double values[columns] = {s.m, s.z, s.e, s.z_y};
    for (int i = 0; i < columns; ++i) put(out.state, wide, row * columns + i, values[i]);
  }

  State unpack(int64_t row, const Outputs& from) const {
    double v[columns];
    for (int i = 0; i < columns; ++i) v[i] = get(from.state, wide, row * columns + i);
    return {v[0], v[1], v[2], v[3]};
  }

  struct Row {
    bool counts = false;  // whether the gradient is anything but 0
    double value = 0;
    TeacherLoss<double> loss;
    TeacherGradient<double> gradient;
  };

  Row finish_row(int64_t row, const State& state, double upstream) const {
    const RowWeights<double> weights = row_weights(rows.ignored(row), rows.labelled(row), rows.weight_at(row));
    const double scale = share(weights.ce, divisors.ce);
    Row out;
    if (scale == 0) return out;
    out.counts = scale * upstream != 0;
    out.loss = finish(state, rows.value_at(row), options);
    out.value = scale * out.loss.value;
    out.gradient = coefficients(out.loss, scale * upstream);
    return out;
  }

  bool keeps(int64_t) const { return false; }
  bool keeps_in_gradient() const { return false; }

  void map(int64_t row, int64_t column, int n, const State& state, const State*, const Row& r, const Matrix& g,
           Kept) const {
    const TeacherBlockMap m{state.m,        1 / state.z,       r.loss.log_z, r.gradient.one,
                            r.gradient.log, g.at(row, column), g.dtype};
    sweeps().teacher_gradient(block(row, column, n), m);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    if (!rows.labelled(row) || r.gradient.label == 0) return;
    const double p = element(r.gradient, state.z_y - state.m, 1 / state.z, r.loss.log_z);
    store(g, row, rows.labels[row], state.z_y == kNothing<double> ? p : p + r.gradient.label);
  }
};

}  // namespace
}  // namespace cudfast
