// The gradient of one element from the coefficients of its row: the map that the second sweep applies.
#pragma once

#include "terms.h"

namespace cudfast {
namespace {

// dL/ds_j without the label's share. P, Ones and dt, ds as in fold(); Holes: a class that the student cannot have has a
// zero gradient even where the teacher gives it mass.                                               [element-student]
template <int P, int Ones, bool Holes, class F>
inline F element(const StudentGradient<F>& c, F dt, F ds, F inv_tau) {
  const F student = exp(ds * inv_tau);
  const F teacher = exp(dt * inv_tau);
  F g = c.student_tau * student - c.teacher_tau * teacher;
  if constexpr (P > 0) {
    g = g + c.student_one * power<P>(student);
  } else if constexpr (Ones > 0) {
    g = g + c.student_one * exp(ds);
  }
  if constexpr (Holes)
    g = select(ds == F(kNothing<float>), F(0) * (c.student_tau + c.student_one), g);  // NaN in a NaN row
  return g;
}

// dL/dz_j without the label's share; x = z_j - m. 0 log 0 is 0.                                     [element-teacher]
template <bool Holes, class F>
inline F element(const TeacherGradient<F>& c, F x, F inv_z, F log_z) {
  const F p = exp(x) * inv_z;
  F log_p = x - log_z;
  if constexpr (Holes) log_p = select(x > F(kNothing<float>), log_p, F(0));
  return p * (c.one + c.log * log_p);
}

}  // namespace
}  // namespace cudfast
