// csrc/row and csrc/cpu without Python: merges of random splits, terms against a plain double-precision loop, exp
// against libm, half conversions against every bit pattern. Runs under the address and undefined-behaviour sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../../csrc/cpu/simd.h"
#include "../../csrc/cpu/sweeps.h"
#include "../../csrc/launch.h"
#include "../../csrc/row/element.h"
#include "truth.h"

using namespace cudfast;

namespace {

int failures = 0;

void expect(bool good, const char* what, double got, double wanted) {
  if (good) return;
  std::printf("FAIL %s [%s]: got %.17g, wanted %.17g\n", what, sweeps().isa, got, wanted);
  ++failures;
}

void near(const char* what, double got, double wanted, double tolerance) {
  const bool same = got == wanted || (std::isnan(got) && std::isnan(wanted));
  expect(same || std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted)), what, got, wanted);
}

// The definition, one column at a time, relative to the part's own maxima.
StudentState<double> part_of(const std::vector<double>& s, const std::vector<double>& t, size_t from, size_t to,
                             double inv_tau) {
  StudentState<double> state;
  for (size_t j = from; j < to; ++j) {
    if (t[j] > state.m_t) {
      state.m_t = t[j];
      state.k = static_cast<int64_t>(j);
      state.s_k = s[j];
    }
    state.m_s = s[j] > state.m_s ? s[j] : state.m_s;
  }
  StudentSums<double> sums{};
  const double c_t = state.m_t == kNothing<double> ? 0 : state.m_t, c_s = state.m_s == kNothing<double> ? 0 : state.m_s;
  for (size_t j = from; j < to; ++j)
    fold<0, kStudentOne | kTeacherOne | kStudentEntropy, kHoles>(sums, t[j] - c_t, s[j] - c_s, inv_tau);
  state.z_tau = sums.z_tau;
  state.s_tau = sums.s_tau;
  state.a = sums.a;
  state.s_one = sums.s_one;
  state.z_one = sums.z_one;
  state.impossible = sums.impossible;
  state.e_s = sums.e_s;
  return state;
}

void test_merge() {
  Random random(1);
  for (int trial = 0; trial < 200; ++trial) {
    const int n = 2 + trial % 60;
    const double tau = 0.5 + 0.1 * (trial % 40), inv_tau = 1 / tau;
    auto s = normal(random, n, 10), t = normal(random, n, 10);
    if (trial % 3 == 0) t[static_cast<size_t>(n / 2)] = kNothing<double>;
    if (trial % 5 == 0) s[static_cast<size_t>(n / 3)] = kNothing<double>;
    if (trial % 7 == 0) t[0] = t[static_cast<size_t>(n - 1)] = 50;  // a tie across the cut
    const auto size = static_cast<size_t>(n), cut = static_cast<size_t>(1 + trial % (n - 1));
    const auto whole = part_of(s, t, 0, size, inv_tau);
    const auto left = part_of(s, t, 0, cut, inv_tau), right = part_of(s, t, cut, size, inv_tau);
    for (const auto& both : {merge(left, right, inv_tau), merge(right, left, inv_tau),
                             merge(merge(StudentState<double>{}, left, inv_tau), right, inv_tau)}) {
      near("merge m_t", both.m_t, whole.m_t, 0);
      near("merge m_s", both.m_s, whole.m_s, 0);
      near("merge k", static_cast<double>(both.k), static_cast<double>(whole.k), 0);
      near("merge s_k", both.s_k, whole.s_k, 0);
      near("merge z_tau", both.z_tau, whole.z_tau, 1e-12);
      near("merge s_tau", both.s_tau, whole.s_tau, 1e-12);
      if (whole.impossible == 0) near("merge a", both.a, whole.a, 1e-11);  // else the loss is inf, whatever a is
      near("merge s_one", both.s_one, whole.s_one, 1e-12);
      near("merge z_one", both.z_one, whole.z_one, 1e-12);
      near("merge e_s", both.e_s, whole.e_s, 1e-11);
      near("merge impossible", both.impossible, whole.impossible, 0);
    }
  }
}

