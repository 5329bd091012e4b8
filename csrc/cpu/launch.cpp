// launch.h for the CPU: checks, and the choice of what run.h runs.
#include "../launch.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "extended.h"
#include "projected.h"
#include "run.h"

namespace cudfast {

namespace {
std::atomic<bool> forked{false};
const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });  // from the moment the library is loaded
}  // namespace

bool can_thread() { return watched == 0 && !forked; }

namespace {

// A gradient that would leave the caches before it is read is written with non-temporal stores: an ordinary store reads
// a line before it writes it. Rows must consist of whole lines and be long: the elements of the label and the top-1 are
// written last, when their lines are no longer cached, and later stores wait for them. `least`: bytes per element,
// because the parts of a line must be written in quick succession. See docs/performance.md.
constexpr int64_t kStreamBytes = 3 << 23, kStreamColumns = 1 << 14;

Outputs streamed(const Rows& rows, Outputs out, int64_t least) {
  Matrix& g = out.gradient;
  const int64_t size = size_of(g.dtype);
  const int64_t lines =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(g.data)) | g.outer_stride * size | g.inner_stride * size;
  g.stream = sweeps().streams && g.data != rows.logits.data && size >= least && lines % 64 == 0 &&
             rows.classes >= kStreamColumns && rows.rows * rows.classes * size >= kStreamBytes &&
             !rows.constraints.bounds;
  return out;
}

}  // namespace

Check check(const Rows& rows, const Terms& terms) {
  constexpr double largest = std::numeric_limits<double>::max();
  for (int64_t row = 0; row < rows.rows; ++row) {
    if (rows.labels && rows.labelled(row) && (rows.labels[row] < 0 || rows.labels[row] >= rows.classes)) {
      return {Fault::label, row};
    }
    if (rows.weight && !(rows.weight[row] >= 0 && rows.weight[row] <= largest)) return {Fault::weight, row};
    if (rows.temperature &&
        !(rows.temperature[row] >= kLowestTemperature && rows.temperature[row] <= kHighestTemperature)) {
      return {Fault::temperature, row};
    }
  }
  if (!rows.coefficients) return {};
  const int64_t count = terms.count * (rows.coefficients_per_row ? rows.rows : 1);
  for (int64_t i = 0; i < count; ++i) {
    if (!(std::fabs(rows.coefficients[i]) <= largest)) return {Fault::coefficient, i};
  }
  return {};
}

Divisors count(const Rows& rows) {
  Divisors sums{0, 0};
  for (int64_t row = 0; row < rows.rows; ++row) {
    const RowWeights<double> w = row_weights(rows.ignored(row), rows.labelled(row), rows.weight_at(row));
    sums.rows += w.rows;
    sums.labelled += w.labelled;
  }
  return sums;
}

Check row_state(const Rows& rows, const Terms& terms, bool statistics, Divisors divisors, const Outputs& given) {
  const Outputs out = streamed(rows, given, 2);
  if (rows.extended(terms)) {
    extended_row_state(rows, terms, statistics, divisors, out);
    return {};
  }
  if (!rows.target.data) {
    run(TeacherLossOfRows{rows, terms, divisors, rows.wide()}, out);
    return {};
  }
  const StudentLossOfRows loss{rows, terms, divisors, rows.wide(), needs_of(terms, statistics), out.gradient};
  if (!rows.constraints.bounds) {
    run(loss, out);
    return {};
  }
  std::atomic<int64_t> unmet{rows.rows};
  run(ProjectedLossOfRows(loss, &unmet), out);
  return unmet == rows.rows ? Check{} : Check{Fault::bounds, unmet};
}

void row_gradient(const Rows& rows, const Terms& terms, Divisors divisors, Upstream upstream, const Outputs& given) {
  const Outputs from = streamed(rows, given, 4);
  if (rows.extended(terms)) return extended_row_gradient(rows, terms, divisors, upstream, from);
  if (!rows.target.data) return run_gradient(TeacherLossOfRows{rows, terms, divisors, rows.wide()}, upstream, from);
  const StudentLossOfRows loss{rows, terms, divisors, rows.wide(), needs_of(terms, false), Matrix{}};
  if (!rows.constraints.bounds) return run_gradient(loss, upstream, from);
  std::atomic<int64_t> unmet{rows.rows};
  run_gradient(ProjectedLossOfRows(loss, &unmet), upstream, from);
}

}  // namespace cudfast
