// Both losses of one row by the textbook, in double.
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

Truth student_truth(const std::vector<double>& s, const std::vector<double>& t, int64_t label, double tau,
                    const StudentOptions& o) {
  const size_t n = s.size();
  std::vector<double> log_q(n);
  const double lt = log_sum_exp(t, 1);
  size_t k = 0;
  for (size_t j = 0; j < n; ++j) {
    log_q[j] = t[j] - lt;
    if (t[j] > t[k]) k = j;
  }
  const auto y = static_cast<size_t>(label);
  if (o.clip && k != y) {
    const double pk = std::exp(log_q[k]), py = std::exp(log_q[y]);
    const double delta = std::fmin(o.budget * pk, o.margin * (pk - py));
    log_q[k] = std::log(pk - delta);
    log_q[y] = std::log(py + delta);
  }
  const double lq = log_sum_exp(log_q, 1 / tau), ls = log_sum_exp(s, 1 / tau), l1 = log_sum_exp(s, 1);
  Truth truth;
  truth.gradient.resize(n);
  double kl = 0;
  for (size_t j = 0; j < n; ++j) {
    const double a = log_q[j] / tau - lq, b = s[j] / tau - ls;
    kl += std::exp(a) * (a - b);
    truth.gradient[j] =
        o.kd_weight * tau * (std::exp(b) - std::exp(a)) + o.ce_weight * (std::exp(s[j] - l1) - (j == y ? 1.0 : 0.0));
  }
  truth.loss = o.kd_weight * tau * tau * kl + o.ce_weight * (l1 - s[y]);
  return truth;
}

// Its gradient is left to central differences.
double teacher_truth(const std::vector<double>& v, size_t label, const TeacherOptions& o) {
  const double lz = log_sum_exp(v, 1), log_p = v[label] - lz, p = std::exp(log_p);
  double entropy = 0;
  for (double x : v) entropy -= std::exp(x - lz) * (x - lz);
  const double w = (p < o.gate_threshold ? 1.0 : 0.0) + o.gate_scale * std::pow(1 - p, o.gate_power);
  return -o.ce_weight * log_p - o.focal_weight * std::pow(1 - p, o.gamma) * log_p - o.entropy_weight * w * entropy;
}

template <class T>
Matrix dense(std::vector<T>& v, int64_t rows, int64_t width, DType dtype) {
  return {reinterpret_cast<char*>(v.data()), rows, 0, width, dtype};
}

}  // namespace
}  // namespace cudfast
