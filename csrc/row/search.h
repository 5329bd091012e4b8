// The search for the inverse temperature at which a row's entropy meets a bound: the next places, and the end of the
// search.
#pragma once

#include "target.h"

namespace cudfast {
namespace {

constexpr int kSweeps = 12;  // over the teacher's row
constexpr int kSteps = 8;    // sweeps, after which every further one evaluates several places
constexpr int kPlaces = 4;
constexpr double kNats = 1e-5;    // largest distance of the entropy from its bound
constexpr double kHottest = 1e6;  // T is searched up to this value, and down to its inverse

struct Search {
  bool wide = false;
  bool floor = false;
  double wanted = 0;
  End<double> low = {}, high = {};
  int sweeps = 0;
  double beta = 1;              // current value
  double places[kPlaces] = {};  // betas for the next sweep, and their number
  int count = 1;
  double slope = 0;           // of the last sweep that had one
  bool near = false;          // so near that the next step usually is the last
  bool out_of_reach = false;  // no temperature meets the bound

  CUDFAST_HD double tolerance() const { return wide ? 1e-12 : 5e-6; }

  // Whether the entropy at beta = 1 misses a bound. Then the next sweep is at the end, where T is infinite for a floor
  // and nearly 0 for a ceiling.
  CUDFAST_HD bool misses(double entropy, double least, double most) {
    floor = entropy < least - tolerance();
    if (!floor && !(entropy > most + tolerance())) return false;
    wanted = floor ? least : most;
    places[0] = floor ? 0 : kHottest;
    return true;
  }

  // Whether the bound is met between beta = 1 and that end; if not, the search is over.
  CUDFAST_HD bool reaches(const End<double>& end) {
    const double missed = end.found.value - wanted;
    if (!(floor ? missed <= 0 : missed >= 0)) return true;
    beta = floor ? 1 / kHottest : kHottest;
    out_of_reach = std::fabs(missed) > kNats;
    return false;
  }

  // Starts between that end and beta = 1; for a ceiling, which is far from there, a sweep has computed the slope at 1.
  CUDFAST_HD void start(const End<double>& end, const End<double>& one) {
    low = floor ? end : one;
    high = floor ? one : end;
    sweeps = floor ? 2 : 3;
  }

  // Moves to the next beta. Returns whether it is so near that the next fold can replace a sweep.
  CUDFAST_HD bool step() {
    const double before = beta;
    beta = places[0] = max(temper(low, high, wanted), 1 / kHottest);
    count = sweeps < kSteps ? 1 : kPlaces;
    for (int i = 1; i < count; ++i) places[i] = max(spread(low, high, beta, double(i) / count), 1 / kHottest);
    return near && count == 1 && std::fabs(beta - before) < before / 16;
  }

  // Takes the results of a sweep at its places; a fold has one, without a slope. Returns whether the search is over.
  CUDFAST_HD bool took(const End<double>* found) {
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
    if (!(least > tolerance())) return true;
    near = least < (wide ? 1e-6 : 3e-3) && !folded;
    if (++sweeps < kSweeps) return false;
    // Out of sweeps: the side that meets the bound.
    if (least > kNats) beta = floor ? max(low.beta, 1 / kHottest) : high.beta;
    return true;
  }
};

}  // namespace
}  // namespace cudfast