template <class T>
void test_student(int64_t n_rows, int n, double tau, int threads, const Terms& terms) {
  const DType dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
  Random random(static_cast<uint64_t>(n));
  std::vector<T> s, t;
  std::vector<T> g(static_cast<size_t>(n_rows * n), std::numeric_limits<T>::quiet_NaN());
  std::vector<int64_t> labels;
  for (int64_t row = 0; row < n_rows; ++row) {
    for (double x : normal(random, n, 3)) s.push_back(static_cast<T>(x));
    for (double x : normal(random, n, 4)) t.push_back(static_cast<T>(x));
    labels.push_back((row * 7919) % n);
  }
  Rows rows;
  rows.rows = n_rows;
  rows.classes = rows.padded = n;
  rows.logits = dense(s, n_rows, n, dtype);
  rows.target = dense(t, n_rows, n, dtype);
  rows.labels = labels.data();
  rows.scalar = tau;
  rows.threads = threads;
  std::vector<T> loss(static_cast<size_t>(n_rows)), state(static_cast<size_t>(n_rows * student_columns(true)));
  std::vector<int64_t> top1(static_cast<size_t>(n_rows));
  Outputs out;
  out.loss = loss.data();
  out.per_row_loss = true;
  out.state = state.data();
  out.top1 = top1.data();
  out.gradient = dense(g, n_rows, n, dtype);
  row_state(rows, terms, false, Divisors{}, out);
  const double loss_tolerance = sizeof(T) == 4 ? 2e-6 * (tau > 1 ? tau * tau : 1) : 1e-12;
  const double gradient_tolerance = sizeof(T) == 4 ? 1e-6 * (tau > 1 ? tau : 1) : 1e-13;
  for (int64_t row = 0; row < n_rows; ++row) {
    const auto at = static_cast<size_t>(row * n), end = at + static_cast<size_t>(n);
    const Truth truth = row_truth({s.begin() + static_cast<long>(at), s.begin() + static_cast<long>(end)},
                                  {t.begin() + static_cast<long>(at), t.begin() + static_cast<long>(end)},
                                  labels[static_cast<size_t>(row)], tau, terms);
    near("student loss", static_cast<double>(loss[static_cast<size_t>(row)]), truth.loss, loss_tolerance);
    for (size_t j = at; j < end; ++j) {
      near("student gradient", static_cast<double>(g[j]), truth.gradient[j - at], gradient_tolerance);
    }
  }
  // From the saved state, written over the logits: bitwise equal.
  Outputs from = out;
  from.gradient = rows.logits;
  row_gradient(rows, terms, Divisors{}, Upstream{}, from);
  for (size_t j = 0; j < g.size(); ++j) {
    near("gradient from state", static_cast<double>(s[j]), static_cast<double>(g[j]), sizeof(T) == 4 ? 1e-6 : 1e-13);
  }
}

template <class T>
void test_teacher(int n, const Terms& terms) {
  const DType dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
  Random random(static_cast<uint64_t>(n) + 17);
  std::vector<T> z;
  for (double x : normal(random, n, 3)) z.push_back(static_cast<T>(x));
  std::vector<T> g(static_cast<size_t>(n));
  std::vector<int64_t> labels{n / 2};
  Rows rows;
  rows.rows = 1;
  rows.classes = rows.padded = n;
  rows.logits = dense(z, 1, n, dtype);
  rows.labels = labels.data();
  T loss = 0;
  std::vector<T> state(kTeacherColumns);
  Outputs out;
  out.loss = &loss;
  out.state = state.data();
  out.gradient = dense(g, 1, n, dtype);
  row_state(rows, terms, false, Divisors{}, out);

  const auto value = [&](const std::vector<double>& v) { return row_truth(v, {}, n / 2, 1, terms).loss; };
  std::vector<double> v(z.begin(), z.end());
  near("teacher loss", static_cast<double>(loss), value(v), sizeof(T) == 4 ? 2e-6 : 1e-12);
  for (size_t j = 0; j < v.size(); j += 1 + v.size() / 20) {  // central differences
    const double x = v[j], h = 1e-5;
    v[j] = x + h;
    const double above = value(v);
    v[j] = x - h;
    const double below = value(v);
    v[j] = x;
    near("teacher gradient", static_cast<double>(g[j]), (above - below) / (2 * h), sizeof(T) == 4 ? 1e-6 : 1e-8);
  }
}

// Coefficients of rows, terms of weight 0, rows without labels, logits of -inf.
void test_weights() {
  const int64_t n = 4, v = 300;
  const double inf = std::numeric_limits<double>::infinity();
  Random random(3);
  std::vector<double> s = normal(random, static_cast<int>(n * v), 2), t = normal(random, static_cast<int>(n * v), 2);
  std::vector<double> g(s.size());
  std::vector<int64_t> labels{1, 2, -1, 4};
  s[static_cast<size_t>(v + 2)] = -inf;                                          // the label of a row that counts it 0
  s[static_cast<size_t>(3 * v + 9)] = t[static_cast<size_t>(3 * v + 9)] = -inf;  // impossible for both
  const std::vector<double> own{1, 0, 0.5, 1, 2, 0, 3, 0.25, 0.1, 0.2, 0.3, 0.4, 0, 0.01, 0.02, 0.03};
  const Terms terms = terms_of({{kForwardKl, 9}, {kCrossEntropy, 9}, {kEntropy, 9}, {kZLoss, 9}});
  Rows rows;
  rows.rows = n;
  rows.classes = rows.padded = v;
  rows.logits = dense(s, n, v, DType::f64);
  rows.target = dense(t, n, v, DType::f64);
  rows.labels = labels.data();
  rows.scalar = 2;
  rows.coefficients = own.data();
  rows.coefficients_per_row = true;
  double loss[4];
  Outputs out;
  out.loss = loss;
  out.per_row_loss = true;
  out.gradient = dense(g, n, v, DType::f64);
  row_state(rows, terms, false, Divisors{}, out);
  for (size_t row = 0; row < 4; ++row) {
    Terms weighted = terms;
    for (size_t i = 0; i < 4; ++i) weighted.term[i].coefficient = own[i * 4 + row];
    if (labels[row] < 0) weighted.term[1].coefficient = 0;
    const size_t hole = row == 1 ? 2 : row == 3 ? 9 : static_cast<size_t>(v);
    std::vector<double> a, b;
    for (size_t j = 0; j < static_cast<size_t>(v); ++j) {
      if (j == hole) continue;
      a.push_back(s[row * static_cast<size_t>(v) + j]);
      b.push_back(t[row * static_cast<size_t>(v) + j]);
    }
    if (row == 1) {  // without terms of weight 0, which would be inf
      weighted = terms_of({weighted.term[2], weighted.term[3]});
    }
    const int64_t label = row == 1 || labels[row] < 0 ? 0 : labels[row];
    const Truth truth = row_truth(a, b, label, 2, weighted);
    near("weighted loss", loss[row], truth.loss, 1e-12);
    for (size_t j = 0, i = 0; j < static_cast<size_t>(v); ++j) {
      const double wanted = j == hole ? 0 : truth.gradient[i++];
      near("weighted gradient", g[row * static_cast<size_t>(v) + j], wanted, 1e-13);
    }
  }
  const double wrong = inf;
  rows.coefficients = &wrong;
  rows.coefficients_per_row = false;
  near("a coefficient of inf", check(rows, terms_of({{kZLoss, 1}})).fault == Fault::coefficient ? 1 : 0, 1, 0);
}

