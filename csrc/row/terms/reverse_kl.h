// Distillation from the student to the teacher: tau^2 KL(p || q), a value of the row.
#pragma once

#include "term.h"

namespace cudfast {
namespace {

template <class R>
CUDFAST_HD inline Evaluated<R, ExtendedSlopes<R>> reverse_kl(const ExtendedValues<R>& at) {
  Evaluated<R, ExtendedSlopes<R>> term;
  term.value = at.reverse_kl;
  term.slopes.reverse_kl = 1;
  return term;
}

}  // namespace
}  // namespace cudfast
