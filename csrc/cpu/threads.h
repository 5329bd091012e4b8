// Loops over threads with OpenMP, which shares the thread pool of torch.
#pragma once

#include <cstdint>

#include "sweeps.h"

namespace cudfast {

// False in a forked child, whose copy of the pool has no threads.
bool can_thread();

// Whether each thread has the same tasks in every loop (its part of a row stays in its cache) or takes the next task
// when it is free.
enum class Schedule { next, same };

struct Nothing {
  void operator()() const {}
};

// Every thread calls `last` at the end.
template <class F, class Last = Nothing>
void parallel(int threads, Schedule schedule, int64_t tasks, F task, Last last = {}) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1 && can_thread()) {
#pragma omp parallel num_threads(threads)
    {
      if (schedule == Schedule::same) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < tasks; ++i) task(i);
      } else {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < tasks; ++i) task(i);
      }
      last();
    }
    return;
  }
#endif
  (void)threads;
  (void)schedule;
  for (int64_t i = 0; i < tasks; ++i) task(i);
  last();
}

inline int64_t blocks_of(int64_t classes) { return (classes + kBlock - 1) / kBlock; }

// f(block, first column, columns) for one block of a row, or for all.
template <class F>
void one_block(int64_t i, int64_t classes, F f) {
  const int64_t column = i * kBlock;
  f(i, column, static_cast<int>(classes - column < kBlock ? classes - column : kBlock));
}
template <class F, class Last = Nothing>
void each_block(int threads, int64_t classes, F f, Last last = {}) {
  parallel(threads, Schedule::same, blocks_of(classes), [&](int64_t i) { one_block(i, classes, f); }, last);
}

}  // namespace cudfast
