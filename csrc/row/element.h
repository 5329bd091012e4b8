// The gradient of one element from the coefficients of its row: the map that the second sweep applies.
#pragma once

#include "terms.h"

namespace cudfast {
namespace {

// Coefficients of a row without a target.
template <class F>
struct TeacherGradient {
  F one, log;
};

// dL/ds_j without the label's share; x = s_j - m_s. 0 log 0 is 0.                                       [element-own]
template <class F>
CUDFAST_HD_INLINED F element(const TeacherGradient<F>& c, F x, F inv_z, F log_z) {
  const F p = exp(x) * inv_z;
  const F log_p = select(x > F(kNothing<float>), x - log_z, F(0));
  return p * (c.one + c.log * log_p);
}

// Coefficients of a row with a target, in the form that its elements take; 1 / s_one is included.
template <class F>
struct StudentGradient {
  F student_tau, teacher_tau, student_one;
};

// The same with the share of log p_j.
template <class F>
struct StudentLogGradient : StudentGradient<F> {
  F student_log, log_z;
};

// p_j (one + log * log p_j) from e^(ds). 0 log 0 is 0.
template <class F>
CUDFAST_HD_INLINED F share_of_one(const StudentGradient<F>& c, F e_one, F) {
  return c.student_one * e_one;
}
template <class F>
CUDFAST_HD_INLINED F share_of_one(const StudentLogGradient<F>& c, F e_one, F ds) {
  return e_one * (c.student_one + c.student_log * select(ds > F(kNothing<float>), ds - c.log_z, F(0)));
}

// dL/ds_j without the label's share, at a temperature of 1, 2 or 4. C: StudentGradient, which needs no ds, or
// StudentLogGradient.
template <int P, class C, class F>
CUDFAST_HD_INLINED F element(const C& c, Exponentials<F> e, F ds) {
  return c.student_tau * e.student - c.teacher_tau * e.teacher + share_of_one(c, power<P>(e.student), ds);
}

// The same from dt and ds, as in fold(). One: whether there are shares of p_j; a power always computes them. Holes: a
// class that is impossible for the student has a zero gradient even if the teacher gives it mass.   [element-student]
template <int P, bool One, bool Holes, class C, class F>
CUDFAST_HD_INLINED F element(const C& c, F dt, F ds, F inv_tau) {
  const Exponentials<F> e{exp(dt * inv_tau), exp(ds * inv_tau)};
  F g;
  if constexpr (P > 0) {
    g = element<P>(c, e, ds);
  } else {
    g = c.student_tau * e.student - c.teacher_tau * e.teacher;
    if constexpr (One) g = g + share_of_one(c, exp(ds), ds);
  }
  if constexpr (Holes) {  // NaN in a NaN row
    g = select(ds == F(kNothing<float>), F(0) * (c.student_tau + c.student_one), g);
  }
  return g;
}

// ---- Rows with the sums of extended.h ----

template <class F>
struct ExtendedTeacherGradient : TeacherGradient<F> {
  F uniform;
};

// weight: c_j, as in the next function.
template <class F>
CUDFAST_HD_INLINED F element(const ExtendedTeacherGradient<F>& c, F x, F inv_z, F log_z, F weight) {
  const F share = select(x > F(kNothing<float>), c.uniform * weight, F(0));
  return element(static_cast<const TeacherGradient<F>&>(c), x, inv_z, log_z) + share;
}

template <class F>
struct ExtendedStudentGradient : StudentLogGradient<F> {
  F reverse, uniform;
};

// From the exponentials e and one = e^(ds). Needs: kReverse and kUniform. Holes: as in element().
template <int Needs, bool One, bool Holes, class F>
CUDFAST_HD_INLINED F element(const ExtendedStudentGradient<F>& c, Exponentials<F> e, F one, F dt, F ds, F inv_t,
                             F inv_s, F weight) {
  F g = c.student_tau * e.student - c.teacher_tau * e.teacher;
  if constexpr (One) g = g + share_of_one(static_cast<const StudentLogGradient<F>&>(c), one, ds);
  if constexpr ((Needs & kReverse) != 0) {
    g = g - c.reverse * e.student * difference<kHoles>(dt, ds, dt * inv_t, ds * inv_s);
  }
  if constexpr ((Needs & kUniform) != 0) g = g + select(ds > F(kNothing<float>), c.uniform * weight, F(0));
  if constexpr (Holes) g = select(ds == F(kNothing<float>), F(0) * (c.student_tau + c.student_one), g);
  return g;
}

}  // namespace
}  // namespace cudfast
