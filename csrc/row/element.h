// The gradient of one element from the coefficients of its row: the map that the second sweep applies.
#pragma once

#include "terms.h"

namespace cudfast {
namespace {

// dL/ds_j without the label's share, at a temperature of 1, 2 or 4.
template <int P, class F>
CUDFAST_HD inline F element(const StudentGradient<F>& c, Exponentials<F> e) {
  return c.student_tau * e.student - c.teacher_tau * e.teacher + c.student_one * power<P>(e.student);
}

// The same from dt and ds, as in fold(). Holes: a class that is impossible for the student has a zero gradient even if
// the teacher gives it mass.                                                                        [element-student]
template <int P, int Ones, bool Holes, class F>
CUDFAST_HD inline F element(const StudentGradient<F>& c, F dt, F ds, F inv_tau) {
  const Exponentials<F> e{exp(dt * inv_tau), exp(ds * inv_tau)};
  F g;
  if constexpr (P > 0) {
    g = element<P>(c, e);
  } else {
    g = c.student_tau * e.student - c.teacher_tau * e.teacher;
    if constexpr (Ones > 0) g = g + c.student_one * exp(ds);
  }
  if constexpr (Holes) {  // NaN in a NaN row
    g = select(ds == F(kNothing<float>), F(0) * (c.student_tau + c.student_one), g);
  }
  return g;
}

// dL/dz_j without the label's share; x = z_j - m. 0 log 0 is 0.                                     [element-teacher]
template <class F>
CUDFAST_HD inline F element(const TeacherGradient<F>& c, F x, F inv_z, F log_z) {
  const F p = exp(x) * inv_z;
  const F log_p = select(x > F(kNothing<float>), x - log_z, F(0));
  return p * (c.one + c.log * log_p);
}

}  // namespace
}  // namespace cudfast
