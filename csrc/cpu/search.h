// The search for the inverse temperature at which a row's entropy meets a bound: where to look next, and when it is
// over.
#pragma once

#include "../row/target.h"

namespace cudfast {
namespace {

constexpr int kSweeps = 12;       // over the teacher's row
constexpr double kNats = 1e-5;    // how far the entropy may stay from its bound
constexpr double kHottest = 1e6;  // T is looked for up to here, down to its inverse

inline double entropy_tolerance(bool wide) { return wide ? 1e-12 : 5e-6; }

struct Search {
  bool wide;
  bool floor;
  double wanted;
  End<double> low, high;
  int sweeps;
  double beta = 1;    // where it stands
  double slope = 0;   // of the last sweep that had one
  bool near = false;  // so near that the next step mostly arrives

  // Goes on to the next beta. Whether that is near enough for the fold that follows to find out.
  bool step() {
    const double last = beta;
    beta = max(temper(low, high, wanted), 1 / kHottest);
    return near && std::fabs(beta - last) < last / 16;
  }

  // What a sweep found; a fold finds no slope. Whether the search is over with this.
  bool took(End<double> here) {
    const bool folded = std::isnan(here.found.slope);
    if (folded) here.found.slope = slope;  // it was near
    slope = here.found.slope;
    const double missed = here.found.value - wanted;
    if (!(std::fabs(missed) > entropy_tolerance(wide))) return true;
    (missed > 0 ? low : high) = here;
    near = std::fabs(missed) < (wide ? 1e-6 : 3e-3) && !folded;
    if (++sweeps < kSweeps) return false;
    // Out of sweeps: the side that meets the bound.
    if (std::fabs(missed) > kNats) beta = floor ? max(low.beta, 1 / kHottest) : high.beta;
    return true;
  }
};

}  // namespace
}  // namespace cudfast
