// A term of the loss: a scalar function of four values of a row, with its slopes. It knows nothing of sweeps.
#pragma once

#include <cmath>

#include "../state.h"

namespace cudfast {

// Data without functions, so that files for different instruction sets can share it.
struct Term {
  int kind = 0;
  double coefficient = 1;
  double a = 0, b = 0, c = 0, d = 0;  // the kind's own parameters
};

constexpr int kMaxTerms = 8;

// All terms of a loss, and W-Clip. Made by make_terms().
struct Terms {
  int count = 0;
  Term term[kMaxTerms] = {};
  bool clip = false;  // whether labelled rows are calibrated by W-Clip
  double budget = 0, margin = 1;
  int sums = 0;                    // that terms or a call's values read: a mask of Needs
  double teacher_temperature = 0;  // 0: the student's
  double leaving = 0;              // teacher temperatures below it may be recalibrated: see target.h
  // What some of the terms need:
  bool distils = false;    // forward_kl, reverse_kl
  bool labelled = false;   // log_p, in rows with a label
  bool entropy = false;    // entropy
  bool partition = false;  // entropy or lse, in rows without a label, too
};

// The numbers are part of the interface to Python.
enum Kind : int { kForwardKl, kCrossEntropy, kFocal, kEntropy, kGatedEntropy, kZLoss, kReverseKl, kUniformShare };

namespace {

// Values of one row. All but forward_kl are of the student at temperature 1, or of the only model.
template <class R>
struct RowValues {
  R forward_kl = 0;  // tau^2 KL(q || p)
  R log_p = 0;       // of the label
  R entropy = 0;     // nats
  R lse = 0;         // log sum exp(s)
};

// The derivatives of a term with respect to these.
template <class R>
struct Slopes {
  R forward_kl = 0, log_p = 0, entropy = 0, lse = 0;
};

template <class R, class S = Slopes<R>>
struct Evaluated {
  R value = 0;
  S slopes;
};

// Values and slopes of a row with the sums of extended.h.
template <class R>
struct ExtendedValues : RowValues<R> {
  R reverse_kl = 0;  // tau^2 KL(p || q)
  R uniform = 0;     // mean of c_j log p_j over the n classes with s_j > -inf
};
template <class R>
struct ExtendedSlopes : Slopes<R> {
  R reverse_kl = 0, uniform = 0;
};

// A function of log_p alone.
template <class R>
struct Curve {
  R value = 0;
  R slope = 0;
};

// Whether a term counts in rows with a label only.
CUDFAST_HD inline bool needs_label(int kind) {
  constexpr int kinds = 1 << kCrossEntropy | 1 << kFocal | 1 << kGatedEntropy | 1 << kUniformShare;
  return (kinds >> kind & 1) != 0;
}

// `count` is at most kMaxTerms.
inline Terms make_terms(const Term* term, int count, bool clip, double budget, double margin, int sums = 0,
                        double teacher_temperature = 0, double leaving = 0) {
  Terms terms;
  terms.clip = clip;
  terms.budget = budget;
  terms.margin = margin;
  terms.sums = sums;
  terms.teacher_temperature = teacher_temperature;
  terms.leaving = leaving;
  for (int t = 0; t < count; ++t) {
    const int kind = term[t].kind;
    terms.term[terms.count++] = term[t];
    terms.distils |= kind == kForwardKl || kind == kReverseKl;
    terms.labelled |= needs_label(kind);
    terms.entropy |= kind == kEntropy || kind == kGatedEntropy;
    terms.partition |= kind == kEntropy || kind == kZLoss;
  }
  return terms;
}

}  // namespace
}  // namespace cudfast
