// launch.h for the CPU: rows over threads, columns over threads when rows are few and long. Both ways fold the same
// blocks and merge them in the same order, so the results are the same bits.
#include "../launch.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../row/element.h"
#include "simd.h"
#include "sweeps.h"
#include "threads.h"

namespace cudfast {

namespace {
std::atomic<bool> forked{false};
}

bool can_thread() {
  static const bool watched = [] {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return true;
  }();
  return watched && !forked;
}

namespace {

double load(const Matrix& m, int64_t row, int64_t column) {
  double value;
  widen(m.at(row, column), m.dtype, 1, &value);
  return value;
}

void store(const Matrix& m, int64_t row, int64_t column, double value) {
  narrow(&value, 1, m.dtype, m.at(row, column));
}

// Packed vectors are f32 or f64.
double get(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
}

void put(void* data, bool wide, int64_t i, double value) {
  if (!data) return;
  if (wide) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

double share(double weight, double divisor) { return divisor > 0 ? weight / divisor : 0.0; }

// ---- The two losses, as the driver below sees them: fold a block, merge, finish, map a block ----

struct StudentLossOfRows {
  using State = StudentState<double>;
  static constexpr int columns = kStudentColumns;

  const Rows& rows;
  const StudentOptions& options;
  Divisors divisors;
  bool wide;
  bool statistics;

  StudentBlock block(int64_t row, int64_t column, int n) const {
    const double tau = rows.value_at(row);
    const int power = tau == 1 ? 1 : tau == 2 ? 2 : tau == 4 ? 4 : 0;
    const int ones = statistics ? 2 : options.ce_weight > 0 ? 1 : 0;
    return {rows.logits.at(row, column),
            rows.target.at(row, column),
            rows.logits.dtype,
            rows.target.dtype,
            wide,
            n,
            power,
            ones,
            1 / tau};
  }

  State fold(int64_t row, int64_t column, int n) const {
    StudentBlockState part;
    sweeps().student_state(block(row, column, n), part);
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

  void pack(const State& s, int64_t row, const Outputs& out) const {
    const double values[columns] = {s.m_t,   s.s_k,   s.m_s, s.z_tau, s.s_tau,     s.a,
                                    s.s_one, s.z_one, s.t_y, s.s_y,   s.impossible};
    for (int i = 0; i < columns; ++i) put(out.state, out.wide, row * columns + i, values[i]);
    if (out.top1) out.top1[row] = s.k;
  }

  State unpack(int64_t row, const Outputs& from) const {
    double v[columns];
    for (int i = 0; i < columns; ++i) v[i] = get(from.state, from.wide, row * columns + i);
    return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], from.top1[row]};
  }

  // The row's own loss and gradient map, from its state.
  struct Row {
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
    out.loss = finish(state, labelled, tau, options);
    out.value = (kd != 0 ? kd * out.loss.kd : 0.0) + (ce != 0 ? ce * out.loss.ce : 0.0);
    out.gradient = coefficients(state, out.loss, tau, kd * upstream, ce * upstream);
    return out;
  }

  void map(int64_t row, int64_t column, int n, const State& state, const Row& r, const Matrix& g) const {
    const StudentBlockMap m{state.m_t,
                            state.m_s,
                            r.gradient.student_tau,
                            r.gradient.teacher_tau,
                            r.gradient.student_one,
                            r.loss.impossible,
                            g.at(row, column),
                            g.dtype};
    sweeps().student_gradient(block(row, column, n), m);
  }

  // Coordinates that the sweep cannot know: the label, and the two that the clip changed. With g == logits the
  // student's values are gone by now, so they come from the state.
  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    if (!rows.labelled(row)) return;
    const double inv_tau = 1 / rows.value_at(row);
    const bool clipped = r.loss.clip.r > 0;
    const auto at = [&](double s, double dt) { return element<0, 1, true>(r.gradient, dt, s - state.m_s, inv_tau); };
    const double dt_y = clipped ? r.loss.clip.t_y : state.t_y - state.m_t;
    const double g_y = at(state.s_y, dt_y);
    store(g, row, rows.labels[row], state.s_y == kNothing<double> ? 0.0 : g_y - r.gradient.label);
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

  State fold(int64_t row, int64_t column, int n) const {
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
    const double values[columns] = {s.m, s.z, s.e, s.z_y};
    for (int i = 0; i < columns; ++i) put(out.state, out.wide, row * columns + i, values[i]);
  }

  State unpack(int64_t row, const Outputs& from) const {
    double v[columns];
    for (int i = 0; i < columns; ++i) v[i] = get(from.state, from.wide, row * columns + i);
    return {v[0], v[1], v[2], v[3]};
  }

  struct Row {
    double value = 0;
    TeacherLoss<double> loss;
    TeacherGradient<double> gradient;
  };

  Row finish_row(int64_t row, const State& state, double upstream) const {
    const RowWeights<double> weights = row_weights(rows.ignored(row), rows.labelled(row), rows.weight_at(row));
    const double scale = share(weights.ce, divisors.ce);
    Row out;
    if (scale == 0) return out;
    out.loss = finish(state, rows.value_at(row), options);
    out.value = scale * out.loss.value;
    out.gradient = coefficients(out.loss, scale * upstream);
    return out;
  }

  void map(int64_t row, int64_t column, int n, const State& state, const Row& r, const Matrix& g) const {
    const TeacherBlockMap m{state.m,        1 / state.z,       r.loss.log_z, r.gradient.one,
                            r.gradient.log, g.at(row, column), g.dtype};
    sweeps().teacher_gradient(block(row, column, n), m);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    if (!rows.labelled(row) || r.gradient.label == 0) return;
    const double p = element<true>(r.gradient, state.z_y - state.m, 1 / state.z, r.loss.log_z);
    store(g, row, rows.labels[row], state.z_y == kNothing<double> ? 0.0 : p + r.gradient.label);
  }
};

// ---- The driver ----

// Below this many elements a second thread costs more than it brings (a fork and join take some 5 us).
constexpr int64_t kSmall = 1 << 15;

struct Plan {
  int threads;
  bool columns;  // a row's blocks over the threads, one row after the other
  int64_t blocks;
  int64_t batch;  // rows per task
};

Plan plan(const Rows& rows) {
  Plan p{rows.threads, false, (rows.classes + kBlock - 1) / kBlock, 1};
  if (rows.rows * rows.classes < kSmall) p.threads = 1;
  p.columns = p.threads > 1 && p.blocks >= 4 * p.threads && rows.rows < 4 * p.threads;
  p.batch = std::max<int64_t>(1, kSmall / 2 / std::max<int64_t>(1, rows.classes));
  return p;
}

void clear(const Matrix& g, int64_t row, int64_t from, int64_t to) {
  if (to > from) std::memset(g.at(row, from), 0, static_cast<size_t>((to - from) * size_of(g.dtype)));
}

// Asks for huge pages under a gradient that nobody has touched: 4 KiB faults would cost as much as the arithmetic.
void ask_for_huge_pages(const Rows& rows, const Matrix& g) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(g.at(0, 0));
  const uintptr_t end = reinterpret_cast<uintptr_t>(g.at(rows.rows - 1, rows.padded));
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)rows;
  (void)g;
#endif
}

