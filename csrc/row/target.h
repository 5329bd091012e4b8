// Calibration: which coordinates of the teacher change, and to what.                                      Eq. 4-8
#pragma once

#include "state.h"

namespace cudfast {
namespace {

// W-Clip moves delta = min(budget * p_k, margin * (p_k - p_y)) from the top-1 to the label. With u = t_y - m_t the
// partition function cancels: r = delta * Z1 = min(budget, -margin * expm1(u)).                              [clip]
template <class R>
struct Clip {
  R r = 0;    // moved mass times Z1; 0 when nothing moves
  R t_k = 0;  // new teacher logit of the top-1, minus m_t
  R t_y = 0;  // new teacher logit of the label, minus m_t
};

template <class R>
inline Clip<R> wclip(R u, R budget, R margin) {
  Clip<R> clip;
  const R below_one = std::expm1(u);
  const R gap = -margin * below_one;
  clip.r = budget < gap ? budget : gap;
  clip.t_y = u;
  if (clip.r > 0) {  // r = 0 leaves both logits exactly as they are, whatever u is
    clip.t_k = std::log1p(-clip.r);
    clip.t_y = std::log((1 + below_one) + clip.r);
  }
  return clip;
}

// The teacher's sums after the clip: two contributions leave, two come in.                                [replace]
template <class R>
struct TargetSums {
  R z_tau, a, impossible;
};

template <class R>
inline TargetSums<R> replace(const StudentState<R>& state, const Clip<R>& clip, R inv_tau) {
  TargetSums<R> sums{state.z_tau, state.a, state.impossible};
  if (!(clip.r > 0)) return sums;
  const R w_k = (state.s_k - state.m_s) * inv_tau;
  const R w_y = (state.s_y - state.m_s) * inv_tau;
  const R new_k = clip.t_k * inv_tau;
  const R new_y = clip.t_y * inv_tau;
  if (w_k == kNothing<R> || w_y == kNothing<R>) {  // the clip gives the label mass that the student cannot have
    sums.impossible = 1;
    return sums;
  }
  const R mass_k = std::exp(new_k);
  const R mass_y = std::exp(new_y);
  sums.z_tau += (mass_k - 1) + mass_y;  // exp((t_k - m_t) / tau) was exactly 1
  sums.a += (mass_k * (new_k - w_k) + w_k) + mass_y * (new_y - w_y);
  if (state.t_y > kNothing<R>) {  // a label at -inf had contributed nothing
    const R old_y = (state.t_y - state.m_t) * inv_tau;
    const R mass_old = std::exp(old_y);
    sums.z_tau -= mass_old;
    sums.a -= mass_old * (old_y - w_y);
  }
  return sums;
}

}  // namespace
}  // namespace cudfast
