// The search for the inverse temperature at which a row's entropy meets a bound: where to look next, and when it is
// over.
#pragma once

#include "../row/target.h"

namespace cudfast {
namespace {

constexpr int kSweeps = 12;  // over the teacher's row
constexpr int kSteps = 8;    // sweeps, after which every further one looks at several places
constexpr int kPlaces = 4;
constexpr double kNats = 1e-5;    // how far the entropy may stay from its bound
constexpr double kHottest = 1e6;  // T is looked for up to here, down to its inverse

inline double entropy_tolerance(bool wide) { return wide ? 1e-12 : 5e-6; }

struct Search {
  bool wide;
  bool floor;
  double wanted;
  End<double> low, high;
  int sweeps;
  double beta = 1;              // where it stands
  double places[kPlaces] = {};  // where the next sweep looks, and how many they are
  int count = 1;
  double slope = 0;   // of the last sweep that had one
  bool near = false;  // so near that the next step mostly arrives

  // Goes on to the next beta. Whether that is near enough for the fold that follows to find out.
  bool step() {
    const double last = beta;
    beta = places[0] = max(temper(low, high, wanted), 1 / kHottest);
    count = sweeps < kSteps ? 1 : kPlaces;
    for (int i = 1; i < count; ++i) places[i] = max(spread(low, high, beta, double(i) / count), 1 / kHottest);
    return near && count == 1 && std::fabs(beta - last) < last / 16;
  }

  // What a sweep found at its places; a fold has one, and no slope. Whether the search is over with this.
  bool took(const End<double>* found) {
    const bool folded = std::isnan(found[0].found.slope);
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < count; ++i) {
      End<double> here = found[i];
      if (folded) here.found.slope = slope;  // it was near
      const double missed = here.found.value - wanted;
      if (!(std::fabs(missed) >= least)) {
        least = std::fabs(missed);
        beta = here.beta;
        slope = here.found.slope;
      }
      if (missed > 0 ? here.beta > low.beta : here.beta < high.beta) (missed > 0 ? low : high) = here;
    }
    if (!(least > entropy_tolerance(wide))) return true;
    near = least < (wide ? 1e-6 : 3e-3) && !folded;
    if (++sweeps < kSweeps) return false;
    // Out of sweeps: the side that meets the bound.
    if (least > kNats) beta = floor ? max(low.beta, 1 / kHottest) : high.beta;
    return true;
  }
};

}  // namespace
}  // namespace cudfast
