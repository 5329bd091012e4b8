// Memory and cases for the tests of the CUDA kernels.
#pragma once

#include <cstdio>
#include <string>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/halves.h"
#include "truth.h"

using namespace cudfast;

namespace {

int failures = 0;

void near(const std::string& what, double got, double wanted, double tolerance) {
  const bool same = got == wanted || (std::isnan(got) && std::isnan(wanted));
  if (same || std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted))) return;
  if (++failures < 40) std::printf("FAIL %s: got %.17g, wanted %.17g\n", what.c_str(), got, wanted);
}

// Memory of a dtype, its first row `shift` elements behind a line boundary, `width` columns a row.
struct Logits {
  DType dtype;
  int64_t width;
  std::vector<double> memory;  // aligned to 16 bytes
  int64_t shift;

  Logits(DType d, int64_t rows, int64_t w, int64_t s)
      : dtype(d), width(w), memory(static_cast<size_t>((rows * w + s) * size_of(d) / 8 + 2)), shift(s) {}
  char* at(int64_t i) { return reinterpret_cast<char*>(memory.data()) + (shift + i) * size_of(dtype); }
  Matrix matrix(int64_t rows) { return {at(0), rows, 0, width, dtype}; }
  void set(int64_t i, double value) {
    if (dtype == DType::f64) *reinterpret_cast<double*>(at(i)) = value;
    if (dtype == DType::f32) *reinterpret_cast<float*>(at(i)) = static_cast<float>(value);
    if (dtype == DType::bf16) *reinterpret_cast<uint16_t*>(at(i)) = narrow_bfloat(static_cast<float>(value));
    if (dtype == DType::f16) *reinterpret_cast<uint16_t*>(at(i)) = narrow_half(static_cast<float>(value));
  }
  double get(int64_t i) {
    if (dtype == DType::f64) return *reinterpret_cast<double*>(at(i));
    if (dtype == DType::f32) return static_cast<double>(*reinterpret_cast<float*>(at(i)));
    const uint16_t half = *reinterpret_cast<uint16_t*>(at(i));
    return static_cast<double>(dtype == DType::bf16 ? widen_bfloat(half) : widen_half(half));
  }
  std::vector<double> row(int64_t r, int64_t n) {
    std::vector<double> values;
    for (int64_t j = 0; j < n; ++j) values.push_back(get(r * width + j));
    return values;
  }
};

// Half a unit in the last place, relative, and of the smallest.
double rounding(DType dtype) {
  return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : dtype == DType::f32 ? 0x1p-24 : 0x1p-52;
}

// An assignment of rows to blocks.
struct Way {
  const char* name;
  Machine machine;
  int cluster = 0;  // blocks that a row must be staged by
  Tuning tuning = {};
};

struct Case {
  int64_t rows, classes, padding, shift_s, shift_t;
  DType s, t;
  double tau;
};

void fill(Random& random, Logits& x, int64_t rows, double scale) {
  std::normal_distribution<double> normal(0, scale);
  for (int64_t i = 0; i < rows * x.width; ++i) x.set(i, normal(random));
}

}  // namespace
