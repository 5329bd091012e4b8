// A block of columns as lanes: its range, its last, partial vector, and the temperature as a compile-time number.
#pragma once

#include "../row/element.h"
#include "simd.h"
#include "sweeps.h"

namespace cudfast {
namespace {

template <class T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::f32 : DType::f64;

// The logit in columns that are summed separately: finite, so that they are not holes, and so low that exp gives 0.
template <class T>
constexpr T kApart = T(-1e30);

template <class T>
struct Range {
  T low, high;
  // Whether a centred value times inv_tau may be -inf, by the logits or by overflow. NaN needs no check: sums keep it.
  bool holes(double inv_tau = 1) const {
    return !((low - high) * static_cast<T>(inv_tau) > -std::numeric_limits<T>::max());
  }
  T centre() const { return high == kNothing<T> ? T(0) : high; }
};

// A block of columns as T: in place if it has that type, else converted into `buffer` (kBlock values). The last,
// partial vector is separate: its lanes past the end repeat its first value, which does not change maximum and minimum,
// and are masked out of sums.
template <class T>
struct Columns {
  static constexpr int width = Lanes<T>::count;
  const T* data;
  int whole;  // columns in whole vectors
  int rest;   // columns in the last one

  Columns(T* at, int n) : data(at), whole(n / width * width), rest(n - whole) {}
  Columns(const char* from, DType dtype, int n, T* buffer, const View& view = {})
      : data(reinterpret_cast<const T*>(from)), whole(n / width * width), rest(n - whole) {
    if (dtype == dtype_of<T> && view.plain()) return;
    widen(from, dtype, n, buffer);
    data = buffer;
    if (view.beta != 1) {
      const T centre = static_cast<T>(view.centre), beta = static_cast<T>(view.beta);
      for (int i = 0; i < n; ++i) buffer[i] = (buffer[i] - centre) * beta;
    }
    mask(buffer, view, kApart<T>);
  }
  static void mask(T* buffer, const View& view, T value) {
    for (const auto& list : view.apart) {
      for (const int64_t* at = list[0]; at != list[1]; ++at) buffer[*at - view.column] = value;
    }
  }
  Lanes<T> at(int i) const { return Lanes<T>::load(data + i); }
  Lanes<T> last() const { return load_some(data + whole, rest, data[whole]); }
};

// at(i): the vector at column i, called once.
template <class T, class F>
inline __attribute__((always_inline)) Range<T> range(const Columns<T>& columns, F at) {
  using L = Lanes<T>;
  L high(kNothing<T>), low(-kNothing<T>), high2 = high, low2 = low;
  int i = 0;
  for (; i + 2 * L::count <= columns.whole; i += 2 * L::count) {
    const L a = at(i), b = at(i + L::count);
    high = max(a, high);
    low = min(a, low);
    high2 = max(b, high2);
    low2 = min(b, low2);
  }
  if (i < columns.whole) {
    const L a = at(i);
    high = max(a, high);
    low = min(a, low);
  }
  if (columns.rest > 0) {
    high2 = max(columns.last(), high2);
    low2 = min(columns.last(), low2);
  }
  return {lowest(min(low, low2)), highest(max(high, high2))};
}

template <class T>
__attribute__((noinline)) Range<T> range(const Columns<T>& columns) {
  return range(columns, [&](int i) __attribute__((always_inline)) { return columns.at(i); });
}

// The range of columns stored in 16 bits, which are also widened into `buffer`.
__attribute__((noinline)) Range<float> widened_range(const Columns<float>& columns, const char* from, DType dtype,
                                                     float* buffer) {
  const uint16_t* const halves = reinterpret_cast<const uint16_t*>(from);
  widen(halves + columns.whole, dtype, columns.rest, buffer + columns.whole);
  const auto widened = [&](auto lanes) __attribute__((always_inline)) {
    return range(columns, [=](int i) __attribute__((always_inline)) {
      const Lanes<float> found = lanes(load_halves(halves + i));
      found.store(buffer + i);
      return found;
    });
  };
  return dtype == DType::bf16 ? widened([](Halves x) { return from_bfloats(x); })
                              : widened([](Halves x) { return from_halves(x); });
}

// A block and its range.
template <class T>
struct Looked {
  Columns<T> columns;
  Range<T> range;
};
template <class T>
Looked<T> looked(const char* from, DType dtype, int n, T* buffer, const View& view = {}) {
  if constexpr (sizeof(T) == 4) {
    if (size_of(dtype) == 2 && view.plain()) {
      const Columns<T> columns(buffer, n);
      return {columns, widened_range(columns, from, dtype, buffer)};
    }
  }
  const Columns<T> columns(from, dtype, n, buffer, view);
  return {columns, range(columns)};
}

// The weights of a block's classes; 1 if there are none.
template <class T>
struct Weights {
  using F = Lanes<T>;
  const T* data;

  explicit Weights(const char* from) : data(reinterpret_cast<const T*>(from)) {}
  __attribute__((always_inline)) F at(int i) const { return data ? F::load(data + i) : F(1); }
  F some(int first, int count) const { return data ? load_some(data + first, count, T(0)) : F(1); }
};

// Lanes of the last vector that are columns keep their value, the others become -inf.
template <class T>
Lanes<T> only(Lanes<T> lanes, int valid) {
  alignas(64) static constexpr T kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(Lanes<T>(valid) > Lanes<T>::load(kIndex), lanes, Lanes<T>(kNothing<T>));
}

// A run-time power becomes a compile-time one here: f(P, N) as integral constants.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int N, class F>
inline __attribute__((always_inline)) void with_power(int power, F f) {
  if (power == 1) return f(Constant<1>{}, Constant<N>{});
  if (power == 2) return f(Constant<2>{}, Constant<N>{});
  if (power == 4) return f(Constant<4>{}, Constant<N>{});
  return f(Constant<0>{}, Constant<N>{});
}

}  // namespace
}  // namespace cudfast
