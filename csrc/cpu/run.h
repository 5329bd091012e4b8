// The driver: rows over threads, or columns over threads if rows are few and long. Both ways fold the same blocks and
// merge them in the same order, so the results are bitwise equal.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "losses.h"
#include "threads.h"

namespace cudfast {
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
}  // namespace cudfast
