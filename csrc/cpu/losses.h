// Rows with and without a target for the driver in launch.cpp: fold a block of a row, merge, finish the row, map a
// block.
#pragma once

#include <algorithm>
#include <vector>

#include "../finish.h"
#include "simd.h"
#include "sweeps.h"

namespace cudfast {
namespace {

// Single elements of one row; the row's address needs a division, so it is computed once.
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

inline void put_fixes(const Fixes& f, const Matrix& g, int64_t row) {
  for (int i = 0; i < 2; ++i) {
    if (f.column[i] >= 0) store(g, row, f.column[i], f.value[i]);
  }
}

// Temperatures whose exponentials at temperature 1 are powers of those at tau.
inline bool is_power(double tau) { return tau == 1 || tau == 2 || tau == 4; }

constexpr int64_t kFetchColumns = 1 << 16;  // f32: 1.25 MiB in all
constexpr int64_t kFetchAhead = 256;

// Results of again() after all blocks of a row are folded: the index of a block that must be folded again, or these.
constexpr int64_t kNone = -1, kEvery = -2;

template <class State>
RowEnd<double> finished(const Rows& rows, int64_t row, const State& state, const Terms& terms, Divisors divisors,
                        double upstream) {
  const bool labelled = rows.labelled(row);
  const RowWeights<double> weights = row_weights(rows.ignored(row), labelled, rows.weight_at(row));
  RowEnd<double> end;
  finish_row(state, labelled, rows.temperature_at(row), weights, terms, divisors, rows.coefficients_at(row), upstream,
             end);
  return end;
}

inline int64_t label_of(const Rows& rows, int64_t row) { return rows.labelled(row) ? rows.labels[row] : -1; }

struct StudentLossOfRows {
  using State = StudentState<double>;
  using Row = RowEnd<double>;

  const Rows& rows;
  const Terms& terms;
  Divisors divisors;
  bool wide;
  int needs;        // a mask of Needs
  Matrix gradient;  // data null if the first sweep is not followed by the second

  StudentBlock block(int64_t row, int64_t column, int n, Kept kept) const {
    const double tau = rows.temperature_at(row);
    const int power = is_power(tau) ? static_cast<int>(tau) : 0;
    return {rows.logits.at(row, column),
            rows.target.at(row, column),
            rows.logits.dtype,
            rows.target.dtype,
            wide,
            n,
            power,
            needs,
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
    state.e_s = part.e_s;
    state.k = column;  // the block of the maximum; complete() finds the column
    return state;
  }

  State merged(int64_t row, const State& left, const State& right) const {
    return merge(left, right, 1 / rows.temperature_at(row));
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

  void pack(const State& s, int64_t row, const Outputs& out) const { cudfast::pack(s, out, wide, row, terms.entropy); }
  State unpack(int64_t row, const Outputs& from) const { return unpack_student(from, wide, row, terms.entropy); }

  Row finish(int64_t row, const State& state, double upstream) const {
    return finished(rows, row, state, terms, divisors, upstream);
  }

  // Whether the gradient's own memory can store the student's exponentials until the second sweep overwrites them.
  bool keeps_in_gradient() const {
    return !gradient.stream && gradient.dtype == (wide ? DType::f64 : DType::f32) && gradient.data != rows.logits.data;
  }

  // Address to prefetch for writing with a column of the first sweep: that of its exponential, which is written next,
  // or that of its gradient, if a row, its exponentials and its gradient stay in a second-level cache until then.
  const char* soon(int64_t row, int64_t column) const {
    if (gradient.stream) return nullptr;
    if (keeps_in_gradient()) return gradient.at(row, column + kFetchAhead);
    return rows.classes * (wide ? 2 : 1) <= kFetchColumns ? gradient.at(row, column) : nullptr;
  }

  // The second sweep can reuse exponentials if the temperature is a power.
  bool keeps(int64_t row) const { return is_power(rows.temperature_at(row)); }

  static StudentBlockMap map_of(const State& state, const Row& r, char* g, DType dtype, bool stream = false) {
    return {state.m_t,
            state.m_s,
            r.gradient.student_tau,
            r.gradient.teacher_tau,
            r.student_one,
            r.student_log,
            r.log_z,
            r.target.impossible,
            g,
            dtype,
            stream};
  }

  // part: the block's own state if its exponentials were kept, else null.
  void map(int64_t row, int64_t column, int n, const State& state, const State* part, const Row& r, const Matrix& g,
           Kept kept) const {
    map(block(row, column, n, kept), row, column, state, part, r, g);
  }
  void map(StudentBlock b, int64_t row, int64_t column, const State& state, const State* part, const Row& r,
           const Matrix& g) const {
    StudentBlockMap m = map_of(state, r, g.at(row, column), g.dtype, g.stream);
    if (!part || m.holes) {
      b.kept = {};
    } else {
      const double inv_tau = 1 / rows.temperature_at(row);
      m.teacher_tau *= rescale(below(part->m_t, state.m_t) * inv_tau);
      m.student_tau *= rescale(below(part->m_s, state.m_s) * inv_tau);
      const double down = rescale(below(part->m_s, state.m_s));
      m.student_one *= down;
      m.student_log *= down;
    }
    if (r.gradient.teacher_tau == 0) {  // logits that are read for statistics only must not turn 0 into NaN
      b.t = b.s;
      b.t_dtype = b.s_dtype;
      b.kept.teacher = b.kept.student;
      b.view = {};
      m.m_t = m.m_s;
      m.teacher_tau = 0;
    }
    sweeps().student_gradient(b, m);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    put_fixes(fixes(state, r, label_of(rows, row), rows.temperature_at(row)), g, row);
  }
};

struct TeacherLossOfRows {
  using State = TeacherState<double>;
  using Row = RowEnd<double>;

  const Rows& rows;
  const Terms& terms;
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
    state.m_s = part.m_s;
    state.s_one = part.s_one;
    state.e_s = part.e_s;
    return state;
  }

  State merged(int64_t, const State& left, const State& right) const { return merge(left, right); }

  void complete(int64_t row, State& state) const {
    if (rows.labelled(row)) state.s_y = load(rows.logits, row, rows.labels[row]);
  }

  void pack(const State& s, int64_t row, const Outputs& out) const { cudfast::pack(s, out, wide, row, terms.entropy); }
  State unpack(int64_t row, const Outputs& from) const { return unpack_teacher(from, wide, row); }

  Row finish(int64_t row, const State& state, double upstream) const {
    return finished(rows, row, state, terms, divisors, upstream);
  }

  bool keeps(int64_t) const { return false; }
  bool keeps_in_gradient() const { return false; }

  void map(int64_t row, int64_t column, int n, const State& state, const State*, const Row& r, const Matrix& g,
           Kept) const {
    const TeacherBlockMap m{state.m_s,      1 / state.s_one,   r.log_z, r.gradient.one,
                            r.gradient.log, g.at(row, column), g.dtype, g.stream};
    sweeps().teacher_gradient(block(row, column, n), m);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    put_fixes(fixes(state, r, label_of(rows, row), 1), g, row);
  }
};

}  // namespace
}  // namespace cudfast
