// Sums over the columns of a block, for both files that are compiled once per instruction set: sweeps.cpp and
// extended_sweeps.cpp.
#pragma once

#include "columns.h"

namespace cudfast {
namespace {

// Number of vectors that are summed before their sum is added to the block's. Short chains keep the error of f32 sums
// near one rounding; see docs/method.md, "Accuracy". There is one set of sums, because two sets and the exponentials do
// not fit into AVX2's registers.
constexpr int kChunk = 16;

template <class F>
StudentSums<F> zero_student() {
  return {F(0), F(0), F(0), F(0), F(0), F(0), F(0), F(0)};
}
template <class F>
TeacherSums<F> zero_teacher() {
  return {F(0), F(0)};
}

// Prefetches the next block while this one is summed: the pass for the maximum is limited by memory and the sums by
// arithmetic, and they would not overlap otherwise. Past the end of a row this is the next row; a prefetch never
// faults.
struct Ahead {
  const char* at;
  int64_t size;  // bytes per element

  Ahead(const char* block, DType dtype) : at(block + kBlock * size_of(dtype)), size(size_of(dtype)) {}
  __attribute__((always_inline)) void prefetch(int i) const { __builtin_prefetch(at + i * size); }
};

// Sums over a block: body(sums, i) folds the vector at column i, tail(sums) the last, partial one; ahead(i) is called
// for every cache line.
template <class T, class Sums, class Body, class Tail, class Prefetch>
inline __attribute__((always_inline)) Sums accumulate(int whole, int rest, Sums zero, Body body, Tail tail,
                                                      Prefetch ahead) {
  constexpr int width = Lanes<T>::count;
  Sums sums = zero;
  for (int start = 0; start < whole; start += kChunk * width) {
    const int end = start + kChunk * width < whole ? start + kChunk * width : whole;
    Sums chunk = zero;
    int i = start;
    for (; i + 2 * width <= end; i += 2 * width) {
      ahead(i);
      if constexpr (sizeof(Lanes<T>) >= 64) ahead(i + width);
      body(chunk, i);
      body(chunk, i + width);
    }
    if (i < end) body(chunk, i);
    add(sums, chunk);
  }
  if (rest > 0) tail(sums);
  return sums;
}

constexpr int kOnes = kStudentOne | kTeacherOne, kEntropies = kStudentEntropy | kTeacherEntropy;

}  // namespace
}  // namespace cudfast

#define CUDFAST_JOIN_(a, b) a##b
#define CUDFAST_JOIN(a, b) CUDFAST_JOIN_(a, b)
#define CUDFAST_STRING_(a) #a
#define CUDFAST_STRING(a) CUDFAST_STRING_(a)
