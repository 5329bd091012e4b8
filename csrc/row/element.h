// The gradient of one element from the coefficients of its row: the map that the second sweep applies.
#pragma once

#include "terms.h"

namespace cudfast {
namespace {

// Coefficients of a row with a target, in the form that its elements take; 1 / s_one is included.
template <class F>
struct StudentGradient {
  F student_tau, teacher_tau, student_one, student_log, log_z;
};

template <class R>
CUDFAST_HD inline StudentGradient<R> student_gradient_of(const RowEnd<R>& end, R s_one) {
  const RowGradient<R>& g = end.gradient;
  return {g.student_tau, g.teacher_tau, g.one != 0 ? g.one / s_one : R(0), g.log != 0 ? g.log / s_one : R(0),
          end.log_z};
}

// The share of p_j (one + log * log p_j), from e^(ds). 0 log 0 is 0.
template <bool Log, class F>
CUDFAST_HD inline F share_of_one(const StudentGradient<F>& c, F e_one, F ds) {
  if constexpr (Log) {
    return e_one * (c.student_one + c.student_log * select(ds > F(kNothing<float>), ds - c.log_z, F(0)));
  } else {
    return c.student_one * e_one;
  }
}

// dL/ds_j without the label's share, at a temperature of 1, 2 or 4. ds is needed for Log alone.
template <int P, bool Log, class F>
CUDFAST_HD inline F element(const StudentGradient<F>& c, Exponentials<F> e, F ds) {
  return c.student_tau * e.student - c.teacher_tau * e.teacher + share_of_one<Log>(c, power<P>(e.student), ds);
}

// The shares of p_j that a gradient has besides those at tau.
enum class Ones : int { none, one, log };

// The same from dt and ds, as in fold(); P > 0 has no form without `one`. Holes: a class that is impossible for the
// student has a zero gradient even if the teacher gives it mass.                                    [element-student]
template <int P, Ones Form, bool Holes, class F>
CUDFAST_HD inline F element(const StudentGradient<F>& c, F dt, F ds, F inv_tau) {
  const Exponentials<F> e{exp(dt * inv_tau), exp(ds * inv_tau)};
  F g;
  if constexpr (P > 0) {
    g = element<P, Form == Ones::log>(c, e, ds);
  } else {
    g = c.student_tau * e.student - c.teacher_tau * e.teacher;
    if constexpr (Form != Ones::none) g = g + share_of_one<Form == Ones::log>(c, exp(ds), ds);
  }
  if constexpr (Holes) {  // NaN in a NaN row
    g = select(ds == F(kNothing<float>), F(0) * (c.student_tau + c.student_one), g);
  }
  return g;
}

// Coefficients of a row without a target.
template <class F>
struct TeacherGradient {
  F one, log;
};

// dL/ds_j without the label's share; x = s_j - m_s. 0 log 0 is 0.                                   [element-teacher]
template <class F>
CUDFAST_HD inline F element(const TeacherGradient<F>& c, F x, F inv_z, F log_z) {
  const F p = exp(x) * inv_z;
  const F log_p = select(x > F(kNothing<float>), x - log_z, F(0));
  return p * (c.one + c.log * log_p);
}

}  // namespace
}  // namespace cudfast