template <class Loss>
void gradient_of_row(const Loss& loss, int64_t row, const typename Loss::State& state, const typename Loss::Row& r,
                     const Matrix& g, const Plan& p, int threads) {
  const Rows& rows = loss.rows;
  // Backwards: the end of a row that is longer than the cache is what is still in it.
  parallel(threads, Schedule::same, p.blocks, [&](int64_t i) {
    const int64_t column = (threads > 1 ? i : p.blocks - 1 - i) * kBlock;
    const int n = static_cast<int>(std::min<int64_t>(kBlock, rows.classes - column));
    loss.map(row, column, n, state, r, g);
  });
  clear(g, row, rows.classes, rows.padded);
  loss.fix(row, state, r, g);
}

template <class Loss>
void run(const Loss& loss, const Outputs& out) {
  const Rows& rows = loss.rows;
  const Plan p = plan(rows);
  if (out.fresh && out.gradient.data && rows.rows > 0) ask_for_huge_pages(rows, out.gradient);
  std::vector<double> values(static_cast<size_t>(rows.rows), 0.0);

  const auto one_row = [&](int64_t row, int threads, std::vector<typename Loss::State>& parts) {
    typename Loss::State state;
    if (rows.ignored(row) || rows.classes == 0) {
      loss.pack(state, row, out);
      if (out.gradient.data) clear(out.gradient, row, 0, rows.padded);
      return;
    }
    parts.resize(static_cast<size_t>(p.blocks));
    parallel(threads, Schedule::same, p.blocks, [&](int64_t i) {
      const int64_t column = i * kBlock;
      const int n = static_cast<int>(std::min<int64_t>(kBlock, rows.classes - column));
      parts[static_cast<size_t>(i)] = loss.fold(row, column, n);
    });
    state = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) state = loss.merged(row, state, parts[i]);
    loss.complete(row, state);
    loss.pack(state, row, out);
    const typename Loss::Row r = loss.finish_row(row, state, 1.0);
    values[static_cast<size_t>(row)] = r.value;
    if (out.gradient.data) gradient_of_row(loss, row, state, r, out.gradient, p, threads);
  };

  if (p.columns) {
    std::vector<typename Loss::State> parts;
    for (int64_t row = 0; row < rows.rows; ++row) one_row(row, p.threads, parts);
  } else {
    parallel(p.threads, Schedule::next, (rows.rows + p.batch - 1) / p.batch, [&](int64_t task) {
      std::vector<typename Loss::State> parts;
      for (int64_t row = task * p.batch; row < std::min(rows.rows, (task + 1) * p.batch); ++row) one_row(row, 1, parts);
    });
  }

  if (out.per_row_loss) {
    for (int64_t row = 0; row < rows.rows; ++row) put(out.loss, out.wide, row, values[static_cast<size_t>(row)]);
  } else {
    double sum = 0;
    for (double value : values) sum += value;
    put(out.loss, out.wide, 0, sum);
  }
}

