// launch.h for a GPU, by launches on a GPU or in the emulation.
#pragma once

#include <string>

#include "call.h"

namespace cudfast {

// The properties of a GPU for a plan.
struct Machine {
  int processors = 0;
  int shared = 0;      // largest shared memory of a block, in bytes
  int capability = 0;  // 90 is sm_90: of the GPU, or less if the kernels were compiled for less
  int cluster = 1;     // blocks that can stage a row together
  int widest = 1;      // the same, if more than the 8 blocks of every GPU with clusters are requested
};

// The distribution of rows over a block or a cluster, in place of the plan's choice: 0 leaves it to the plan.
struct Tuning {
  int cluster = 0;  // blocks, or more if the row does not fit into them
  int threads = 0;  // largest number of threads of a block
};

// Launches a kernel. Returns nullptr, or an error message.
using RowLaunch = const char* (*)(const Call&, const Terms&, const Grid&, void* stream);

// The kernels for logits that all have one dtype, in the order of DType; those in the place of f64 are for all others.
struct Kernels {
  RowLaunch student[4];  // with a target
  RowLaunch teacher[4];  // without a target
  RowLaunch projected;   // with constraints, for all dtypes
  const char* (*count)(const Rows& rows, double* divisors, void* stream);
  const char* (*scale)(const Matrix& gradient, int64_t rows, int64_t columns, Upstream upstream, int split,
                       void* stream);
  const char* (*machine)(int device, Machine& found);  // makes the device current
};

// Kernels for GPUs, compiled by nvcc, and kernels for the emulation.
enum class Where { device, emulated };
template <Where>
const Kernels& kernels();

// Number of blocks that share a row whose state or gradient is computed from global memory: more than 1 if rows are few
// and long, and never more than the threads of the block that merges their states.
int shared_rows(int64_t rows, int64_t classes, int processors);

// The grid of a launch, with the shared memory of kernels that stage rows.
Grid plan(const Call& call, const Machine& machine, const Tuning& tuning = {});

// Both sweeps. call.parts has room for shared_rows() states of a row. A launch that fails throws std::runtime_error.
void sweep(const Kernels& kernels, const Call& call, const Terms& terms, const Machine& machine, void* stream,
           const Tuning& tuning = {});

}  // namespace cudfast
