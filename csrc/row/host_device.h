// Functions for CPU and GPU.
#pragma once

#if defined(__CUDACC__)
#define CUDFAST_HD __host__ __device__
#define CUDFAST_HD_INLINED __host__ __device__ __forceinline__  // into the loops over a row
#define CUDFAST_HD_CALLED __host__ __device__ __noinline__      // once a row: saves a kernel's registers
#define CUDFAST_UNROLL _Pragma("unroll")                        // so that arrays are in registers
#else
#define CUDFAST_HD
#define CUDFAST_HD_INLINED inline __attribute__((always_inline))
#define CUDFAST_HD_CALLED CUDFAST_HD_INLINED
#define CUDFAST_UNROLL
#endif
