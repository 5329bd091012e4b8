// The lane type: the only file with SIMD code.
//
// Lanes<T> is one hardware vector of float or double: 64 bytes with AVX-512, 32 with AVX2, else 16 (SSE2, NEON). The
// arithmetic is the compiler's vector extension, so most of this file is the same for every instruction set; intrinsics
// are used where they save instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../halves.h"
#include "../launch.h"

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace cudfast {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define CUDFAST_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define CUDFAST_VECTOR_BYTES 32
#else
#define CUDFAST_VECTOR_BYTES 16
#endif

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(CUDFAST_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(CUDFAST_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(CUDFAST_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(CUDFAST_VECTOR_BYTES)));
};

template <class T>
struct Lanes {
  using V = typename Vector<T>::type;
  static constexpr int count = CUDFAST_VECTOR_BYTES / sizeof(T);
  V v;

  Lanes() = default;
  Lanes(V lanes) : v(lanes) {}
  template <class U>
  explicit Lanes(U scalar) : v(static_cast<T>(scalar) - V{}) {}

  static Lanes load(const T* from) {
    Lanes out;
    std::memcpy(&out.v, from, sizeof(V));
    return out;
  }
  void store(T* to) const { std::memcpy(to, &v, sizeof(V)); }
};

// Whether vectors can be stored past the caches, a line or half a line at a time; `to`: multiple of the vector's size.
constexpr bool kStreams = CUDFAST_VECTOR_BYTES == 64;
template <class V>
inline void stream(V vector, char* to) {
#if CUDFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)vector);
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)vector);
#endif
  std::memcpy(to, &vector, sizeof(V));
}

template <class T>
inline Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {
  return a.v + b.v;
}
template <class T>
inline Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {
  return a.v - b.v;
}
template <class T>
inline Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {
  return a.v * b.v;
}

// Comparisons set all bits or none of a lane; select returns `yes` in lanes whose bits are set.
template <class T>
inline typename Vector<T>::bits operator>(Lanes<T> a, Lanes<T> b) {
  return a.v > b.v;
}
template <class T>
inline typename Vector<T>::bits operator==(Lanes<T> a, Lanes<T> b) {
  return a.v == b.v;
}
template <class T>
inline Lanes<T> select(typename Vector<T>::bits mask, Lanes<T> yes, Lanes<T> no) {
  return mask ? yes.v : no.v;
}

// max(a, b) and min(a, b) are b if either is NaN, as in the x86 instructions.
template <class T>
inline Lanes<T> max(Lanes<T> a, Lanes<T> b) {
  return a.v > b.v ? a.v : b.v;
}
template <class T>
inline Lanes<T> min(Lanes<T> a, Lanes<T> b) {
  return a.v < b.v ? a.v : b.v;
}
#if CUDFAST_VECTOR_BYTES == 64
inline Lanes<float> max(Lanes<float> a, Lanes<float> b) {
  return (Vector<float>::type)_mm512_max_ps((__m512)a.v, (__m512)b.v);
}
inline Lanes<float> min(Lanes<float> a, Lanes<float> b) {
  return (Vector<float>::type)_mm512_min_ps((__m512)a.v, (__m512)b.v);
}
#elif CUDFAST_VECTOR_BYTES == 32
inline Lanes<float> max(Lanes<float> a, Lanes<float> b) {
  return (Vector<float>::type)_mm256_max_ps((__m256)a.v, (__m256)b.v);
}
inline Lanes<float> min(Lanes<float> a, Lanes<float> b) {
  return (Vector<float>::type)_mm256_min_ps((__m256)a.v, (__m256)b.v);
}
#elif defined(__SSE2__)
inline Lanes<float> max(Lanes<float> a, Lanes<float> b) {
  return (Vector<float>::type)_mm_max_ps((__m128)a.v, (__m128)b.v);
}
inline Lanes<float> min(Lanes<float> a, Lanes<float> b) {
  return (Vector<float>::type)_mm_min_ps((__m128)a.v, (__m128)b.v);
}
#endif

