// Rows with more than the sums of row/state.h: Rows::extended() says whether a call has them.
#pragma once

#include "../launch.h"

namespace cudfast {

void extended_row_state(const Rows& rows, const Terms& terms, bool statistics, Divisors divisors, const Outputs& out);
void extended_row_gradient(const Rows& rows, const Terms& terms, Divisors divisors, Upstream upstream,
                           const Outputs& from);

}  // namespace cudfast
