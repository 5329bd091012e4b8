// The share of the uniform distribution in a smoothed cross-entropy: minus the mean of c_j log p_j.
#pragma once

#include "term.h"

namespace cudfast {
namespace {

template <class R>
CUDFAST_HD inline Evaluated<R, ExtendedSlopes<R>> uniform(const ExtendedValues<R>& at) {
  Evaluated<R, ExtendedSlopes<R>> term;
  term.value = -at.uniform;
  term.slopes.uniform = -1;
  return term;
}

}  // namespace
}  // namespace cudfast
