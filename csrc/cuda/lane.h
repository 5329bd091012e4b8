// The types in which fold() and element() compute on a GPU: f32 with the functions that row/ uses, or a plain double.
#pragma once

#include "../row/element.h"

namespace cudfast {
namespace {

struct Lane {
  float v;

  Lane() = default;
  template <class U>
  CUDFAST_HD explicit Lane(U scalar) : v(static_cast<float>(scalar)) {}
};

CUDFAST_HD inline Lane operator+(Lane a, Lane b) { return Lane(a.v + b.v); }
CUDFAST_HD inline Lane operator-(Lane a, Lane b) { return Lane(a.v - b.v); }
CUDFAST_HD inline Lane operator*(Lane a, Lane b) { return Lane(a.v * b.v); }
CUDFAST_HD inline bool operator>(Lane a, Lane b) { return a.v > b.v; }
CUDFAST_HD inline bool operator==(Lane a, Lane b) { return a.v == b.v; }
CUDFAST_HD inline Lane select(bool mask, Lane yes, Lane no) { return mask ? yes : no; }
CUDFAST_HD inline Lane max(Lane a, Lane b) { return a.v > b.v ? a : b; }

// e^x by the special function unit: x <= 0, relative error at most 2^-22 + |x| 2^-24 (CUDA C++ Programming Guide).
CUDFAST_HD inline Lane exp(Lane x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x.v * 1.44269504088896f));
  return Lane(y);
#else
  return Lane(std::exp(x.v));
#endif
}

CUDFAST_HD inline float scalar(Lane x) { return x.v; }
CUDFAST_HD inline double scalar(double x) { return x; }

template <class R>
struct LaneOf {
  using type = Lane;
};
template <>
struct LaneOf<double> {
  using type = double;
};

}  // namespace
}  // namespace cudfast
