// The focal loss: cross-entropy that counts less in rows with a likely label.                                  Eq. 3
#pragma once

#include "term.h"

namespace cudfast {
namespace {

// alpha (1 - p)^gamma (-log p). The slope is alpha (gamma p a^(gamma-1) log p - a^gamma), a = 1 - p; log p / a tends to
// -1 as p approaches 1, so no negative power is needed.                                                      [focal]
template <class R>
CUDFAST_HD inline Curve<R> focal(R log_p, R gamma, R alpha) {
  const R a = -std::expm1(log_p);
  const R a_gamma = std::pow(a, gamma);
  const R ratio = a > 0 ? log_p / a : R(-1);
  if (log_p == kNothing<R>) return {std::numeric_limits<R>::infinity(), -alpha};  // p log p is 0 there
  return {-alpha * a_gamma * log_p, alpha * a_gamma * (gamma * (1 - a) * ratio - 1)};
}

template <class R>
CUDFAST_HD inline Evaluated<R> focal(const RowValues<R>& at, const Term& term) {
  const Curve<R> f = focal(at.log_p, R(term.a), R(term.b));
  Evaluated<R> found;
  found.value = f.value;
  found.slopes.log_p = f.slope;
  return found;
}

}  // namespace
}  // namespace cudfast
