// Functions for CPU and GPU.
#pragma once

#if defined(__CUDACC__)
#define CUDFAST_HD __host__ __device__
#define CUDFAST_UNROLL _Pragma("unroll")  // so that arrays are in registers
#else
#define CUDFAST_HD
#define CUDFAST_UNROLL
#endif
