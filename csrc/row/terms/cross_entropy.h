// Cross-entropy: -log p_y.
#pragma once

#include "term.h"

namespace cudfast {
namespace {

template <class R>
CUDFAST_HD inline Evaluated<R> cross_entropy(const RowValues<R>& at) {
  Evaluated<R> term;
  term.value = -at.log_p;
  term.slopes.log_p = -1;
  return term;
}

}  // namespace
}  // namespace cudfast
