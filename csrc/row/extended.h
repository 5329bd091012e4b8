// The sums that only some losses need, and their merge; rows without them have the states of state.h.
#pragma once

#include "state.h"

namespace cudfast {
namespace {

// Inverse temperatures of a row.
template <class R>
struct Inverse {
  R teacher, student;
};

// x = (t - m_t) / tau_t, w = (s - m_s) / tau; c_j is the weight of a class, 1 without class weights.
template <class R>
struct ExtendedState : StudentState<R> {
  R e_t = 0;                                   // sum exp(t - m_t) (t - m_t)
  R s_two = 0;                                 // sum exp(2 (s - m_s))
  R b = 0;                                     // sum exp(w) (w - x) over classes with both logits finite
  R missing = 0;                               // number of classes with t = -inf and s finite
  R uniform = 0;                               // sum c_j (s - m_s), as the next two over classes with s > -inf
  R share = 0;                                 // sum c_j
  R possible = 0;                              // number of classes
  R m_q = std::numeric_limits<R>::infinity();  // maximum that z_tau and a of a recalibrated row are relative to
};

template <class R>
struct ExtendedTeacherState : TeacherState<R> {
  R s_two = 0, uniform = 0, share = 0, possible = 0;
};

template <class F>
struct ExtendedSums {
  F b, missing, uniform, share, possible, s_two;
};

template <class F>
CUDFAST_HD inline void add(ExtendedSums<F>& to, const ExtendedSums<F>& from) {
  to.b = to.b + from.b;
  to.missing = to.missing + from.missing;
  to.uniform = to.uniform + from.uniform;
  to.share = to.share + from.share;
  to.possible = to.possible + from.possible;
  to.s_two = to.s_two + from.s_two;
}

// Adds the columns in ds = s - m_s, one = exp(ds).
template <int Needs, class F>
CUDFAST_HD inline void fold_own(ExtendedSums<F>& more, F ds, F one, F weight) {
  if constexpr ((Needs & kUniform) != 0) {
    const auto possible = ds > F(kNothing<float>);
    more.uniform = more.uniform + select(possible, weight * ds, F(0));
    more.share = more.share + select(possible, weight, F(0));
    more.possible = more.possible + select(possible, F(1), F(0));
  }
  if constexpr ((Needs & kSquare) != 0) more.s_two = more.s_two + one * one;
}

// As fold() of StudentSums, with two temperatures; P > 0 only if they are equal.
template <int P, int Needs, int Holes, class F>
CUDFAST_HD inline Exponentials<F> fold(StudentSums<F>& sums, ExtendedSums<F>& more, F dt, F ds, F inv_t, F inv_s,
                                       F weight) {
  const Exponentials<F> e = fold<P, Needs, Holes>(sums, dt, ds, inv_t, inv_s);
  if constexpr ((Needs & kReverse) != 0) {
    more.b = more.b - e.student * difference<Holes>(dt, ds, dt * inv_t, ds * inv_s);
    if constexpr (Holes != kFull) {
      const F none = F(kNothing<float>);
      more.missing = more.missing + select(dt > none, F(0), select(ds > none, F(1), F(0)));
    }
  }
  F one = F(0);
  if constexpr ((Needs & kSquare) != 0) {
    if constexpr (P > 0) {
      one = power<P>(e.student);
    } else {
      one = exp(ds);
    }
  }
  fold_own<Needs>(more, ds, one, weight);
  return e;
}

// [merge-student]: docs/method.md
template <class R>
CUDFAST_HD inline ExtendedState<R> move(ExtendedState<R> part, R m_t, R m_s, const Inverse<R>& inverse) {
  const R down_t = below(part.m_t, m_t), down_s = below(part.m_s, m_s);
  const R x = down_t * inverse.teacher, w = down_s * inverse.student;
  const R teacher = rescale(x), student = rescale(w), one_t = rescale(down_t), one_s = rescale(down_s);
  part.a = teacher * (part.a + part.z_tau * (x - w));
  part.z_tau *= teacher;
  part.b = student * (part.b + part.s_tau * (w - x));
  part.s_tau *= student;
  part.e_t = one_t * (part.e_t + part.z_one * down_t);
  part.z_one *= one_t;
  part.e_s = one_s * (part.e_s + part.s_one * down_s);
  part.s_one *= one_s;
  part.s_two *= one_s * one_s;
  part.uniform += part.share * down_s;
  if (part.m_t != m_t) part.k = kBeaten;
  part.m_t = m_t;
  part.m_s = m_s;
  return part;
}

template <class R>
CUDFAST_HD inline ExtendedState<R> merge(const ExtendedState<R>& left, const ExtendedState<R>& right,
                                         const Inverse<R>& inverse) {
  const R m_t = left.m_t > right.m_t ? left.m_t : right.m_t;
  const R m_s = left.m_s > right.m_s ? left.m_s : right.m_s;
  const ExtendedState<R> a = move(left, m_t, m_s, inverse), b = move(right, m_t, m_s, inverse);
  ExtendedState<R> both;
  static_cast<StudentState<R>&>(both) = join(static_cast<const StudentState<R>&>(a), b);
  both.e_t = a.e_t + b.e_t;
  both.s_two = a.s_two + b.s_two;
  both.b = a.b + b.b;
  both.missing = a.missing + b.missing;
  both.uniform = a.uniform + b.uniform;
  both.share = a.share + b.share;
  both.possible = a.possible + b.possible;
  return both;
}

template <class R>
CUDFAST_HD inline ExtendedTeacherState<R> move(ExtendedTeacherState<R> part, R m_s) {
  const R down = below(part.m_s, m_s), one = rescale(down);
  part.s_two *= one * one;
  part.uniform += part.share * down;
  static_cast<TeacherState<R>&>(part) = move(static_cast<const TeacherState<R>&>(part), m_s);
  return part;
}

template <class R>
CUDFAST_HD inline ExtendedTeacherState<R> merge(const ExtendedTeacherState<R>& left,
                                                const ExtendedTeacherState<R>& right) {
  const R m_s = left.m_s > right.m_s ? left.m_s : right.m_s;
  const ExtendedTeacherState<R> a = move(left, m_s), b = move(right, m_s);
  return {join(static_cast<const TeacherState<R>&>(a), b), a.s_two + b.s_two, a.uniform + b.uniform, a.share + b.share,
          a.possible + b.possible};
}

}  // namespace
}  // namespace cudfast
