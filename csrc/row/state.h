// Row states: the values that a row of logits is reduced to, and the merge of two parts of a row.
//
// A state is a commutative monoid up to rounding: empty(), and merge() with the empty state as its identity. Lanes,
// blocks, threads and ranks all merge with the same function. Sums are relative to the maxima, so nothing overflows;
// the equations are in docs/method.md under the tags given here.
//
// R is the scalar type of a state (double on the CPU), F the type that a sweep folds: a scalar or a vector of lanes.
// The anonymous namespace is deliberate: these headers are compiled once per instruction set, and code generated for
// one set must never be linked into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace cudfast {
namespace {

template <class R>
constexpr R kNothing = -std::numeric_limits<R>::infinity();

// The functions of scalars that fold() and element() use; cpu/simd.h and cuda/lane.h define the same for lanes.
#if defined(__CUDACC__)
// Those in double are not inlined: a kernel has dozens of calls, which would take a third of the compile time.
CUDFAST_HD inline float exp(float x) { return ::expf(x); }
CUDFAST_HD inline float log(float x) { return ::logf(x); }
__host__ __device__ __noinline__ inline double exp(double x) { return ::exp(x); }
__host__ __device__ __noinline__ inline double log(double x) { return ::log(x); }
#else
using std::exp;
using std::log;
#endif
CUDFAST_HD inline double max(double a, double b) { return a > b ? a : b; }
CUDFAST_HD inline double select(bool mask, double yes, double no) { return mask ? yes : no; }

// ---- Rows with a target: state of one row, or of some of its columns ----                        [state-student]

template <class R>
struct StudentState {
  R m_t = kNothing<R>;  // teacher maximum
  R s_k = kNothing<R>;  // student logit at the teacher's top-1
  R m_s = kNothing<R>;  // student maximum
  R z_tau = 0;          // sum exp((t - m_t) / tau)
  R s_tau = 0;          // sum exp((s - m_s) / tau)
  R a = 0;              // sum exp((t - m_t) / tau) * ((t - m_t) - (s - m_s)) / tau
  R s_one = 0;          // sum exp(s - m_s)
  R z_one = 0;          // sum exp(t - m_t); only statistics need it
  R t_y = kNothing<R>;  // teacher logit of the label, if this part contains it
  R s_y = kNothing<R>;  // student logit of the label
  R impossible = 0;     // 1 if some class has t finite and s = -inf
  R e_s = 0;            // sum exp(s - m_s) (s - m_s), at most 0; only the student's entropy needs it
  int64_t k = 0;        // teacher's top-1, the lowest index of equal logits
};

// Sums of lanes over columns, relative to maxima that are already known.
template <class F>
struct StudentSums {
  F z_tau, s_tau, a, s_one, z_one, impossible;
  F e_one;  // sum exp(t - m_t) (t - m_t); only a bound on the target's entropy needs it
  F e_s;
};

// The sums, besides those at temperature tau, that fold() computes: a mask. Those from 16 on are in extended.h. From 4
// on, the numbers are part of the interface to Python.
enum Needs : int {
  kStudentOne = 1,      // s_one
  kTeacherOne = 2,      // z_one
  kTeacherEntropy = 4,  // e_one
  kStudentEntropy = 8,  // e_s
  kReverse = 16,        // b, missing
  kUniform = 32,        // uniform, share, possible
  kSquare = 64,         // s_two
};

template <class F>
CUDFAST_HD inline void add(StudentSums<F>& to, const StudentSums<F>& from) {
  to.z_tau = to.z_tau + from.z_tau;
  to.s_tau = to.s_tau + from.s_tau;
  to.a = to.a + from.a;
  to.s_one = to.s_one + from.s_one;
  to.z_one = to.z_one + from.z_one;
  to.impossible = max(to.impossible, from.impossible);
  to.e_one = to.e_one + from.e_one;
  to.e_s = to.e_s + from.e_s;
}

// e^(x) from e^(x / P): temperatures 1, 2 and 4 need no second exponential.
template <int P, class F>
CUDFAST_HD inline F power(F e) {
  static_assert(P == 1 || P == 2 || P == 4, "powers by repeated squaring");
  if constexpr (P == 1) {
    return e;
  } else {
    return power<P / 2>(e * e);
  }
}

// e^((t - m_t) / tau) and e^((s - m_s) / tau): the gradient needs only these of a column if the temperature is a power.
template <class F>
struct Exponentials {
  F teacher, student;
};

// What fold() has to expect. kPadded: lanes in which both logits are -inf. kHoles: logits of -inf anywhere, and
// quotients of finite logits that overflow, which are no -inf.
enum Holes : int { kFull, kPadded, kHoles };

// x - w; 0 in columns where a logit is -inf.
template <int Holes, class F>
CUDFAST_HD_INLINED F difference(F dt, F ds, F x, F w) {
  if constexpr (Holes == kHoles) {  // x > -inf is false for NaN, which remains in the exponentials
    const F none = F(kNothing<float>), lowest = F(std::numeric_limits<float>::lowest());
    return select(dt > none, select(ds > none, max(x, lowest) - max(w, lowest), F(0)), F(0));
  } else if constexpr (Holes == kPadded) {  // 0 * inf is excluded
    const F floor = F(kNothing<float>);
    return select(x > floor, select(w > floor, x - w, F(0)), F(0));
  } else {
    return x - w;
  }
}

// Adds the columns in dt = t - m_t and ds = s - m_s. P is the temperature if that is 1, 2 or 4, else 0; with P > 0,
// both sums at temperature 1 are computed, whatever the mask.
template <int P, int Needs, int Holes, class F>
CUDFAST_HD inline Exponentials<F> fold(StudentSums<F>& sums, F dt, F ds, F inv_t, F inv_s) {
  const F x = dt * inv_t;
  const F w = ds * inv_s;
  const Exponentials<F> e{exp(x), exp(w)};
  const F excess = difference<Holes>(dt, ds, x, w);
  if constexpr (Holes == kHoles) {
    const F none = F(kNothing<float>);
    sums.impossible = max(sums.impossible, select(dt > none, select(ds > none, F(0), F(1)), F(0)));
  } else if constexpr (Holes == kPadded) {
    const F floor = F(kNothing<float>);
    sums.impossible = max(sums.impossible, select(x > floor, select(w > floor, F(0), F(1)), F(0)));
  }
  sums.z_tau = sums.z_tau + e.teacher;
  sums.s_tau = sums.s_tau + e.student;
  sums.a = sums.a + e.teacher * excess;
  F one_t = F(0), one_s = F(0);  // exp(dt), exp(ds)
  if constexpr (P > 0) {
    sums.s_one = sums.s_one + (one_s = power<P>(e.student));
    sums.z_one = sums.z_one + (one_t = power<P>(e.teacher));
  } else {
    if constexpr ((Needs & kStudentOne) != 0) sums.s_one = sums.s_one + (one_s = exp(ds));
    if constexpr ((Needs & kTeacherOne) != 0) sums.z_one = sums.z_one + (one_t = exp(dt));
  }
  if constexpr ((Needs & kTeacherEntropy) != 0) {
    if constexpr (Holes != kFull) dt = select(dt > F(kNothing<float>), dt, F(0));
    sums.e_one = sums.e_one + one_t * dt;
  }
  if constexpr ((Needs & kStudentEntropy) != 0) {
    if constexpr (Holes != kFull) ds = select(ds > F(kNothing<float>), ds, F(0));
    sums.e_s = sums.e_s + one_s * ds;
  }
  return e;
}
template <int P, int Needs, int Holes, class F>
CUDFAST_HD inline Exponentials<F> fold(StudentSums<F>& sums, F dt, F ds, F inv_tau) {
  return fold<P, Needs, Holes>(sums, dt, ds, inv_tau, inv_tau);
}

// exp of a distance between maxima, which is 0 in most merges.
template <class R>
CUDFAST_HD inline R rescale(R shift) {
  return shift == 0 ? R(1) : exp(shift);
}

// Distance from a part's maximum to that of the whole; 0 for an empty part.
template <class R>
CUDFAST_HD inline R below(R part, R whole) {
  return part == kNothing<R> ? R(0) : part - whole;
}

// Marks a top-1 that is smaller than that of another part.
constexpr int64_t kBeaten = std::numeric_limits<int64_t>::max();

// `part` relative to new maxima m_t and m_s, which are at least its own.                            [merge-student]
template <class R>
CUDFAST_HD inline StudentState<R> move(StudentState<R> part, R m_t, R m_s, R inv_tau) {
  const R down_t = below(part.m_t, m_t);
  const R down_s = below(part.m_s, m_s);
  const R teacher = rescale(down_t * inv_tau);
  part.a = teacher * (part.a + part.z_tau * ((down_t - down_s) * inv_tau));
  part.z_tau *= teacher;
  part.z_one *= inv_tau == 1 ? teacher : rescale(down_t);
  const R student = rescale(down_s * inv_tau);
  const R student_one = inv_tau == 1 ? student : rescale(down_s);
  part.s_tau *= student;
  part.e_s = student_one * (part.e_s + part.s_one * down_s);
  part.s_one *= student_one;
  if (part.m_t != m_t) part.k = kBeaten;
  part.m_t = m_t;
  part.m_s = m_s;
  return part;
}

// Union of two disjoint sets of columns whose states are relative to the same maxima. Ties go to the lower index,
// independent of the order of the parts.
template <class R>
CUDFAST_HD inline StudentState<R> join(const StudentState<R>& a, const StudentState<R>& b) {
  StudentState<R> both = a;
  both.k = a.k <= b.k ? a.k : b.k;
  both.s_k = a.k <= b.k ? a.s_k : b.s_k;
  both.z_tau += b.z_tau;
  both.s_tau += b.s_tau;
  both.a += b.a;
  both.s_one += b.s_one;
  both.z_one += b.z_one;
  both.e_s += b.e_s;
  both.t_y = a.t_y > b.t_y ? a.t_y : b.t_y;  // only one part contains the label
  both.s_y = a.s_y > b.s_y ? a.s_y : b.s_y;
  both.impossible = a.impossible > b.impossible ? a.impossible : b.impossible;
  return both;
}

template <class R>
CUDFAST_HD inline StudentState<R> merge(const StudentState<R>& left, const StudentState<R>& right, R inv_tau) {
  const R m_t = left.m_t > right.m_t ? left.m_t : right.m_t;
  const R m_s = left.m_s > right.m_s ? left.m_s : right.m_s;
  return join(move(left, m_t, m_s, inv_tau), move(right, m_t, m_s, inv_tau));
}

// ---- Rows without a target: the sums of the row's own logits ----                                [state-teacher]

template <class R>
struct TeacherState {
  R m_s = kNothing<R>;  // maximum
  R s_one = 0;          // sum exp(s - m_s)
  R e_s = 0;            // sum exp(s - m_s) (s - m_s), at most 0
  R s_y = kNothing<R>;  // logit of the label
};

template <class F>
struct TeacherSums {
  F s_one, e_s;
};

template <class F>
CUDFAST_HD inline void add(TeacherSums<F>& to, const TeacherSums<F>& from) {
  to.s_one = to.s_one + from.s_one;
  to.e_s = to.e_s + from.e_s;
}

template <bool Holes, class F>
CUDFAST_HD inline void fold(TeacherSums<F>& sums, F x) {
  const F p = exp(x);
  sums.s_one = sums.s_one + p;
  if constexpr (Holes) {
    sums.e_s = sums.e_s + p * select(x > F(kNothing<float>), x, F(0));
  } else {
    sums.e_s = sums.e_s + p * x;
  }
}

// e' = e^(m - m') (e + s (m - m'))                                                                  [merge-teacher]
template <class R>
CUDFAST_HD inline TeacherState<R> move(TeacherState<R> part, R m_s) {
  const R down = below(part.m_s, m_s);
  const R scale = rescale(down);
  part.e_s = scale * (part.e_s + part.s_one * down);
  part.s_one *= scale;
  part.m_s = m_s;
  return part;
}

template <class R>
CUDFAST_HD inline TeacherState<R> join(const TeacherState<R>& a, const TeacherState<R>& b) {
  return {a.m_s, a.s_one + b.s_one, a.e_s + b.e_s, a.s_y > b.s_y ? a.s_y : b.s_y};
}

template <class R>
CUDFAST_HD inline TeacherState<R> merge(const TeacherState<R>& left, const TeacherState<R>& right) {
  const R m_s = left.m_s > right.m_s ? left.m_s : right.m_s;
  return join(move(left, m_s), move(right, m_s));
}

}  // namespace
}  // namespace cudfast
