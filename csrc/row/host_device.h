// Functions for CPU and GPU.
#pragma once

#if defined(__CUDACC__)
#define CUDFAST_HD __host__ __device__
#define CUDFAST_HD_INLINED __host__ __device__ __forceinline__  // into the loops over a row
#define CUDFAST_HD_CALLED __host__ __device__ __noinline__      // where a copy in every kernel would be too much code
#define CUDFAST_UNROLL _Pragma("unroll")                        // so that arrays are in registers
#else
#define CUDFAST_HD
#define CUDFAST_HD_INLINED inline __attribute__((always_inline))
#define CUDFAST_HD_CALLED inline
#define CUDFAST_UNROLL
#endif