// First lane where a == b, or -1.
template <class T>
inline int first_equal(Lanes<T> a, Lanes<T> b) {
  const auto mask = a.v == b.v;
  for (int lane = 0; lane < Lanes<T>::count; ++lane) {
    if (mask[lane]) return lane;
  }
  return -1;
}
#if CUDFAST_VECTOR_BYTES == 64
inline int first_equal(Lanes<float> a, Lanes<float> b) {
  const unsigned mask = _mm512_cmp_ps_mask((__m512)a.v, (__m512)b.v, _CMP_EQ_OQ);
  return mask ? __builtin_ctz(mask) : -1;
}
#elif CUDFAST_VECTOR_BYTES == 32
inline int first_equal(Lanes<float> a, Lanes<float> b) {
  const int mask = _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.v, (__m256)b.v, _CMP_EQ_OQ));
  return mask ? __builtin_ctz(static_cast<unsigned>(mask)) : -1;
}
#endif

// ---- Parts of a vector ----

// Loads the first `valid` lanes, the others are `fill`; and stores them, without access to memory past them.
template <class T>
inline Lanes<T> load_some(const T* from, int valid, T fill) {
  T lanes[Lanes<T>::count];
  Lanes<T>(fill).store(lanes);
  std::memcpy(lanes, from, static_cast<size_t>(valid) * sizeof(T));
  return Lanes<T>::load(lanes);
}
template <class T>
inline void store_some(Lanes<T> from, int valid, T* to) {
  T lanes[Lanes<T>::count];
  from.store(lanes);
  std::memcpy(to, lanes, static_cast<size_t>(valid) * sizeof(T));
}

