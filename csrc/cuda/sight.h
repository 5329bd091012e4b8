// The logits of a projected row for a thread: sets of classes, and the teacher's logits with separate values for them.
#pragma once

#include "../row/state.h"
#include "grid.h"

namespace cudfast {
namespace {

// A set of classes of a row: an ascending list of columns.
struct Members {
  const int64_t* begin = nullptr;
  const int64_t* end = nullptr;

  CUDFAST_KERNEL int64_t size() const { return end - begin; }
  // The first member that is not before a column.
  CUDFAST_KERNEL static const int64_t* from(const int64_t* at, const int64_t* end, int64_t column) {
    while (at < end) {
      const int64_t* const middle = at + (end - at) / 2;
      if (*middle < column) {
        at = middle + 1;
      } else {
        end = middle;
      }
    }
    return at;
  }
  CUDFAST_KERNEL bool holds(int64_t column) const {
    const int64_t* const at = from(begin, end, column);
    return at < end && *at == column;
  }
};

// The transformation of the teacher's logits, for near, wrong and all other classes: beta (t - centre) + offset.
template <class R>
struct Sight {
  R beta, centre[3], offset[3];
};

// A thread's transformed chunks, in ascending order.
template <class R, class Chunks>
struct Seeing {
  Chunks chunks;
  Sight<R> sight;
  const int64_t* at[2];
  const int64_t* end[2];
  int64_t next[2];  // the first member that is not before the chunk

  CUDFAST_KERNEL Seeing(const Chunks& chunks, const Sight<R>& sight, const Members& near, const Members& wrong)
      : chunks(chunks), sight(sight), at{near.begin, wrong.begin}, end{near.end, wrong.end} {
    CUDFAST_UNROLL
    for (int i = 0; i < 2; ++i) next[i] = at[i] < end[i] ? *at[i] : kBeaten;
  }

  CUDFAST_KERNEL void operator()(int chunk, R (&values)[2][Chunks::width]) {
    const int64_t column = chunks.column(chunk), behind = column + Chunks::width;
    R(&t)[Chunks::width] = values[1], seen[Chunks::width];
    CUDFAST_UNROLL
    for (int j = 0; j < Chunks::width; ++j) seen[j] = sight.beta * (t[j] - sight.centre[2]) + sight.offset[2];
    CUDFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (next[i] >= behind) continue;
      for (at[i] = Members::from(at[i], end[i], column); at[i] < end[i] && *at[i] < behind; ++at[i]) {
        CUDFAST_UNROLL
        for (int j = 0; j < Chunks::width; ++j) {
          if (column + j == *at[i]) seen[j] = sight.beta * (t[j] - sight.centre[i]) + sight.offset[i];
        }
      }
      next[i] = at[i] < end[i] ? *at[i] : kBeaten;
    }
    CUDFAST_UNROLL
    for (int j = 0; j < Chunks::width; ++j) t[j] = seen[j];
  }
};

}  // namespace
}  // namespace cudfast
