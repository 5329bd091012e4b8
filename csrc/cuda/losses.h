// Rows with and without a target for kernels.h: fold a chunk of a row, merge relative to the block's maxima, finish,
// map a chunk. D is the dtype of all logits, or kAny; R is the computing type.
#pragma once

#include "../finish.h"
#include "call.h"
#include "elements.h"
#include "lane.h"

namespace cudfast {
namespace {

CUDFAST_KERNEL float larger(float a, float b) { return fmaxf(a, b); }  // ignores a NaN, which the sums keep
CUDFAST_KERNEL double larger(double a, double b) { return fmax(a, b); }

template <class R>
CUDFAST_KERNEL R centred(R m) {
  return m == kNothing<R> ? R(0) : m;
}

CUDFAST_KERNEL double upstream_of(const Call& call, bool wide, int row) {
  return call.upstream.data ? get(call.upstream.data, wide, call.upstream.per_row ? row : 0) : 1.0;
}

// Whether a sum contains -inf or NaN: then its chunk is folded again, by the code that distinguishes them.
template <class R>
CUDFAST_KERNEL bool broken(R sum) {
  return !(sum - sum == 0);
}

// A chunk is one line of 16 bytes; for dtypes that are unknown at compile time, eight elements.
template <int D>
constexpr int kChunk = D == kAny ? 8 : static_cast<int>(16 / size_of(static_cast<DType>(D)));

// The inputs of a row's map besides its gradient's coefficients.
template <class R>
struct Fixed {
  bool counts;
  int64_t column[2];
  R value[2];
};

template <class R>
CUDFAST_KERNEL void set(Fixed<R>& to, const Fixes& f, bool counts) {
  to.counts = counts;
  for (int i = 0; i < 2; ++i) {
    to.column[i] = f.column[i];
    to.value[i] = static_cast<R>(f.value[i]);
  }
}

template <class R>
struct StudentMap : Fixed<R> {
  StudentLogGradient<R> c;
  R c_s, c_t, inv_tau;
};

template <class R>
CUDFAST_KERNEL void set(StudentMap<R>& map, const StudentState<double>& state, const RowEnd<double>& end,
                        const Fixes& f, const Marks& m) {
  set(map, f, end.counts);
  map.c = {{static_cast<R>(end.gradient.student_tau), static_cast<R>(end.gradient.teacher_tau),
            static_cast<R>(end.student_one)},
           static_cast<R>(end.student_log),
           static_cast<R>(end.log_z)};
  map.c_s = static_cast<R>(centred(state.m_s));
  map.c_t = static_cast<R>(centred(state.m_t));
  map.inv_tau = static_cast<R>(1 / m.temperature);
}

template <class R>
struct TeacherMap : Fixed<R> {
  TeacherGradient<R> c;
  R centre, inv_z, log_z;
};

template <class R>
CUDFAST_KERNEL void set(TeacherMap<R>& map, const TeacherState<double>& state, const RowEnd<double>& end,
                        const Fixes& f, const Marks&) {
  set(map, f, end.counts);
  map.c = {static_cast<R>(end.gradient.one), static_cast<R>(end.gradient.log)};
  map.centre = static_cast<R>(centred(state.m_s));
  map.inv_z = static_cast<R>(1 / state.s_one);
  map.log_z = static_cast<R>(end.log_z);
}

// state and end are shared memory: a kernel would not have the registers.
template <class State>
CUDFAST_KERNEL void end_of(const Call& call, const Terms& terms, int row, const Marks& m, bool wide, const State& state,
                           RowEnd<double>& end) {
  end = {};
  finish_row(state, m.labelled, m.temperature, row_weights(m.ignored, m.labelled, m.weight), terms,
             {call.divisors[0], call.divisors[1]}, call.rows.coefficients_at(row), upstream_of(call, wide, row), end);
}

// A row whose top-1 leaves would have to be summed again (row/target.h). These kernels do not do that: it becomes NaN.
CUDFAST_KERNEL void refuse_leaving(const Terms& terms, const Marks& m, const StudentState<double>& state,
                                          RowEnd<double>& end) {
  if (!(m.temperature < terms.leaving)) return;
  if (!leaves(state, end.target.clip, inverse_of(terms, m.temperature))) return;
  end.value = end.gradient.student_tau = std::numeric_limits<double>::quiet_NaN();
}
CUDFAST_KERNEL void refuse_leaving(const Terms&, const Marks&, const TeacherState<double>&, RowEnd<double>&) {}

// The end of a row, and the inputs of its map.
template <class State, class Map>
CUDFAST_KERNEL void finish(const Call& call, const Terms& terms, int row, bool wide, const State& state,
                           RowEnd<double>& end, Map& map) {
  const Marks m = marks(call.rows, row);
  end_of(call, terms, row, m, wide, state, end);
  refuse_leaving(terms, m, state, end);
  set(map, state, end, fixes(state, end, m.label, m.temperature), m);
}

// P: the temperature if it is known at compile time, else 0.
template <int P, int D, class R_>
struct Student {
  using R = R_;
  using F = typename LaneOf<R>::type;
  using State = StudentState<double>;
  using Part = StudentState<R>;  // of a thread; k is the chunk that contains its maximum
  static constexpr int dtype = D, arrays = 2, chunk = kChunk<D>;
  using Values = R[arrays][chunk];  // the student's, the teacher's

