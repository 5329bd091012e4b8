// Functions that a GPU runs, too.
#pragma once

#if defined(__CUDACC__)
#define CUDFAST_HD __host__ __device__
#define CUDFAST_UNROLL _Pragma("unroll")  // so that an array is registers
#else
#define CUDFAST_HD
#define CUDFAST_UNROLL
#endif
