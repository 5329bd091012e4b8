// Definitions for kernels: the shape of a launch, a thread's place in it, and keywords for nvcc or a C++ compiler.
#pragma once

#if defined(__CUDACC__)

#define CUDFAST_KERNEL __device__ __forceinline__
#define CUDFAST_CALLED __device__ __noinline__
#define CUDFAST_CHECK(condition)

#else

#include <stdexcept>

#define CUDFAST_KERNEL inline
#define CUDFAST_CALLED
#define CUDFAST_CHECK(condition) \
  if (!(condition)) throw std::logic_error("a kernel's access is out of bounds or misaligned: " #condition)

#endif

namespace cudfast {

constexpr int kWarp = 32, kMaxThreads = 512;

// A block's shared memory: 17 values for reduce(), the kernel's shared data, staged rows.
constexpr int kScratchBytes = 17 * 104, kHeaderBytes = 3392;

// Blocks of a launch, blocks per cluster, threads per block, bytes of shared memory beyond the header.
struct Grid {
  int blocks = 0;
  int cluster = 1;
  int threads = kWarp;
  int staged = 0;
};

struct Thread {
  int rank;   // of its block in the cluster
  int index;  // in its block
};

}  // namespace cudfast
