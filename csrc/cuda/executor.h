// Runs a kernel, which is written in phases: each thread's share, a merge, each thread's share again.
//
// On a GPU an Executor is a thread's view of its block and cluster; this file defines it for nvcc. A C++ compiler uses
// that of the emulation.
#pragma once

#include <cstdint>
#include <cstring>

#include "grid.h"

#if !defined(__CUDACC__)
#include "emulation.h"
#else

namespace cudfast {
namespace {

extern __shared__ uint4 block_memory[];

class Executor {
 public:
  // A value per thread.
  template <class T>
  class Local {
   public:
    CUDFAST_KERNEL explicit Local(const Executor&) {}
    CUDFAST_KERNEL T& operator[](Thread) { return value_; }

   private:
    T value_;
  };

  CUDFAST_KERNEL explicit Executor(int cluster) : cluster_(cluster) {}
  CUDFAST_KERNEL int threads() const { return static_cast<int>(blockDim.x); }
  CUDFAST_KERNEL int cluster() const { return cluster_; }
  CUDFAST_KERNEL int rank() const { return static_cast<int>(blockIdx.x % cluster_); }
  CUDFAST_KERNEL int block(int rank) const { return static_cast<int>(blockIdx.x - blockIdx.x % cluster_) + rank; }

  // A phase: f for every thread, then a barrier of the block.
  template <class F>
  CUDFAST_KERNEL void each(F f) {
    f(Thread{static_cast<int>(blockIdx.x % cluster_), static_cast<int>(threadIdx.x)});
    __syncthreads();
  }

  // A barrier of the cluster.
  CUDFAST_KERNEL void join() {
#if __CUDA_ARCH__ >= 900
    if (cluster_ > 1) {
      asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    }
#else
    if (cluster_ > 1) __trap();  // plans use no clusters for these architectures
#endif
  }

  // The shared memory of block `rank` of the cluster; the 16-byte lines of staged rows, in the thread's own block.
  template <class T>
  CUDFAST_KERNEL T& shared(int rank) {
    char* own = reinterpret_cast<char*>(block_memory) + kScratchBytes;
#if __CUDA_ARCH__ >= 900
    if (cluster_ > 1) {
      uint64_t there;
      asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
      own = reinterpret_cast<char*>(there);
    }
#endif
    return *reinterpret_cast<T*>(own);
  }
  CUDFAST_KERNEL char* staged(Thread, int offset, int) {
    return reinterpret_cast<char*>(block_memory) + kHeaderBytes + offset;
  }

  // Replaces every thread's value with its block's total, summed in a fixed order; `empty` is the neutral element.
  template <class T, class Add>
  CUDFAST_KERNEL void reduce(Local<T>& values, Add add, const T& empty = T{}) {
    static_assert(17 * sizeof(T) <= kScratchBytes, "does not fit");
    T* const scratch = reinterpret_cast<T*>(block_memory);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    T value = of_warp(values[Thread{}], add);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    if (warp == 0) {
      value = of_warp(lane < threads() / kWarp ? scratch[lane] : empty, add);
      if (lane == 0) scratch[16] = value;
    }
    __syncthreads();
    values[Thread{}] = scratch[16];
    __syncthreads();
  }

 private:
  template <class T, class Add>
  CUDFAST_KERNEL static T of_warp(T value, Add add) {
#pragma unroll 1
    for (int down = kWarp / 2; down > 0; down /= 2) {
      int words[sizeof(T) / 4];
      memcpy(words, &value, sizeof(T));
      CUDFAST_UNROLL
      for (int& word : words) word = __shfl_down_sync(0xffffffffu, word, down);
      T other;
      memcpy(&other, words, sizeof(T));
      value = add(value, other);
    }
    return value;
  }

  int cluster_;
};

}  // namespace
}  // namespace cudfast

#endif