template <class T>
void test_exp(const char* what, T lowest, void (*run)(const T*, T*, int64_t)) {
  const int n = 1 << 20;
  std::vector<T> x(static_cast<size_t>(n)), y(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) x[static_cast<size_t>(i)] = lowest * static_cast<T>(i) / static_cast<T>(n);
  run(x.data(), y.data(), n);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double truth = std::exp(static_cast<long double>(x[i]));
    const T near_truth = static_cast<T>(truth);
    const long double ulp = std::nextafter(near_truth, std::numeric_limits<T>::infinity()) - near_truth;
    const double error = static_cast<double>(std::fabs((static_cast<long double>(y[i]) - truth) / ulp));
    worst = error > worst ? error : worst;
  }
  expect(worst <= kExpUlp<T>, what, worst, kExpUlp<T>);
  const T special[4] = {0, lowest * 2, -std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()};
  T result[4];
  run(special, result, 4);
  near("exp(0)", static_cast<double>(result[0]), 1, 0);
  near("exp far below", static_cast<double>(result[1]), 0, 0);
  near("exp(-inf)", static_cast<double>(result[2]), 0, 0);
  expect(std::isnan(result[3]), "exp(NaN)", static_cast<double>(result[3]), NAN);
}

void test_halves() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto h = static_cast<uint16_t>(bits);
    const float f = widen_half(h), b = widen_bfloat(h);
    if (std::isnan(f)) {
      expect(std::isnan(widen_half(narrow_half(f))), "half NaN", 0, 0);
    } else {
      near("half round trip", narrow_half(f), h, 0);
    }
    if (std::isnan(b)) {
      expect(std::isnan(widen_bfloat(narrow_bfloat(b))), "bfloat NaN", 0, 0);
    } else {
      near("bfloat round trip", narrow_bfloat(b), h, 0);
    }
  }
  near("half ties to even", narrow_half(1.0f + 0x1p-11f), 0x3c00, 0);
  near("half rounds up", narrow_half(1.0f + 0x1.8p-10f), 0x3c02, 0);
  near("half overflow", narrow_half(65520.0f), 0x7c00, 0);
  near("half below overflow", narrow_half(65519.0f), 0x7bff, 0);
  near("half subnormal", narrow_half(0x1p-24f), 1, 0);
  near("half subnormal tie", narrow_half(0x1p-25f), 0, 0);
  near("bfloat ties to even", narrow_bfloat(1.0f + 0x1p-8f), 0x3f80, 0);
}

}  // namespace

int main() {
  test_merge();
  test_halves();
  int count = 0;
  const char* const* names = runnable(count);
  for (int i = 0; i < count; ++i) {
    use(names[i]);
    test_exp<float>("exp float", -87.32f, sweeps().exp32);
    test_exp<double>("exp double", -708.38, sweeps().exp64);
    for (int n : {1, 2, 3, 7, 8, 15, 16, 17, 77, 255, 1000, 2047, 2048, 2049, 5000}) {
      for (double tau : {1.0, 2.0, 4.0, 3.0}) {
        for (const Terms& terms : {student_terms(), mixed_terms()}) {
          test_student<float>(3, n, tau, 1, terms);
          test_student<double>(2, n, tau, 1, terms);
        }
      }
      for (const Terms& terms : {teacher_terms(), terms_of({{kEntropy, -0.5}, {kZLoss, 0.02}})}) {
        test_teacher<float>(n, terms);
        test_teacher<double>(n, terms);
      }
    }
    for (const Terms& terms : {student_terms(), mixed_terms()}) {
      test_student<float>(2, 40000, 2.0, 2, terms);  // columns over threads
      test_student<float>(40, 3000, 2.0, 2, terms);  // rows over threads
    }
    test_weights();
    std::printf("%s: ok so far, %d failures\n", names[i], failures);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