  Terms terms;

  template <int Needs, int Holes>
  CUDFAST_KERNEL static StudentSums<F> sums_of(const Values& v, R c_s, R c_t, R inv_tau) {
    StudentSums<F> sums{F(0), F(0), F(0), F(0), F(0), F(0), F(0), F(0)};
    CUDFAST_UNROLL
    for (int j = 0; j < chunk; ++j) {
      cudfast::fold<P, Needs, Holes>(sums, F(v[1][j] - c_t), F(v[0][j] - c_s), F(inv_tau));
    }
    return sums;
  }
  // needs: a mask of Needs, the same for all threads.
  template <int Holes>
  CUDFAST_KERNEL static StudentSums<F> sums_of(const Values& v, R c_s, R c_t, R inv_tau, int needs) {
    constexpr int both = kStudentOne | kTeacherOne;
    if (needs & kStudentEntropy) return sums_of<both | kStudentEntropy, Holes>(v, c_s, c_t, inv_tau);
    if (P == 0 && (needs & kTeacherOne)) return sums_of<both, Holes>(v, c_s, c_t, inv_tau);
    return sums_of<kStudentOne, Holes>(v, c_s, c_t, inv_tau);
  }

  CUDFAST_KERNEL static void fold(Part& part, const Values& v, int at, R inv_tau, int needs) {
    R m_s = part.m_s, m_t = part.m_t;
    CUDFAST_UNROLL
    for (int j = 0; j < chunk; ++j) {
      m_s = larger(m_s, v[0][j]);
      m_t = larger(m_t, v[1][j]);
    }
    if (m_s > part.m_s || m_t > part.m_t) {
      const int64_t k = m_t > part.m_t ? at : part.k;
      part = move(part, m_t, m_s, inv_tau);
      part.k = k;
    }
    const R c_s = centred(m_s), c_t = centred(m_t);
    StudentSums<F> sums = sums_of<kFull>(v, c_s, c_t, inv_tau, needs);
    if (broken(scalar(sums.a))) sums = sums_of<kHoles>(v, c_s, c_t, inv_tau, needs);
    part.z_tau += scalar(sums.z_tau);
    part.s_tau += scalar(sums.s_tau);
    part.a += scalar(sums.a);
    part.s_one += scalar(sums.s_one);
    part.z_one += scalar(sums.z_one);
    part.impossible = larger(part.impossible, scalar(sums.impossible));
    part.e_s += scalar(sums.e_s);
  }

