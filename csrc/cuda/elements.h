// One row of logits in memory: single elements, and lines of 16 bytes, copied to shared memory or widened to the
// computing type.
#pragma once

#include "../halves.h"
#include "call.h"

namespace cudfast {
namespace {

struct alignas(16) Line {
  uint32_t word[4];
};

CUDFAST_HD inline float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
CUDFAST_HD inline uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// Two halves and the word that contains them, the first one in the low bits.
CUDFAST_KERNEL void widen_pair(uint32_t word, bool bfloat, float& low, float& high) {
  if (bfloat) {
    low = as_float(word << 16);
    high = as_float(word & 0xffff0000u);
    return;
  }
#if defined(__CUDA_ARCH__)
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
#else
  low = widen_half(static_cast<uint16_t>(word));
  high = widen_half(static_cast<uint16_t>(word >> 16));
#endif
}
CUDFAST_KERNEL uint32_t narrow_pair(float low, float high, bool bfloat) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if (bfloat) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  const auto narrow = [&](float f) { return static_cast<uint32_t>(bfloat ? narrow_bfloat(f) : narrow_half(f)); };
  return narrow(low) | narrow(high) << 16;
#endif
}

// Lines of a chunk of V elements, in memory of either kind.
constexpr int bytes_of(int elements, DType dtype) { return elements * static_cast<int>(size_of(dtype)); }

template <int V, class R>
CUDFAST_KERNEL void widen(const char* from, DType dtype, R (&to)[V]) {
  const Line* const lines = reinterpret_cast<const Line*>(from);
  if (dtype == DType::f64) {
    for (int j = 0; j < V; ++j) to[j] = static_cast<R>(reinterpret_cast<const double*>(from)[j]);
  } else if (dtype == DType::f32) {
    CUDFAST_UNROLL
    for (int i = 0; i < V / 4; ++i) {
      const Line line = lines[i];
      for (int j = 0; j < 4; ++j) to[4 * i + j] = static_cast<R>(as_float(line.word[j]));
    }
  } else if constexpr (V % 8 == 0) {
    CUDFAST_UNROLL
    for (int i = 0; i < V / 8; ++i) {
      const Line line = lines[i];
      CUDFAST_UNROLL
      for (int j = 0; j < 4; ++j) {
        float low, high;
        widen_pair(line.word[j], dtype == DType::bf16, low, high);
        to[8 * i + 2 * j] = static_cast<R>(low);
        to[8 * i + 2 * j + 1] = static_cast<R>(high);
      }
    }
  }
}

// Written once and not read again: the cache should keep logits instead.
CUDFAST_KERNEL void store(Line* at, const Line& line) {
#if defined(__CUDA_ARCH__)
  __stcs(reinterpret_cast<uint4*>(at), make_uint4(line.word[0], line.word[1], line.word[2], line.word[3]));
#else
  *at = line;
#endif
}

template <int V, class R>
CUDFAST_KERNEL void narrow(const R (&from)[V], DType dtype, char* to) {
  Line* const lines = reinterpret_cast<Line*>(to);
  if (dtype == DType::f64) {
    for (int j = 0; j < V; ++j) reinterpret_cast<double*>(to)[j] = static_cast<double>(from[j]);
  } else if (dtype == DType::f32) {
    CUDFAST_UNROLL
    for (int i = 0; i < V / 4; ++i) {
      Line line;
      for (int j = 0; j < 4; ++j) line.word[j] = as_bits(static_cast<float>(from[4 * i + j]));
      store(lines + i, line);
    }
  } else if constexpr (V % 8 == 0) {
    CUDFAST_UNROLL
    for (int i = 0; i < V / 8; ++i) {
      Line line;
      CUDFAST_UNROLL
      for (int j = 0; j < 4; ++j) {
        line.word[j] = narrow_pair(static_cast<float>(from[8 * i + 2 * j]), static_cast<float>(from[8 * i + 2 * j + 1]),
                                   dtype == DType::bf16);
      }
      store(lines + i, line);
    }
  }
}

// Copies 16 bytes from global to shared memory, some time before wait_for_copies() lets the thread read them; the
// emulation copies at once.
CUDFAST_KERNEL void copy(char* to, const char* from) {
#if !defined(__CUDACC__)
  memcpy(to, from, 16);
#elif __CUDA_ARCH__ >= 800
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
  __trap();  // plans use no copies for these architectures
#endif
}
// Copies so far become one group; wait_for_copies() waits for all groups of this thread except the last `Later`.
CUDFAST_KERNEL void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int Later>
CUDFAST_KERNEL void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Later) : "memory");
#endif
}

// D: the dtype, or kAny.
template <int D>
struct RowOf {
  char* data;
  int64_t columns;
  DType stored;

  // A launch has less than 2^31 rows: the division is one of 32 bits.
  CUDFAST_KERNEL RowOf(const Matrix& m, int row, int64_t n) : columns(n), stored(m.dtype) {
    const int outer = row / static_cast<int>(m.inner), inner = row - outer * static_cast<int>(m.inner);
    data = m.data + (outer * m.outer_stride + inner * m.inner_stride) * size_of(dtype());
  }
  CUDFAST_HD DType dtype() const { return D == kAny ? stored : static_cast<DType>(D); }

  // Elements from the last line boundary of V elements to the row's first.
  template <int V>
  CUDFAST_KERNEL int shift() const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(data) / static_cast<unsigned>(size_of(dtype())) % V);
  }

  template <class R>
  CUDFAST_KERNEL R load(int64_t column) const {
    CUDFAST_CHECK(column >= 0 && column < columns);
    if (dtype() == DType::f64) return static_cast<R>(reinterpret_cast<const double*>(data)[column]);
    if (dtype() == DType::f32) return static_cast<R>(reinterpret_cast<const float*>(data)[column]);
    float low, high;
    widen_pair(reinterpret_cast<const uint16_t*>(data)[column], dtype() == DType::bf16, low, high);
    return static_cast<R>(low);
  }
  template <class R>
  CUDFAST_KERNEL void store(int64_t column, R value) const {
    CUDFAST_CHECK(column >= 0 && column < columns);
    if (dtype() == DType::f64) {
      reinterpret_cast<double*>(data)[column] = static_cast<double>(value);
    } else if (dtype() == DType::f32) {
      reinterpret_cast<float*>(data)[column] = static_cast<float>(value);
    } else {
      const uint32_t word = narrow_pair(static_cast<float>(value), 0.0f, dtype() == DType::bf16);
      reinterpret_cast<uint16_t*>(data)[column] = static_cast<uint16_t>(word);
    }
  }

  // Address of V elements that are whole lines.
  template <int V>
  CUDFAST_KERNEL char* lines(int64_t column) const {
    char* const at = data + column * size_of(dtype());
    CUDFAST_CHECK(column >= 0 && column + V <= columns && reinterpret_cast<uintptr_t>(at) % 16 == 0);
    return at;
  }
};

}  // namespace
}  // namespace cudfast
