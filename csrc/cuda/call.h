// One launch of a row kernel, and the assignment of rows to blocks.
#pragma once

#include "../launch.h"
#include "executor.h"

namespace cudfast {

// In place of a DType that is unknown at compile time.
constexpr int kAny = -1;

// The source of a row's state: its logits, the states of its parts, or an earlier call.
enum class From : int { logits, parts, state };

// The argument of a kernel; plain data. Pointers are the device's.
struct Call {
  Rows rows;
  const double* divisors = nullptr;  // (2,): of terms that need no label, of those that do
  Outputs out;                       // the loss is f64, one per row
  Upstream upstream;
  From from = From::logits;
  bool statistics = false;
  void* parts = nullptr;  // (N, part_count) states in f64; written when only_parts
  int part_count = 1;
  bool only_parts = false;
  int split = 1;  // blocks that share a row in this launch
  int slots = 0;  // chunks of a row that fit into a block's shared memory
};

// The values of a row besides its logits and coefficients. The host reads no values: a label that is not a class, or a
// weight or temperature out of range, makes the loss of its row NaN.
struct Marks {
  bool ignored;
  bool labelled;
  int64_t label;  // a class, or -1
  double temperature;
  double weight;
};

CUDFAST_HD inline Marks marks(const Rows& rows, int64_t row) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Marks m{rows.ignored(row), rows.labelled(row), -1, rows.temperature_at(row), rows.weight_at(row)};
  if (m.labelled) m.label = rows.labels[row];
  const bool no_class = m.labelled && (m.label < 0 || m.label >= rows.classes);
  if (no_class) m.label = -1;
  if (no_class || !(m.weight >= 0 && m.weight <= std::numeric_limits<double>::max())) m.weight = nan;
  if (rows.temperature && !(m.temperature >= kLowestTemperature && m.temperature <= kHighestTemperature)) {
    m.temperature = nan;
  }
  return m;
}

}  // namespace cudfast