// Reduces all lanes to one value of type R, as a tree.
template <class R, class T, class Op>
inline R reduce(Lanes<T> lanes, Op op) {
  constexpr int count = Lanes<T>::count;
  T stored[count];
  lanes.store(stored);
  R values[count];
  for (int i = 0; i < count; ++i) values[i] = static_cast<R>(stored[i]);
  for (int half = count / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] = op(values[i], values[i + half]);
  }
  return values[0];
}
template <class T>
inline T highest(Lanes<T> lanes) {
  return reduce<T>(lanes, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
inline T lowest(Lanes<T> lanes) {
  return reduce<T>(lanes, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
inline double total(Lanes<T> lanes) {
  return reduce<double>(lanes, [](double a, double b) { return a + b; });
}

// The same for f32 in registers, for short rows, where reductions take most of the time. The tree and thus the result
// are the same.
#if CUDFAST_VECTOR_BYTES == 64
inline Lanes<float> load_some(const float* from, int valid, float fill) {
  const __mmask16 mask = static_cast<__mmask16>((1u << valid) - 1);
  return (Vector<float>::type)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, from);
}
inline void store_some(Lanes<float> from, int valid, float* to) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << valid) - 1), (__m512)from.v);
}
inline float highest(Lanes<float> lanes) { return _mm512_reduce_max_ps((__m512)lanes.v); }
inline float lowest(Lanes<float> lanes) { return _mm512_reduce_min_ps((__m512)lanes.v); }
inline double total(Lanes<float> lanes) {
  const __m512 v = (__m512)lanes.v;
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  return _mm512_reduce_add_pd(low + high);
}
#elif CUDFAST_VECTOR_BYTES == 32
inline __m256i first_lanes(int valid) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(valid), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Lanes<float> load_some(const float* from, int valid, float fill) {
  const __m256i mask = first_lanes(valid);
  const __m256 some = _mm256_maskload_ps(from, mask);
  return (Vector<float>::type)_mm256_blendv_ps(_mm256_set1_ps(fill), some, _mm256_castsi256_ps(mask));
}
inline void store_some(Lanes<float> from, int valid, float* to) {
  _mm256_maskstore_ps(to, first_lanes(valid), (__m256)from.v);
}
inline float highest(Lanes<float> lanes) {
  const __m256 v = (__m256)lanes.v;
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float lowest(Lanes<float> lanes) {
  const __m256 v = (__m256)lanes.v;
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline double total(Lanes<float> lanes) {
  const __m256 v = (__m256)lanes.v;
  const __m256d four = _mm256_cvtps_pd(_mm256_castps256_ps128(v)) + _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}
#endif

// ---- exp ----
//
// x = n ln 2 + r with |r| <= ln(2) / 2, ln 2 in two pieces whose first product with n is exact, e^r by a polynomial,
// 2^n put together in the exponent bits. n comes from adding 1.5 * 2^(mantissa bits), which rounds to nearest.
//
//            range of x          error (ULP, measured by tests/test_native.py)   -inf   NaN
//   float    [-87.33, 88.37]     <= kExpUlp<float>                                0      NaN
//   double   [-708.39, 709.43]   <= kExpUlp<double>                               0      NaN
//
// Below the range x is clamped to ExpTable::lowest, where n makes the exponent bits and thus the result 0; in between
// the result is subnormal. Above the range the result is unspecified: the sweeps only use x <= 0.
template <class T>
struct ExpTable;

template <>
struct ExpTable<float> {
  static constexpr float lowest = -88.03f;  // n = -127
  static constexpr float round = 0x1.8p23f;
  static constexpr int mantissa = 23;
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_hi = 0x1.62ep-1f;
  static constexpr float ln2_lo = 0x1.0bfbe8p-15f;
  // Minimax for (e^r - 1 - r) / r^2 under the relative error of e^r, fitted by reweighted least squares: 0.06 ULP.
  static constexpr float coefficient[] = {0x1.6a23d0p-10f, 0x1.123a20p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f,
                                          0x1.fffffcp-2f};
};

template <>
struct ExpTable<double> {
  static constexpr double lowest = -709.09;  // n = -1023
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa = 52;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_hi = 0x1.62e42fefa4p-1;
  static constexpr double ln2_lo = -0x1.8432a1b0e2634p-43;
  // 1/13! ... 1/2!: the Taylor remainder is 4e-18 at the ends.
  static constexpr double coefficient[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                           1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                           1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
};

template <class T>
constexpr double kExpUlp = 1.5;

template <class T>
inline __attribute__((always_inline)) Lanes<T> exp(Lanes<T> x) {
  using V = typename Vector<T>::type;
  using Bits = typename Vector<T>::bits;
  using E = ExpTable<T>;
  const V within = max(Lanes<T>(E::lowest), x).v;  // NaN remains NaN
  const V shifted = within * E::log2e + E::round;
  const V n = shifted - E::round;
  V r = within - n * E::ln2_hi;
  r = r - n * E::ln2_lo;
  V p = E::coefficient[0] - V{};
  for (unsigned i = 1; i < sizeof(E::coefficient) / sizeof(T); ++i) p = p * r + E::coefficient[i];
  p = (p * r + T(1)) * r + T(1);
  const V two_n = (V)(((Bits)shifted << E::mantissa) + (Bits)(T(1) - V{}));
  return p * two_n;  // a product, so that NaN stays NaN
}

#if CUDFAST_VECTOR_BYTES == 32
// With AVX2, multiply-adds limit the speed, not shuffles: x = (n + j / 8) ln 2 + r, |r| <= ln(2) / 16, needs a cubic,
// and 2^(j/8) is one of eight numbers in a register. `eighths` holds their bits less j << 20, which is what the bits of
// 8 n + j add to them when they are shifted to the exponent.
struct ExpEighths : ExpTable<float> {
  // Minimax for (e^r - 1) / r, 1 + c[1] r + c[0] r^2, as above: 0.21 ULP.
  static constexpr float coefficient[] = {0x1.5548e8p-3f, 0x1.000888p-1f};
  alignas(32) static constexpr int32_t eighths[] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                    0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
};

inline __attribute__((always_inline)) Lanes<float> exp(Lanes<float> x) {
  using V = typename Vector<float>::type;
  using E = ExpEighths;
  const V within = max(Lanes<float>(E::lowest), x).v;
  const V shifted = within * (8 * E::log2e) + E::round;
  const V n = shifted - E::round;
  V r = within - n * (E::ln2_hi / 8);
  r = r - n * (E::ln2_lo / 8);
  const __m256i eighths = _mm256_load_si256(reinterpret_cast<const __m256i*>(E::eighths));
  const __m256i bits = (__m256i)shifted;
  const __m256i two_n = _mm256_permutevar8x32_epi32(eighths, bits);  // by the lowest three bits of each
  const V scale = (V)_mm256_add_epi32(two_n, _mm256_slli_epi32(bits, E::mantissa - 3));
  const V q = ((r * E::coefficient[0] + E::coefficient[1]) * r + 1.0f) * r;
  return scale * q + scale;
}
#endif

// ---- Conversions between stored and computed types ----

// A vector of 16-bit values, widened; and back.
typedef uint16_t Halves __attribute__((vector_size(CUDFAST_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(CUDFAST_VECTOR_BYTES)));

inline Halves load_halves(const uint16_t* from) {
  Halves lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// widened(): g++ 12 splits a conversion of vectors.
#if CUDFAST_VECTOR_BYTES == 64
inline Bits32 widened(Halves from) { return (Bits32)_mm512_cvtepu16_epi32((__m256i)from); }
inline Halves narrowed(Bits32 from) { return (Halves)_mm512_cvtepi32_epi16((__m512i)from); }
inline Lanes<float> from_halves(Halves from) { return (Vector<float>::type)_mm512_cvtph_ps((__m256i)from); }
inline Halves to_halves(Lanes<float> from) {
  return (Halves)_mm512_cvtps_ph((__m512)from.v, _MM_FROUND_TO_NEAREST_INT);
}
#elif CUDFAST_VECTOR_BYTES == 32
inline Bits32 widened(Halves from) { return (Bits32)_mm256_cvtepu16_epi32((__m128i)from); }
inline Halves narrowed(Bits32 from) {
  const __m256i v = (__m256i)from;
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
inline Lanes<float> from_halves(Halves from) { return (Vector<float>::type)_mm256_cvtph_ps((__m128i)from); }
inline Halves to_halves(Lanes<float> from) {
  return (Halves)_mm256_cvtps_ph((__m256)from.v, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline Bits32 widened(Halves from) { return __builtin_convertvector(from, Bits32); }
inline Halves narrowed(Bits32 from) { return __builtin_convertvector(from, Halves); }
inline Lanes<float> from_halves(Halves from) {
  Lanes<float> to;
  for (int i = 0; i < Lanes<float>::count; ++i) to.v[i] = widen_half(from[i]);
  return to;
}
inline Halves to_halves(Lanes<float> from) {
  Halves to;
  for (int i = 0; i < Lanes<float>::count; ++i) to[i] = narrow_half(from.v[i]);
  return to;
}
#endif

inline Lanes<float> from_bfloats(Halves from) { return (Vector<float>::type)(widened(from) << 16); }
// Round to nearest even in every lane, as narrow_bfloat; a NaN, which arithmetic made, is quiet already.
inline Halves to_bfloats(Lanes<float> lanes) {
  const Bits32 bits = (Bits32)lanes.v;
  const Bits32 up = (lanes.v == lanes.v) ? 0x7fffu + ((bits >> 16) & 1u) : Bits32{};
  return narrowed((bits + up) >> 16);
}

// n stored values -> n computed ones.
template <class T>
inline void widen(const void* from, DType dtype, int n, T* to) {
  if (dtype == DType::f32) {
    const float* f = static_cast<const float*>(from);
    for (int i = 0; i < n; ++i) to[i] = static_cast<T>(f[i]);
  } else if (dtype == DType::f64) {
    const double* f = static_cast<const double*>(from);
    for (int i = 0; i < n; ++i) to[i] = static_cast<T>(f[i]);
  } else {
    const uint16_t* f = static_cast<const uint16_t*>(from);
    const auto each = [&](auto lanes, auto one) __attribute__((always_inline)) {
      int i = 0;
      if constexpr (sizeof(T) == 4) {
        for (; i + Lanes<T>::count <= n; i += Lanes<T>::count) lanes(load_halves(f + i)).store(to + i);
      }
      for (; i < n; ++i) to[i] = static_cast<T>(one(f[i]));
    };
    dtype == DType::bf16 ? each([](Halves x) { return from_bfloats(x); }, [](uint16_t x) { return widen_bfloat(x); })
                         : each([](Halves x) { return from_halves(x); }, [](uint16_t x) { return widen_half(x); });
  }
}

// n computed values -> n stored ones.
template <class T>
inline void narrow(const T* from, int n, DType dtype, void* to) {
  if (dtype == DType::f32) {
    float* f = static_cast<float*>(to);
    for (int i = 0; i < n; ++i) f[i] = static_cast<float>(from[i]);
  } else if (dtype == DType::f64) {
    double* f = static_cast<double*>(to);
    for (int i = 0; i < n; ++i) f[i] = static_cast<double>(from[i]);
  } else if (dtype == DType::bf16) {
    uint16_t* f = static_cast<uint16_t*>(to);
    for (int i = 0; i < n; ++i) f[i] = narrow_bfloat(static_cast<float>(from[i]));
  } else {
    uint16_t* f = static_cast<uint16_t*>(to);
    int i = 0;
    if constexpr (sizeof(T) == 4) {
      constexpr int width = Lanes<T>::count;
      for (; i + width <= n; i += width) {
        const Halves lanes = to_halves(Lanes<T>::load(from + i));
        std::memcpy(f + i, &lanes, sizeof lanes);
      }
    }
    for (; i < n; ++i) f[i] = narrow_half(static_cast<float>(from[i]));
  }
}

}  // namespace
}  // namespace cudfast
