// The launches of one dtype, CUDFAST_DTYPE: compiled once for each of f32, bf16 and f16, and once for all others, by
// nvcc for GPUs and by a C++ compiler for the emulation.
#pragma once

#include "kernels.h"
#include "launch.h"
#include "projected.h"
#include "run.h"

namespace cudfast {
namespace {

template <class Loss>
const char* run_rows(const Call& call, const Loss& loss, const Grid& grid, void* stream) {
  if (grid.staged == 0) return run(RowKernel<Loss, false>{call, loss}, grid, stream);
  if constexpr (sizeof(typename Loss::R) == 4) return run(RowKernel<Loss, true>{call, loss}, grid, stream);
  return "float64 rows are not staged";
}

// Run-time flags become compile-time ones here. The default temperature has separate kernels, with one exponential less
// per element and sweep; kernels for more temperatures would double the build time.
template <int D>
const char* student(const Call& call, const Terms& terms, const Grid& grid, void* stream) {
  if constexpr (D == kAny) {
    if (call.rows.wide()) return run_rows(call, Student<0, D, double>{terms}, grid, stream);
    return run_rows(call, Student<0, D, float>{terms}, grid, stream);
  } else {
    if (!call.rows.temperature && call.rows.scalar == 2)
      return run_rows(call, Student<2, D, float>{terms}, grid, stream);
    return run_rows(call, Student<0, D, float>{terms}, grid, stream);
  }
}

template <int D>
const char* teacher(const Call& call, const Terms& terms, const Grid& grid, void* stream) {
  using R = std::conditional_t<D == kAny, double, float>;
  return run_rows(call, Teacher<D, R>{terms}, grid, stream);
}

}  // namespace

#if defined(__CUDACC__)
constexpr Where kHere = Where::device;
#else
constexpr Where kHere = Where::emulated;
#endif

template <Where, int>
struct RowLaunches {
  static const char* student(const Call&, const Terms&, const Grid&, void*);
  static const char* teacher(const Call&, const Terms&, const Grid&, void*);
};
template <>
const char* RowLaunches<kHere, CUDFAST_DTYPE>::student(const Call& call, const Terms& terms, const Grid& grid,
                                                       void* stream) {
  return cudfast::student<CUDFAST_DTYPE>(call, terms, grid, stream);
}
template <>
const char* RowLaunches<kHere, CUDFAST_DTYPE>::teacher(const Call& call, const Terms& terms, const Grid& grid,
                                                       void* stream) {
  return cudfast::teacher<CUDFAST_DTYPE>(call, terms, grid, stream);
}

#if CUDFAST_DTYPE < 0

namespace {

const char* count_rows(const Rows& rows, double* divisors, void* stream) {
  Grid grid;
  grid.blocks = 1;
  grid.threads = kMaxThreads;
  return run(CountKernel{rows, divisors}, grid, stream);
}

const char* projected_rows(const Call& call, const Terms& terms, const Grid& grid, void* stream) {
  if (call.rows.wide()) return run(ProjectedKernel<double, false>{{call, {terms}}}, grid, stream);
  if (grid.staged == 0) return run(ProjectedKernel<float, false>{{call, {terms}}}, grid, stream);
  return run(ProjectedKernel<float, true>{{call, {terms}}}, grid, stream);
}

const char* scale_rows(const Matrix& gradient, int64_t rows, int64_t columns, Upstream upstream, int split,
                       void* stream) {
  Grid grid;
  grid.blocks = rows * split;
  grid.threads = kMaxThreads / 2;
  return run(ScaleKernel{gradient, columns, upstream, split}, grid, stream);
}

}  // namespace

template <>
const Kernels& kernels<kHere>() {
  using F32 = RowLaunches<kHere, static_cast<int>(DType::f32)>;
  using Bf16 = RowLaunches<kHere, static_cast<int>(DType::bf16)>;
  using F16 = RowLaunches<kHere, static_cast<int>(DType::f16)>;
  using Others = RowLaunches<kHere, kAny>;
  static const Kernels found{
      {F32::student, Others::student, Bf16::student, F16::student},
      {F32::teacher, Others::teacher, Bf16::teacher, F16::teacher},
      projected_rows,
      count_rows,
      scale_rows,
      find_machine<CountKernel>,
  };
  return found;
}

#endif

}  // namespace cudfast