  // The merge of a block's threads: maxima first, then sums relative to them.
  template <class T>
  struct TopOf {
    T m_s = kNothing<T>, m_t = kNothing<T>;
  };
  using Top = TopOf<R>;
  template <class T>
  CUDFAST_KERNEL static TopOf<T> top(const StudentState<T>& part) {
    return {part.m_s, part.m_t};
  }
  template <class T>
  CUDFAST_KERNEL static TopOf<T> higher(const TopOf<T>& a, const TopOf<T>& b) {
    return {larger(a.m_s, b.m_s), larger(a.m_t, b.m_t)};
  }
  template <class T>
  CUDFAST_KERNEL static StudentState<T> seen(const StudentState<T>& part, const TopOf<T>& top, double tau) {
    return move(part, top.m_t, top.m_s, static_cast<T>(1 / tau));
  }

  struct Sums {
    StudentSums<R> of = {};
    int64_t k = kBeaten;
  };
  template <class Find>
  CUDFAST_KERNEL static Sums around(const Part& part, const Top& top, R inv_tau, Find find) {
    const Part moved = move(part, top.m_t, top.m_s, inv_tau);
    const bool holds = moved.k != kBeaten && top.m_t > kNothing<R>;
    return {{moved.z_tau, moved.s_tau, moved.a, moved.s_one, moved.z_one, moved.impossible, R(0), moved.e_s},
            holds ? find(1, static_cast<int>(moved.k), top.m_t) : kBeaten};
  }
  CUDFAST_KERNEL static Sums sum(const Sums& a, const Sums& b) {
    return {{a.of.z_tau + b.of.z_tau, a.of.s_tau + b.of.s_tau, a.of.a + b.of.a, a.of.s_one + b.of.s_one,
             a.of.z_one + b.of.z_one, larger(a.of.impossible, b.of.impossible), R(0), a.of.e_s + b.of.e_s},
            a.k < b.k ? a.k : b.k};
  }

  // State of the columns [begin, end), with the elements that are read by their column.
  template <class Rows>
  CUDFAST_KERNEL static State state(const Top& top, const Sums& sums, const Rows& rows, int64_t begin, int64_t end,
                                    int64_t label) {
    State s;
    if (begin >= end) return s;
    s.m_s = static_cast<double>(top.m_s);
    s.m_t = static_cast<double>(top.m_t);
    s.z_tau = static_cast<double>(sums.of.z_tau);
    s.s_tau = static_cast<double>(sums.of.s_tau);
    s.a = static_cast<double>(sums.of.a);
    s.s_one = static_cast<double>(sums.of.s_one);
    s.z_one = static_cast<double>(sums.of.z_one);
    s.impossible = static_cast<double>(sums.of.impossible);
    s.e_s = static_cast<double>(sums.of.e_s);
    s.k = sums.k == kBeaten ? begin : sums.k;
    s.s_k = rows[0].template load<double>(s.k);
    if (label >= begin && label < end) {
      s.s_y = rows[0].template load<double>(label);
      s.t_y = rows[1].template load<double>(label);
    }
    return s;
  }
  // The neutral element of join().
  CUDFAST_KERNEL static State nothing() {
    State s;
    s.k = kBeaten;
    return s;
  }
  CUDFAST_KERNEL static State unpack(const Outputs& from, bool wide, int64_t row, bool entropy) {
    return unpack_student(from, wide, row, entropy);
  }