template <class Loss>
void run_gradient(const Loss& loss, Upstream upstream, const Outputs& from) {
  const Rows& rows = loss.rows;
  const Plan p = plan(rows);
  if (from.fresh && rows.rows > 0) ask_for_huge_pages(rows, from.gradient);
  const auto one_row = [&](int64_t row, int threads) {
    const double scale = upstream.data ? get(upstream.data, from.wide, upstream.per_row ? row : 0) : 1.0;
    if (rows.ignored(row) || rows.classes == 0) return clear(from.gradient, row, 0, rows.padded);
    const typename Loss::State state = loss.unpack(row, from);
    gradient_of_row(loss, row, state, loss.finish_row(row, state, scale), from.gradient, p, threads);
  };
  if (p.columns) {
    for (int64_t row = 0; row < rows.rows; ++row) one_row(row, p.threads);
  } else {
    parallel(p.threads, Schedule::next, (rows.rows + p.batch - 1) / p.batch, [&](int64_t task) {
      for (int64_t row = task * p.batch; row < std::min(rows.rows, (task + 1) * p.batch); ++row) one_row(row, 1);
    });
  }
}

bool wide(const Rows& rows) {
  return rows.logits.dtype == DType::f64 || (rows.target.data && rows.target.dtype == DType::f64);
}

}  // namespace

Check check(const Rows& rows) {
  for (int64_t row = 0; row < rows.rows; ++row) {
    if (rows.labels && rows.labelled(row) && (rows.labels[row] < 0 || rows.labels[row] >= rows.classes)) {
      return {Fault::label, row};
    }
    if (rows.weight && !(rows.weight[row] >= 0 && rows.weight[row] <= std::numeric_limits<double>::max())) {
      return {Fault::weight, row};
    }
    if (rows.per_row && !(rows.per_row[row] > 0 && rows.per_row[row] <= std::numeric_limits<double>::max())) {
      return {Fault::per_row, row};
    }
  }
  return {};
}

Divisors count(const Rows& rows) {
  Divisors sums{0, 0};
  for (int64_t row = 0; row < rows.rows; ++row) {
    const RowWeights<double> w = row_weights(rows.ignored(row), rows.labelled(row), rows.weight_at(row));
    sums.kd += w.kd;
    sums.ce += w.ce;
  }
  return sums;
}

void student_state(const Rows& rows, const StudentOptions& options, bool statistics, Divisors divisors,
                   const Outputs& out) {
  run(StudentLossOfRows{rows, options, divisors, wide(rows), statistics}, out);
}
void teacher_state(const Rows& rows, const TeacherOptions& options, Divisors divisors, const Outputs& out) {
  run(TeacherLossOfRows{rows, options, divisors, wide(rows)}, out);
}
void student_gradient(const Rows& rows, const StudentOptions& options, Divisors divisors, Upstream upstream,
                      const Outputs& from) {
  run_gradient(StudentLossOfRows{rows, options, divisors, wide(rows), false}, upstream, from);
}
void teacher_gradient(const Rows& rows, const TeacherOptions& options, Divisors divisors, Upstream upstream,
                      const Outputs& from) {
  run_gradient(TeacherLossOfRows{rows, options, divisors, wide(rows)}, upstream, from);
}

}  // namespace cudfast
