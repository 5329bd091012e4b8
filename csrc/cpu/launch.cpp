// launch.h for the CPU: rows over threads, or columns over threads if rows are few and long. Both ways fold the same
// blocks and merge them in the same order, so the results are bitwise equal.
#include "../launch.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "extended.h"
#include "losses.h"
#include "projected.h"
#include "threads.h"

namespace cudfast {

namespace {
std::atomic<bool> forked{false};
const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });  // from the moment the library is loaded
}  // namespace

bool can_thread() { return watched == 0 && !forked; }

namespace {

// Below this many elements a second thread costs more than it gains (a fork and join take some 5 us).
constexpr int64_t kSmall = 1 << 15;

struct Plan {
  int threads;
  bool columns;  // a row's blocks over the threads, one row after the other
  int64_t blocks;
  int64_t batch;  // rows per task
};

Plan plan(const Rows& rows) {
  Plan p{rows.threads, false, blocks_of(rows.classes), 1};
  if (rows.rows * rows.classes < kSmall) p.threads = 1;
  p.columns = p.threads > 1 && p.blocks >= 4 * p.threads && rows.rows < 4 * p.threads;
  p.batch = std::max<int64_t>(1, kSmall / 2 / std::max<int64_t>(1, rows.classes));
  return p;
}

// A gradient that would leave the caches before it is read is written with non-temporal stores: an ordinary store reads
// a line before it writes it. Rows must consist of whole lines and be long: the elements of the label and the top-1 are
// written last, when their lines are no longer cached, and later stores wait for them. `least`: bytes per element,
// because the parts of a line must be written in quick succession. See docs/performance.md.
constexpr int64_t kStreamBytes = 3 << 23, kStreamColumns = 1 << 14;

Outputs streamed(const Rows& rows, Outputs out, int64_t least) {
  Matrix& g = out.gradient;
  const int64_t size = size_of(g.dtype);
  const int64_t lines =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(g.data)) | g.outer_stride * size | g.inner_stride * size;
  g.stream = sweeps().streams && g.data != rows.logits.data && size >= least && lines % 64 == 0 &&
             rows.classes >= kStreamColumns && rows.rows * rows.classes * size >= kStreamBytes &&
             !rows.constraints.bounds;
  return out;
}

// Orders non-temporal stores before later reads by other threads.
void fence() {
#if defined(CUDFAST_X86)
  __builtin_ia32_sfence();
#endif
}

void clear(const Matrix& g, int64_t row, int64_t from, int64_t to) {
  if (to > from) std::memset(g.at(row, from), 0, static_cast<size_t>((to - from) * size_of(g.dtype)));
}

// Memory of one thread, reused by later calls, so that a row needs no allocation.
template <class State>
struct Scratch {
  std::vector<State> parts;    // states of a row's blocks
  std::vector<double> memory;  // exponentials of a row, two per element
};

template <class State>
Scratch<State>& scratch() {
  static thread_local Scratch<State> own;
  return own;
}

// Exponentials are kept for the second sweep if two per element fit in a second-level cache with the row. The choice
// depends on the row alone, so results do not depend on the number of threads.
constexpr int64_t kKeepBytes = 5 << 18;

template <class State>
char* room_for_exponentials(Scratch<State>& own, const Plan& p, int64_t element) {
  const int64_t bytes = 2 * p.blocks * kBlock * element;
  if (p.blocks * kBlock > kKeepBytes / (2 * element)) return nullptr;
  own.memory.resize(static_cast<size_t>(bytes + 64) / sizeof(double));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(own.memory.data());
  return reinterpret_cast<char*>((begin + 63) / 64 * 64);
}

// One row, its blocks over `threads`.
template <class Loss>
struct RowWork {
  using State = typename Loss::State;
  Loss& loss;
  const Plan& plan;
  int64_t row;
  int threads;
  Scratch<State>& own;   // of the thread that owns the row; the others write their own blocks of it
  char* kept = nullptr;  // room for the exponentials of a row: the teacher's, then the student's

