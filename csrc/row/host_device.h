// Functions that a GPU runs, too.
#pragma once

#if defined(__CUDACC__)
#define CUDFAST_HD __host__ __device__
#else
#define CUDFAST_HD
#endif
