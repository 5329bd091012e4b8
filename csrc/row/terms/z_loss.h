// The square of log sum exp(s), which keeps the logits near a fixed scale.
#pragma once

#include "term.h"

namespace cudfast {
namespace {

template <class R>
CUDFAST_HD inline Evaluated<R> z_loss(const RowValues<R>& at) {
  Evaluated<R> term;
  term.value = at.lse * at.lse;
  term.slopes.lse = 2 * at.lse;
  return term;
}

}  // namespace
}  // namespace cudfast
