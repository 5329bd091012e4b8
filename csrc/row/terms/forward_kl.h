// Distillation: tau^2 KL(q || p), a value of the row.
#pragma once

#include "term.h"

namespace cudfast {
namespace {

template <class R>
CUDFAST_HD inline Evaluated<R> forward_kl(const RowValues<R>& at) {
  Evaluated<R> term;
  term.value = at.forward_kl;
  term.slopes.forward_kl = 1;
  return term;
}

}  // namespace
}  // namespace cudfast
