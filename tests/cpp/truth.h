// Terms of one row by the textbook, in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "../../csrc/launch.h"

namespace cudfast {
namespace {

using Random = std::mt19937_64;

inline std::vector<double> normal(Random& random, int n, double scale) {
  std::normal_distribution<double> distribution(0, scale);
  std::vector<double> values(static_cast<size_t>(n));
  for (double& value : values) value = distribution(random);
  return values;
}

// Columns are all finite.
struct Truth {
  double loss = 0;
  std::vector<double> gradient;
};

double log_sum_exp(const std::vector<double>& v, double inv_tau) {
  double m = kNothing<double>, sum = 0;
  for (double x : v) m = x > m ? x : m;
  for (double x : v) sum += std::exp((x - m) * inv_tau);
  return m * inv_tau + std::log(sum);
}

// The target's log probabilities at temperature 1, after the clip.
std::vector<double> target_truth(const std::vector<double>& t, size_t y, const Terms& terms) {
  const double lt = log_sum_exp(t, 1);
  std::vector<double> log_q(t.size());
  size_t k = 0;
  for (size_t j = 0; j < t.size(); ++j) {
    log_q[j] = t[j] - lt;
    if (t[j] > t[k]) k = j;
  }
  if (terms.clip && k != y) {
    const double pk = std::exp(log_q[k]), py = std::exp(log_q[y]);
    const double delta = std::fmin(terms.budget * pk, terms.margin * (pk - py));
    log_q[k] = std::log(pk - delta);
    log_q[y] = std::log(py + delta);
  }
  return log_q;
}

// t: empty without a target. The gradient leaves out focal and gated entropy, for which there are central differences.
Truth row_truth(const std::vector<double>& s, const std::vector<double>& t, int64_t label, double tau,
                const Terms& terms) {
  const size_t n = s.size();
  const auto y = static_cast<size_t>(label);
  const double ls = log_sum_exp(s, 1), log_p = s[y] - ls, p_y = std::exp(log_p);
  double entropy = 0;
  for (double x : s) entropy -= std::exp(x - ls) * (x - ls);
  Truth truth;
  truth.gradient.resize(n);
  for (int i = 0; i < terms.count; ++i) {
    const Term& term = terms.term[i];
    const double c = term.coefficient;
    if (term.kind == kForwardKl) {
      const std::vector<double> log_q = target_truth(t, y, terms);
      const double lq = log_sum_exp(log_q, 1 / tau), l_tau = log_sum_exp(s, 1 / tau);
      for (size_t j = 0; j < n; ++j) {
        const double a = log_q[j] / tau - lq, b = s[j] / tau - l_tau;
        truth.loss += c * tau * tau * std::exp(a) * (a - b);
        truth.gradient[j] += c * tau * (std::exp(b) - std::exp(a));
      }
    } else if (term.kind == kCrossEntropy) {
      truth.loss -= c * log_p;
      for (size_t j = 0; j < n; ++j) truth.gradient[j] += c * (std::exp(s[j] - ls) - (j == y ? 1 : 0));
    } else if (term.kind == kFocal) {
      truth.loss -= c * term.b * std::pow(1 - p_y, term.a) * log_p;
    } else if (term.kind == kEntropy) {
      truth.loss += c * entropy;
      for (size_t j = 0; j < n; ++j) truth.gradient[j] -= c * std::exp(s[j] - ls) * (s[j] - ls + entropy);
    } else if (term.kind == kGatedEntropy) {
      truth.loss += c * ((p_y < term.a ? 1 : 0) + term.b * std::pow(1 - p_y, term.c)) * entropy;
    } else {
      truth.loss += c * ls * ls;
      for (size_t j = 0; j < n; ++j) truth.gradient[j] += 2 * c * ls * std::exp(s[j] - ls);
    }
  }
  return truth;
}

inline Terms terms_of(std::initializer_list<Term> terms, bool clip = false, double budget = 0, double margin = 1) {
  return make_terms(terms.begin(), static_cast<int>(terms.size()), clip, budget, margin);
}

// The presets of the two losses.
inline Terms student_terms() { return terms_of({{kForwardKl, 0.8}, {kCrossEntropy, 0.2}}, true, 0.5, 0.7); }
inline Terms teacher_terms() {
  return terms_of({{kCrossEntropy, 1}, {kFocal, 1, 2.5, 1}, {kGatedEntropy, -0.1, 0.5, 1, 0.5, 1}});
}
// With a target, every term whose gradient is in row_truth().
inline Terms mixed_terms() {
  return terms_of({{kForwardKl, 0.8}, {kCrossEntropy, 0.2}, {kEntropy, -0.3}, {kZLoss, 0.01}}, true, 0.5, 0.7);
}

template <class T>
Matrix dense(std::vector<T>& v, int64_t rows, int64_t width, DType dtype) {
  return {reinterpret_cast<char*>(v.data()), rows, 0, width, dtype};
}

}  // namespace
}  // namespace cudfast
