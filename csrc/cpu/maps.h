// The second sweep over a block: the gradient of its columns from the coefficients of the row, by the maps of row/.
#pragma once

#include "columns.h"

namespace cudfast {
namespace {

// Writes body(i) for every whole vector of a block and tail() for the last, partial one, in the gradient's own type.
// body captures by value, since stores may alias its inputs.
template <class T, class Map, class Body, class Tail>
inline __attribute__((always_inline)) void map(int n, const Map& m, Body body, Tail tail) {
  constexpr int width = Lanes<T>::count;
  const int whole = n / width * width;
  const DType dtype = m.g_dtype;
  char* const g = m.g;
  alignas(64) T buffer[width];
  const auto each = [&](auto narrowed) __attribute__((always_inline)) {
    if (kStreams && m.stream) {
      for (int i = 0; i < whole; i += width) stream(narrowed(body(i)), g + i * size_of(dtype));
    } else {
      for (int i = 0; i < whole; i += width) {
        const auto lanes = narrowed(body(i));
        std::memcpy(g + i * size_of(dtype), &lanes, sizeof lanes);
      }
    }
  };
  if (dtype == dtype_of<T>) {
    each([](Lanes<T> x) { return x.v; });
  } else if constexpr (sizeof(T) == 4) {  // a float64 gradient is computed in float64, so this one has 16 bits
    dtype == DType::bf16 ? each([](Lanes<T> x) { return to_bfloats(x); })
                         : each([](Lanes<T> x) { return to_halves(x); });
  } else {
    for (int i = 0; i < whole; i += width) {
      body(i).store(buffer);
      narrow(buffer, width, dtype, g + i * size_of(dtype));
    }
  }
  if (whole == n) return;
  if (dtype == dtype_of<T>) {
    store_some(tail(), n - whole, reinterpret_cast<T*>(g) + whole);
  } else {
    tail().store(buffer);
    narrow(buffer, n - whole, dtype, g + whole * size_of(dtype));
  }
}

// Coefficients as lanes: C is StudentGradient or StudentLogGradient.
template <class F>
void lanes_of(const StudentBlockMap& m, StudentGradient<F>& c) {
  c = {F(m.student_tau), F(m.teacher_tau), F(m.student_one)};
}
template <class F>
void lanes_of(const StudentBlockMap& m, StudentLogGradient<F>& c) {
  c = {{F(m.student_tau), F(m.teacher_tau), F(m.student_one)}, F(m.student_log), F(m.log_z)};
}

template <template <class> class C, class T, int P, bool One, bool Holes>
__attribute__((noinline)) void student_map(const StudentBlock& b, const StudentBlockMap& m) {
  using F = Lanes<T>;
  alignas(64) T s_buffer[kBlock], t_buffer[kBlock];
  const Columns<T> s(b.s, b.s_dtype, b.n, s_buffer), t(b.t, b.t_dtype, b.n, t_buffer, b.view);
  C<F> c;
  lanes_of(m, c);
  const F ms(m.m_s), mt(m.m_t), inv(b.inv_tau);
  // Memory limits this sweep if the row is longer than the cache: prefetch some lines ahead in all three streams.
  constexpr int ahead = 512;
  const int64_t s_size = size_of(b.s_dtype), t_size = size_of(b.t_dtype), g_size = m.stream ? 0 : size_of(m.g_dtype);
  const char *const next_s = b.s + ahead * s_size, *const next_t = b.t + ahead * t_size;
  // A gradient written past the caches must not be prefetched: prefetch a line of the stack instead.
  const char* const next_g = m.stream ? reinterpret_cast<const char*>(t_buffer) : m.g + ahead * g_size;
  const T *const at_s = s.data, *const at_t = t.data;
  map<T>(
      b.n, m,
      [=](int i) __attribute__((always_inline)) {
        __builtin_prefetch(next_s + i * s_size);
        __builtin_prefetch(next_t + i * t_size);
        __builtin_prefetch(next_g + i * g_size, 1);
        return element<P, One, Holes>(c, F::load(at_t + i) - mt, F::load(at_s + i) - ms, inv);
      },
      [&] { return element<P, One, Holes>(c, t.last() - mt, s.last() - ms, inv); });
}

template <class T, int P>
__attribute__((noinline)) void student_map_kept(const StudentBlock& b, const StudentBlockMap& m) {
  using F = Lanes<T>;
  StudentGradient<F> c;
  lanes_of(m, c);
  const T* const kept_t = reinterpret_cast<const T*>(b.kept.teacher);
  const T* const kept_s = reinterpret_cast<const T*>(b.kept.student);
  const int whole = b.n / F::count * F::count, rest = b.n - whole;
  map<T>(
      b.n, m,
      [=](int i) __attribute__((always_inline)) {
        return element<P>(c, Exponentials<F>{F::load(kept_t + i), F::load(kept_s + i)}, F(0));
      },
      [&] {
        return element<P>(
            c, Exponentials<F>{load_some(kept_t + whole, rest, T(0)), load_some(kept_s + whole, rest, T(0))}, F(0));
      });
}

// With the share of log p_j, for which the student's logits are read again.
template <class T, int P>
__attribute__((noinline)) void student_map_kept_log(const StudentBlock& b, const StudentBlockMap& m) {
  using F = Lanes<T>;
  alignas(64) T s_buffer[kBlock];
  const Columns<T> s(b.s, b.s_dtype, b.n, s_buffer);
  StudentLogGradient<F> c;
  lanes_of(m, c);
  const F ms(m.m_s);
  const T* const kept_t = reinterpret_cast<const T*>(b.kept.teacher);
  const T* const kept_s = reinterpret_cast<const T*>(b.kept.student);
  const T* const at_s = s.data;
  map<T>(
      b.n, m,
      [=](int i) __attribute__((always_inline)) {
        return element<P>(c, Exponentials<F>{F::load(kept_t + i), F::load(kept_s + i)}, F::load(at_s + i) - ms);
      },
      [&] {
        const Exponentials<F> e{load_some(kept_t + s.whole, s.rest, T(0)), load_some(kept_s + s.whole, s.rest, T(0))};
        return element<P>(c, e, s.last() - ms);
      });
}

template <class T>
void student_gradient(const StudentBlock& b, const StudentBlockMap& m) {
  with_power<0>(b.power, [&](auto p, auto) {
    constexpr int P = decltype(p)::value;
    if constexpr (P > 0) {
      if (b.kept.teacher) return m.student_log != 0 ? student_map_kept_log<T, P>(b, m) : student_map_kept<T, P>(b, m);
    } else {
      if (b.needs == 0) {
        return m.holes ? student_map<StudentGradient, T, P, false, true>(b, m)
                       : student_map<StudentGradient, T, P, false, false>(b, m);
      }
    }
    if (m.student_log != 0) {
      return m.holes ? student_map<StudentLogGradient, T, P, true, true>(b, m)
                     : student_map<StudentLogGradient, T, P, true, false>(b, m);
    }
    m.holes ? student_map<StudentGradient, T, P, true, true>(b, m)
            : student_map<StudentGradient, T, P, true, false>(b, m);
  });
}

template <class T>
void teacher_gradient(const TeacherBlock& b, const TeacherBlockMap& m) {
  using F = Lanes<T>;
  alignas(64) T buffer[kBlock];
  const Columns<T> s(b.s, b.dtype, b.n, buffer);
  const TeacherGradient<F> c{F(m.one), F(m.log)};
  const F centre(m.m_s), inv_z(m.inv_z), log_z(m.log_z);
  const T* const at = s.data;
  map<T>(
      b.n, m, [=](int i) __attribute__((always_inline)) { return element(c, F::load(at + i) - centre, inv_z, log_z); },
      [&] { return element(c, s.last() - centre, inv_z, log_z); });
}

}  // namespace
}  // namespace cudfast