  using Map = StudentMap<R>;
  template <class C>
  CUDFAST_KERNEL static void map(const C& c, const Map& m, const Values& v, R (&g)[chunk]) {
    CUDFAST_UNROLL
    for (int j = 0; j < chunk; ++j) {
      // Logits that are read for statistics only must not turn 0 into NaN.
      const R dt = m.c.teacher_tau == 0 ? R(0) : v[1][j] - m.c_t;
      g[j] = scalar(element<P, true, true>(c, F(dt), F(v[0][j] - m.c_s), F(m.inv_tau)));
    }
  }
  CUDFAST_KERNEL static void map(const Map& m, const Values& v, R (&g)[chunk]) {
    const StudentGradient<F> c{F(m.c.student_tau), F(m.c.teacher_tau), F(m.c.student_one)};
    if (m.c.student_log == 0) return map(c, m, v, g);
    map(StudentLogGradient<F>{c, F(m.c.student_log), F(m.c.log_z)}, m, v, g);
  }
};

template <int D, class R_>
struct Teacher {
  using R = R_;
  using F = typename LaneOf<R>::type;
  using State = TeacherState<double>;
  using Part = TeacherState<R>;
  static constexpr int dtype = D, arrays = 1, chunk = kChunk<D>;
  using Values = R[arrays][chunk];

  Terms terms;

  template <bool Holes>
  CUDFAST_KERNEL static TeacherSums<F> sums_of(const Values& v, R c) {
    TeacherSums<F> sums{F(0), F(0)};
    CUDFAST_UNROLL
    for (int j = 0; j < chunk; ++j) cudfast::fold<Holes>(sums, F(v[0][j] - c));
    return sums;
  }

  CUDFAST_KERNEL static void fold(Part& part, const Values& v, int, R, int) {
    R m = part.m_s;
    CUDFAST_UNROLL
    for (int j = 0; j < chunk; ++j) m = larger(m, v[0][j]);
    if (m > part.m_s) part = move(part, m);
    TeacherSums<F> sums = sums_of<false>(v, centred(m));
    if (broken(scalar(sums.e_s))) sums = sums_of<true>(v, centred(m));
    part.s_one += scalar(sums.s_one);
    part.e_s += scalar(sums.e_s);
  }

  template <class T>
  struct TopOf {
    T m = kNothing<T>;
  };
  using Top = TopOf<R>;
  template <class T>
  CUDFAST_KERNEL static TopOf<T> top(const TeacherState<T>& part) {
    return {part.m_s};
  }
  template <class T>
  CUDFAST_KERNEL static TopOf<T> higher(const TopOf<T>& a, const TopOf<T>& b) {
    return {larger(a.m, b.m)};
  }
  template <class T>
  CUDFAST_KERNEL static TeacherState<T> seen(const TeacherState<T>& part, const TopOf<T>& top, double) {
    return move(part, top.m);
  }

  struct Sums {
    TeacherSums<R> of = {};
  };
  template <class Find>
  CUDFAST_KERNEL static Sums around(const Part& part, const Top& top, R, Find) {
    const Part moved = move(part, top.m);
    return {{moved.s_one, moved.e_s}};
  }
  CUDFAST_KERNEL static Sums sum(const Sums& a, const Sums& b) {
    return {{a.of.s_one + b.of.s_one, a.of.e_s + b.of.e_s}};
  }

  template <class Rows>
  CUDFAST_KERNEL static State state(const Top& top, const Sums& sums, const Rows& rows, int64_t begin, int64_t end,
                                    int64_t label) {
    State s;
    if (begin >= end) return s;
    s.m_s = static_cast<double>(top.m);
    s.s_one = static_cast<double>(sums.of.s_one);
    s.e_s = static_cast<double>(sums.of.e_s);
    if (label >= begin && label < end) s.s_y = rows[0].template load<double>(label);
    return s;
  }
  CUDFAST_KERNEL static State nothing() { return {}; }
  CUDFAST_KERNEL static State unpack(const Outputs& from, bool wide, int64_t row, bool) {
    return unpack_teacher(from, wide, row);
  }

  using Map = TeacherMap<R>;
  CUDFAST_KERNEL static void map(const Map& m, const Values& v, R (&g)[chunk]) {
    const TeacherGradient<F> c{F(m.c.one), F(m.c.log)};
    CUDFAST_UNROLL
    for (int j = 0; j < chunk; ++j) {
      g[j] = scalar(element(c, F(v[0][j] - m.centre), F(m.inv_z), F(m.log_z)));
    }
  }
};

}  // namespace
}  // namespace cudfast