  Kept kept_at(int64_t block, const Matrix& g) const {
    if (!kept) return {};
    const int64_t element = loss.wide ? 8 : 4;
    return {kept + block * kBlock * element,
            loss.keeps_in_gradient() ? g.at(row, block * kBlock) : kept + (plan.blocks + block) * kBlock * element};
  }

  State state(const Matrix& g) {
    own.parts.resize(static_cast<size_t>(plan.blocks));
    const auto fold = [&](int64_t i, int64_t column, int n) {
      own.parts[static_cast<size_t>(i)] = loss.fold(row, column, n, kept_at(i, g));
    };
    int64_t again = kEvery;
    do {
      again == kEvery ? each_block(threads, loss.rows.classes, fold) : one_block(again, loss.rows.classes, fold);
      again = loss.again(row, threads, own.parts);
    } while (again != kNone);
    State whole = own.parts[0];
    for (size_t i = 1; i < own.parts.size(); ++i) whole = loss.merged(row, whole, own.parts[i]);
    loss.complete(row, whole);
    return whole;
  }

  void gradient(const State& state, const typename Loss::Row& r, const Matrix& g) const {
    if (!r.counts) return clear(g, row, 0, loss.rows.padded);
    each_block(
        threads, loss.rows.classes,
        [&](int64_t i, int64_t column, int n) {
          loss.map(row, column, n, state, kept ? &own.parts[static_cast<size_t>(i)] : nullptr, r, g, kept_at(i, g));
        },
        [&] {
          if (g.stream) fence();
        });
    clear(g, row, loss.rows.classes, loss.rows.padded);
    loss.fix(row, state, r, g);
  }
};

// task(row, threads) for every row: rows over threads, or one row after the other with its columns over threads.
template <class F>
void each_row(const Rows& rows, const Plan& p, F task) {
  if (p.columns) {
    for (int64_t row = 0; row < rows.rows; ++row) task(row, p.threads);
    return;
  }
  parallel(p.threads, Schedule::next, (rows.rows + p.batch - 1) / p.batch, [&](int64_t batch) {
    for (int64_t row = batch * p.batch; row < std::min(rows.rows, (batch + 1) * p.batch); ++row) task(row, 1);
  });
}

template <class Loss>
void run(const Loss& loss, const Outputs& out) {
  const Rows& rows = loss.rows;
  const Plan p = plan(rows);
  std::vector<double> values(static_cast<size_t>(rows.rows), 0.0);
  each_row(rows, p, [&](int64_t row, int threads) {
    if (rows.ignored(row)) {
      loss.pack(typename Loss::State{}, row, out);
      if (out.gradient.data) clear(out.gradient, row, 0, rows.padded);
      return;
    }
    auto&& own = loss.prepared(row, nullptr);
    RowWork<std::remove_reference_t<decltype(own)>> work{own, p, row, threads, scratch<typename Loss::State>()};
    if (out.gradient.data && loss.keeps(row)) work.kept = room_for_exponentials(work.own, p, loss.wide ? 8 : 4);
    const typename Loss::State state = work.state(out.gradient);
    loss.pack(state, row, out);
    const typename Loss::Row r = loss.finish(row, state, 1.0);
    values[static_cast<size_t>(row)] = r.value;
    if (out.gradient.data) work.gradient(state, r, out.gradient);
  });
  double sum = 0;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const double value = values[static_cast<size_t>(row)];
    if (out.per_row_loss) put(out.loss, loss.wide, row, value);
    sum += value;
  }
  if (!out.per_row_loss) put(out.loss, loss.wide, 0, sum);
}

