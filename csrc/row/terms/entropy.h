// The entropy of the row, alone or times a gate that opens in hard rows.                                       Eq. 3
#pragma once

#include "term.h"

namespace cudfast {
namespace {

template <class R>
CUDFAST_HD inline Evaluated<R> entropy(const RowValues<R>& at) {
  Evaluated<R> term;
  term.value = at.entropy;
  term.slopes.entropy = 1;
  return term;
}

// w = 1{p < threshold} + scale (1 - p)^power; the step has no slope. At p = 1 the slope is multiplied by an entropy
// that vanishes faster, so its limit there is 0.                                                              [gate]
template <class R>
CUDFAST_HD inline Curve<R> gate(R log_p, R threshold, R scale, R power) {
  const R a = -std::expm1(log_p);
  Curve<R> w;
  w.value = (1 - a < threshold ? R(1) : R(0)) + scale * std::pow(a, power);
  if (power > 0 && a > 0) w.slope = -(scale * power) * std::pow(a, power - 1) * (1 - a);
  return w;
}

// d: 1 if the gradient flows through the gate, else 0.
template <class R>
CUDFAST_HD inline Evaluated<R> gated_entropy(const RowValues<R>& at, const Term& term) {
  const Curve<R> w = gate(at.log_p, R(term.a), R(term.b), R(term.c));
  Evaluated<R> found;
  found.value = w.value * at.entropy;
  found.slopes.entropy = w.value;
  if (term.d != 0) found.slopes.log_p = R(term.d) * w.slope * at.entropy;
  return found;
}

}  // namespace
}  // namespace cudfast