template <class Loss>
void run_gradient(const Loss& loss, Upstream upstream, const Outputs& from) {
  const Rows& rows = loss.rows;
  const Plan p = plan(rows);
  each_row(rows, p, [&](int64_t row, int threads) {
    if (rows.ignored(row)) return clear(from.gradient, row, 0, rows.padded);
    const double scale = upstream.data ? get(upstream.data, loss.wide, upstream.per_row ? row : 0) : 1.0;
    const typename Loss::State state = loss.unpack(row, from);
    auto&& own = loss.prepared(row, &state);
    const RowWork<std::remove_reference_t<decltype(own)>> work{own, p, row, threads, scratch<typename Loss::State>()};
    work.gradient(state, loss.finish(row, state, scale), from.gradient);
  });
}

}  // namespace

Check check(const Rows& rows, const Terms& terms) {
  constexpr double largest = std::numeric_limits<double>::max();
  for (int64_t row = 0; row < rows.rows; ++row) {
    if (rows.labels && rows.labelled(row) && (rows.labels[row] < 0 || rows.labels[row] >= rows.classes)) {
      return {Fault::label, row};
    }
    if (rows.weight && !(rows.weight[row] >= 0 && rows.weight[row] <= largest)) return {Fault::weight, row};
    if (rows.temperature &&
        !(rows.temperature[row] >= kLowestTemperature && rows.temperature[row] <= kHighestTemperature)) {
      return {Fault::temperature, row};
    }
  }
  if (!rows.coefficients) return {};
  const int64_t count = terms.count * (rows.coefficients_per_row ? rows.rows : 1);
  for (int64_t i = 0; i < count; ++i) {
    if (!(std::fabs(rows.coefficients[i]) <= largest)) return {Fault::coefficient, i};
  }
  return {};
}

Divisors count(const Rows& rows) {
  Divisors sums{0, 0};
  for (int64_t row = 0; row < rows.rows; ++row) {
    const RowWeights<double> w = row_weights(rows.ignored(row), rows.labelled(row), rows.weight_at(row));
    sums.rows += w.rows;
    sums.labelled += w.labelled;
  }
  return sums;
}

Check row_state(const Rows& rows, const Terms& terms, bool statistics, Divisors divisors, const Outputs& given) {
  const Outputs out = streamed(rows, given, 2);
  const bool extended = rows.extended(terms);
  if (!rows.target.data) {
    const TeacherLossOfRows loss{rows, terms, divisors, rows.wide()};
    extended ? run(ExtendedTeacherLossOfRows(loss), out) : run(loss, out);
    return {};
  }
  const StudentLossOfRows loss{rows, terms, divisors, rows.wide(), needs_of(terms, statistics), out.gradient};
  if (!rows.constraints.bounds) {
    extended ? run(ExtendedLossOfRows(loss), out) : run(loss, out);
    return {};
  }
  std::atomic<int64_t> unmet{rows.rows};
  run(ProjectedLossOfRows(loss, &unmet), out);
  return unmet == rows.rows ? Check{} : Check{Fault::bounds, unmet};
}

void row_gradient(const Rows& rows, const Terms& terms, Divisors divisors, Upstream upstream, const Outputs& given) {
  const Outputs from = streamed(rows, given, 4);
  const bool extended = rows.extended(terms);
  if (!rows.target.data) {
    const TeacherLossOfRows loss{rows, terms, divisors, rows.wide()};
    return extended ? run_gradient(ExtendedTeacherLossOfRows(loss), upstream, from)
                    : run_gradient(loss, upstream, from);
  }
  const StudentLossOfRows loss{rows, terms, divisors, rows.wide(), needs_of(terms, false), Matrix{}};
  if (!rows.constraints.bounds) {
    return extended ? run_gradient(ExtendedLossOfRows(loss), upstream, from) : run_gradient(loss, upstream, from);
  }
  std::atomic<int64_t> unmet{rows.rows};
  run_gradient(ProjectedLossOfRows(loss, &unmet), upstream, from);
}

}  // namespace cudfast
