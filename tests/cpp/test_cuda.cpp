// Every CUDA kernel in the emulation, against a plain double-precision loop. Bounds and alignment are checked on each
// access, and shared memory is NaN before it is written. Runs under the sanitizers, too.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda_cases.h"

namespace {

// The same call again, with the gradient written over the logits: blocks of a cluster must have read them before.
void test_over_logits(const std::string& what, Call call, const Terms& terms, const Machine& machine, Logits logits,
                      const std::vector<double>& gradient, double tolerance) {
  const auto n = static_cast<size_t>(call.rows.rows);
  const auto wanted = static_cast<const double*>(call.out.loss);
  std::vector<double> loss(n);
  call.rows.logits = call.out.gradient = logits.matrix(call.rows.rows);
  call.out.loss = loss.data();
  sweep(kernels<Where::emulated>(), call, terms, machine, nullptr);
  for (size_t row = 0; row < n; ++row) near(what + " loss, over the logits", loss[row], wanted[row], tolerance);
  for (size_t i = 0; i < gradient.size(); ++i) {
    near(what + " gradient, over the logits", logits.get(static_cast<int64_t>(i)), gradient[i],
         tolerance + 2 * rounding(logits.dtype));
  }
}

// With a target, without what comes back.
Call student_call(const Case& c, Logits& s, Logits& t, const std::vector<int64_t>& labels) {
  Call call;
  call.rows.rows = c.rows;
  call.rows.classes = c.classes;
  call.rows.padded = s.width;
  call.rows.logits = s.matrix(c.rows);
  call.rows.target = t.matrix(c.rows);
  call.rows.labels = labels.data();
  call.rows.scalar = c.tau;
  return call;
}

void test_student(const Way& way, const Case& c, const Terms& terms = student_terms()) {
  const std::string what = std::string(way.name) + " student, V=" + std::to_string(c.classes) + ", dtypes " +
                           std::to_string(static_cast<int>(c.s)) + std::to_string(static_cast<int>(c.t)) + ", tau " +
                           std::to_string(c.tau) + ", terms " + std::to_string(terms.count);
  const int64_t v = c.classes, width = v + c.padding;
  Random random(static_cast<uint64_t>(v));
  Logits s(c.s, c.rows, width, c.shift_s), t(c.t, c.rows, width, c.shift_t), g(c.s, c.rows, width, c.shift_s);
  fill(random, s, c.rows, 3);
  fill(random, t, c.rows, 4);
  for (int64_t i = 0; i < c.rows * width; ++i) g.set(i, std::numeric_limits<double>::quiet_NaN());
  std::vector<int64_t> labels;
  for (int64_t row = 0; row < c.rows; ++row) labels.push_back(row * 7919 % v);
  const double divisors[2] = {1, 1};
  std::vector<double> loss(static_cast<size_t>(c.rows));
  std::vector<double> state(static_cast<size_t>(c.rows * student_columns(true)));  // f32 takes half of it
  std::vector<int64_t> top1(static_cast<size_t>(c.rows));
  Call call = student_call(c, s, t, labels);
  call.divisors = divisors;
  call.out.loss = loss.data();
  call.out.state = state.data();
  call.out.top1 = top1.data();
  call.out.gradient = g.matrix(c.rows);
  std::vector<double> parts(static_cast<size_t>(c.rows) * 2000 * sizeof(StudentState<double>) / 8);
  call.parts = parts.data();
  const Grid grid = plan(call, way.machine, way.tuning);
  near(what + " blocks", grid.staged > 0 ? grid.cluster : 0, call.rows.wide() ? 0 : way.cluster, 0);
  if (way.tuning.threads > 0)
    near(what + " threads", std::max(grid.threads, way.tuning.threads), way.tuning.threads, 0);
  sweep(kernels<Where::emulated>(), call, terms, way.machine, nullptr, way.tuning);

  const bool wide = call.rows.wide();
  const double tau = std::fmax(c.tau, 1.0);
  const double loss_tolerance = wide ? 1e-12 : 2e-6 * tau * tau, tolerance = wide ? 1e-13 : 1e-6 * tau;
  std::vector<double> found;
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto at = static_cast<size_t>(row);
    const std::vector<double> teacher = t.row(row, v);
    const Truth truth = row_truth(s.row(row, v), teacher, labels[at], c.tau, terms);
    near(what + " loss", loss[at], truth.loss, loss_tolerance);
    near(what + " top-1", static_cast<double>(top1[at]),
         static_cast<double>(std::max_element(teacher.begin(), teacher.end()) - teacher.begin()), 0);
    for (int64_t j = 0; j < width; ++j) {
      const double got = g.get(row * width + j), wanted = j < v ? truth.gradient[static_cast<size_t>(j)] : 0;
      near(what + (j < v ? " gradient" : " padding"), got, wanted, j < v ? tolerance + 1.01 * rounding(c.s) : 0);
      found.push_back(got);
    }
  }
  test_over_logits(what, call, terms, way.machine, s, found, tolerance);
  // From the saved state, written over the logits, with an upstream gradient.
  const float half = 0.5f;
  const double half_wide = 0.5;
  call.from = From::state;
  call.upstream = {wide ? static_cast<const void*>(&half_wide) : &half, false};
  call.out.gradient = call.rows.logits;
  sweep(kernels<Where::emulated>(), call, terms, way.machine, nullptr);
  for (int64_t i = 0; i < c.rows * width; ++i) {
    near(what + " gradient from state", s.get(i), 0.5 * found[static_cast<size_t>(i)], tolerance + 2 * rounding(c.s));
  }
}

void test_teacher(const Way& way, const Case& c, const Terms& terms = teacher_terms()) {
  const std::string what = std::string(way.name) + " teacher, V=" + std::to_string(c.classes) + ", dtype " +
                           std::to_string(static_cast<int>(c.s));
  const int64_t v = c.classes, width = v + c.padding;
  Random random(static_cast<uint64_t>(v) + 17);
  Logits z(c.s, c.rows, width, c.shift_s), g(c.s, c.rows, width, c.shift_s);
  fill(random, z, c.rows, 3);
  std::vector<int64_t> labels;
  for (int64_t row = 0; row < c.rows; ++row) labels.push_back(v / 2);
  const double divisors[2] = {1, 1};
  std::vector<double> loss(static_cast<size_t>(c.rows)), state(static_cast<size_t>(c.rows * kTeacherColumns));
  std::vector<double> parts(static_cast<size_t>(c.rows) * 2000 * sizeof(TeacherState<double>) / 8);
  Call call;
  call.rows.rows = c.rows;
  call.rows.classes = v;
  call.rows.padded = width;
  call.rows.logits = z.matrix(c.rows);
  call.rows.labels = labels.data();
  call.divisors = divisors;
  call.out.loss = loss.data();
  call.out.state = state.data();
  call.out.gradient = g.matrix(c.rows);
  call.parts = parts.data();
  sweep(kernels<Where::emulated>(), call, terms, way.machine, nullptr);
  const bool wide = call.rows.wide();
  for (int64_t row = 0; row < c.rows; ++row) {
    std::vector<double> values = z.row(row, v);
    const auto value = [&] { return row_truth(values, {}, v / 2, 1, terms).loss; };
    near(what + " loss", loss[static_cast<size_t>(row)], value(), wide ? 1e-12 : 2e-6);
    for (size_t j = 0; j < values.size(); j += 1 + values.size() / 5) {
      const double x = values[j], h = 1e-5;
      values[j] = x + h;
      const double above = value();
      values[j] = x - h;
      const double below = value();
      values[j] = x;
      near(what + " gradient", g.get(row * width + static_cast<int64_t>(j)), (above - below) / (2 * h),
           (wide ? 1e-8 : 1e-6) + 1.01 * rounding(c.s));
    }
  }
  test_over_logits(what, call, terms, way.machine, z, g.row(0, c.rows * width), wide ? 1e-12 : 1e-6);
}

// Bounds on the target: against the CPU's kernels in double precision, which Python tests compare with dense targets.
void test_projected(const Way& way, const Case& c, bool top1, bool near_sets, bool entropy = false) {
  const std::string what = std::string(way.name) + " projected, V=" + std::to_string(c.classes) + ", dtypes " +
                           std::to_string(static_cast<int>(c.s)) + std::to_string(static_cast<int>(c.t)) +
                           (top1 ? ", top-1" : ", sets");
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  const int64_t v = c.classes, width = v + c.padding;
  Random random(static_cast<uint64_t>(v));
  Logits s(c.s, c.rows, width, c.shift_s), t(c.t, c.rows, width, c.shift_t), g(c.s, c.rows, width, c.shift_s);
  fill(random, s, c.rows, 2);
  fill(random, t, c.rows, 3);
  for (int64_t i = 0; i < c.rows * width; ++i) g.set(i, nan);
  t.set(2 * width + v / 3, -inf);
  s.set(2 * width + v / 3, -inf);
  std::vector<int64_t> labels, near_offsets, near_members, wrong_offsets, wrong_members;
  std::vector<double> bounds;
  for (int64_t row = 0; row < c.rows; ++row) {
    labels.push_back(row == 3 ? -1 : row == 4 ? -100 : (row * 7919 + 5) % v);
    const double of[4] = {row % 2 ? 0.4 : nan, row < 6 ? 0.03 : nan, row % 3 == 1 ? 2.5 : nan,
                          row % 3 == 2 ? 1.0 : nan};
    bounds.insert(bounds.end(), of, of + 4);
  }
  for (int64_t y = 0; y < v; ++y) {  // neighbours are near, a long stretch far away is wrong
    near_offsets.push_back(static_cast<int64_t>(near_members.size()));
    wrong_offsets.push_back(static_cast<int64_t>(wrong_members.size()));
    for (int64_t j = y / 4 * 4; j < std::min(v, y / 4 * 4 + 4); ++j) near_members.push_back(j);
    if (y != 5 && y * 3 % 7 != 0) continue;
    for (int64_t j = 0; j < v / 3; ++j) {
      if (j / 4 != y / 4) wrong_members.push_back(j);
    }
  }
  near_offsets.push_back(static_cast<int64_t>(near_members.size()));
  wrong_offsets.push_back(static_cast<int64_t>(wrong_members.size()));
  const Term given[] = {{kForwardKl, 0.8}, {kCrossEntropy, 0.2}, {kEntropy, -0.3}};
  const Terms terms = make_terms(given, entropy ? 3 : 2, false, 0, 1);
  const double divisors[2] = {1, 1};
  const auto n = static_cast<size_t>(c.rows), own = static_cast<size_t>(student_columns(entropy)),
             columns = own + kProjectedColumns;
  std::vector<double> loss(n), state(n * columns), wanted_loss(n), wanted_state(n * columns);
  std::vector<int64_t> top1_found(n), wanted_top1(n);
  Call call = student_call(c, s, t, labels);
  call.rows.constraints.bounds = bounds.data();
  if (near_sets) call.rows.constraints.near = {near_offsets.data(), near_members.data()};
  if (!top1) call.rows.constraints.wrong = {wrong_offsets.data(), wrong_members.data()};
  call.rows.constraints.top1 = top1;
  call.rows.constraints.relax = true;

  Logits exact_s(DType::f64, c.rows, width, 0), exact_t(DType::f64, c.rows, width, 0),
      exact_g(DType::f64, c.rows, width, 0);
  for (int64_t i = 0; i < c.rows * width; ++i) {
    exact_s.set(i, s.get(i));
    exact_t.set(i, t.get(i));
  }
  Rows exact = call.rows;
  exact.logits = exact_s.matrix(c.rows);
  exact.target = exact_t.matrix(c.rows);
  Outputs wanted;
  wanted.loss = wanted_loss.data();
  wanted.per_row_loss = true;
  wanted.state = wanted_state.data();
  wanted.top1 = wanted_top1.data();
  wanted.gradient = exact_g.matrix(c.rows);
  row_state(exact, terms, true, {1, 1}, wanted);

  call.divisors = divisors;
  call.statistics = true;
  call.out.loss = loss.data();
  call.out.state = state.data();
  call.out.top1 = top1_found.data();
  call.out.gradient = g.matrix(c.rows);
  const Grid grid = plan(call, way.machine);
  if (way.cluster > 0) near(what + " blocks", grid.cluster, way.cluster, 0);
  sweep(kernels<Where::emulated>(), call, terms, way.machine, nullptr);
  const bool wide = call.rows.wide();
  const double tolerance = wide ? 1e-9 : 2e-5 * c.tau * c.tau;
  std::vector<double> found;
  for (size_t row = 0; row < n; ++row) {
    near(what + " loss of row " + std::to_string(row), loss[row], wanted_loss[row], tolerance);
    near(what + " top-1", static_cast<double>(top1_found[row]), static_cast<double>(wanted_top1[row]), 0);
    for (int64_t j = 0; j < width; ++j) {
      found.push_back(g.get(static_cast<int64_t>(row) * width + j));
      near(what + " gradient of row " + std::to_string(row), found.back(),
           exact_g.get(static_cast<int64_t>(row) * width + j), tolerance + 1.01 * rounding(c.s));
    }
    for (size_t i = own + 5; i < columns; ++i) {  // statistics: probabilities, moved mass, relaxed
      const double got = wide ? state[row * columns + i]
                              : static_cast<double>(reinterpret_cast<float*>(state.data())[row * columns + i]);
      near(what + " statistics", got, wanted_state[row * columns + i], wide ? 1e-9 : 1e-4);
    }
  }
  test_over_logits(what, call, terms, way.machine, s, found, 0.1 * tolerance);
  // From the saved state, written over the logits, with an upstream gradient.
  const float half = 0.5f;
  const double half_wide = 0.5;
  call.from = From::state;
  call.upstream = {wide ? static_cast<const void*>(&half_wide) : &half, false};
  call.out.gradient = call.rows.logits;
  sweep(kernels<Where::emulated>(), call, terms, way.machine, nullptr);
  for (int64_t i = 0; i < c.rows * width; ++i) {
    near(what + " gradient from state", s.get(i), 0.5 * found[static_cast<size_t>(i)],
         0.1 * tolerance + 2 * rounding(c.s));
  }
}

// Rows that are masked, wrong, or have holes; per-row temperatures and weights.
void test_marks(const Way& way) {
  const int64_t v = 300, n = 8;
  const double inf = std::numeric_limits<double>::infinity();
  Random random(5);
  Logits s(DType::f32, n, v, 0), t(DType::f32, n, v, 0), g(DType::f32, n, v, 0);
  fill(random, s, n, 1);
  fill(random, t, n, 1);
  std::vector<int64_t> labels{3, -100, -1, v, 5, 6, 7, 8};
  std::vector<double> weight{1, 1, 1, 1, 0, -1, 2, 1}, taus{1, 2, 3, 4, 5, 6, 1e5, 2.5};
  s.set(7 * v + 17, -inf);
  t.set(7 * v + 17, -inf);
  t.set(2 * v + 40, 9);
  t.set(2 * v + 200, 9);  // a tie for the top-1
  const Terms terms = terms_of({{kForwardKl, 1}, {kCrossEntropy, 1}}, true, 0.5, 0.7);
  const double divisors[2] = {1, 1};
  std::vector<double> loss(static_cast<size_t>(n)), state(static_cast<size_t>(n * kStudentColumns));
  std::vector<int64_t> top1(static_cast<size_t>(n));
  Call call;
  call.rows = Rows{};
  call.rows.rows = n;
  call.rows.classes = call.rows.padded = v;
  call.rows.logits = s.matrix(n);
  call.rows.target = t.matrix(n);
  call.rows.labels = labels.data();
  call.rows.weight = weight.data();
  call.rows.temperature = taus.data();
  call.divisors = divisors;
  call.out.loss = loss.data();
  call.out.state = state.data();
  call.out.top1 = top1.data();
  call.out.gradient = g.matrix(n);
  // Of the two terms in every row; one that is not finite counts in a row that has the term.
  std::vector<double> own(static_cast<size_t>(2 * n), 1);
  own[0] = 2;
  own[static_cast<size_t>(n)] = 0;
  call.rows.coefficients = own.data();
  call.rows.coefficients_per_row = true;
  own[static_cast<size_t>(n + 7)] = inf;
  sweep(kernels<Where::emulated>(), call, terms, way.machine, nullptr);
  near("coefficients of a row", loss[0],
       row_truth(s.row(0, v), t.row(0, v), 3, 1, terms_of({{kForwardKl, 2}}, true, 0.5, 0.7)).loss, 2e-6);
  near("coefficient of inf", loss[7], std::nan(""), 0);
  call.rows.coefficients = nullptr;
  sweep(kernels<Where::emulated>(), call, terms, way.machine, nullptr);
  for (const int64_t row : {1, 4}) {  // ignored
    near("ignored loss", loss[static_cast<size_t>(row)], 0, 0);
    for (int64_t j = 0; j < v; ++j) near("ignored gradient", g.get(row * v + j), 0, 0);
  }
  for (const int64_t row : {3, 5, 6}) {  // a label, a weight, a temperature out of range
    near("wrong loss", loss[static_cast<size_t>(row)], std::nan(""), 0);
    near("wrong gradient", g.get(row * v), std::nan(""), 0);
  }
  const Truth plain = row_truth(s.row(0, v), t.row(0, v), 3, 1, terms);
  near("tau of a row", loss[0], plain.loss, 2e-6);
  near("first of a tie", static_cast<double>(top1[2]), 40, 0);
  near("hole", g.get(7 * v + 17), 0, 0);
  std::vector<double> a = s.row(7, v), b = t.row(7, v);
  a.erase(a.begin() + 17);
  b.erase(b.begin() + 17);
  near("around a hole", loss[7], row_truth(a, b, 8, 2.5, terms).loss, 1.3e-5);
  double found[2];
  kernels<Where::emulated>().count(call.rows, found, nullptr);
  near("count of rows", found[0], 5, 0);
  near("count of labels", found[1], 4, 0);
}

void test_scale() {
  const int64_t n = 3, v = 1000;
  Logits g(DType::bf16, n, v, 0);
  for (int64_t i = 0; i < n * v; ++i) g.set(i, i % 3 ? 2.0 : 0.0);
  const float by[3] = {1, std::numeric_limits<float>::infinity(), -0.5f};
  kernels<Where::emulated>().scale(g.matrix(n), n, v, {by, true}, 2, nullptr);
  near("scaled by 1", g.get(1), 2, 0);
  near("scaled by inf", g.get(v + 1), std::numeric_limits<double>::infinity(), 0);
  near("0 times inf", g.get(v + 2), 0, 0);
  near("scaled by -0.5", g.get(2 * v + 2), -1, 0);
}

// A block merges the states of a row's parts, one a thread: there may not be more parts than threads.
void test_parts() {
  for (const int processors : {4, 68, 128, 132, 148, 1000}) {
    for (const int64_t rows : {1, 2, 7, 200}) {
      const int parts = shared_rows(rows, 100'000'000, processors);
      near("parts of a row, " + std::to_string(processors) + " processors", parts <= kMaxThreads && parts >= 1, 1, 0);
    }
  }
}

// A GPU whose shared memory is just large enough for the row of a case in a cluster of so many blocks.
Way clustered(const Case& c, int blocks, int arrays = 2) {
  const int64_t width = 16 / size_of(c.s), chunks = (c.classes + 2 * width - 2) / width;
  const int64_t slots = (chunks + blocks - 1) / blocks;
  while (blocks > 1 && (chunks + blocks / 2 - 1) / (blocks / 2) <= slots) blocks /= 2;  // half of them hold it, too
  return {"cluster", {1, kHeaderBytes + static_cast<int>(slots * 16 * arrays), 90, 8}, blocks};
}

}  // namespace

int main() {
  const DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const Way two_sweeps{"two-sweep", {1, 0, 75}}, staged{"staged", {1, 227 << 10, 80}, 1};
  for (const double tau : {2.0, 3.0}) {
    for (const int64_t v : {1, 2, 7, 8, 9, 77, 150, 1000, 2048, 4097}) {
      for (const DType d : {f32, bf16, f16}) {
        const Case c{3, v, v % 3, 0, 0, d, d, tau};
        test_student(two_sweeps, c);
        test_student(staged, c);
        for (const int blocks : {2, 4, 8}) test_student(clustered(c, blocks), c);
        test_student(staged, c, mixed_terms());
        if (tau == 3) continue;
        test_teacher(two_sweeps, c);
        test_teacher(staged, c);
        test_teacher(clustered(c, 2, 1), c);
      }
    }
    for (const DType s : {f32, f64, bf16, f16}) {  // every pair, and rows that lie differently in their lines
      for (const DType t : {f32, f64, bf16, f16}) {
        for (const int64_t shift : {0, 1}) {
          const Case c{2, 333, 5, 3, 3 + shift, s, t, tau};
          test_student(two_sweeps, c);
          test_student(staged, c);
        }
      }
    }
  }
  for (const DType d : {f32, bf16}) {  // few rows, long V
    const Case c{2, 40'000, 0, 0, 0, d, d, 2.0};
    const Way shared{"shared rows", {8, 0, 75}};
    test_student(shared, c);
    test_student(shared, c, mixed_terms());
    test_teacher(shared, c);
  }
  for (const DType d : {f32, f64}) {
    const Case c{2, 333, 0, 0, 0, d, d, 2.0};
    test_teacher(two_sweeps, c);
    test_teacher(two_sweeps, c, terms_of({{kEntropy, -0.5}, {kZLoss, 0.02}}));
    test_student(two_sweeps, c, mixed_terms());
    test_student(clustered(c, 2), c, mixed_terms());
  }
  const Case long_rows{3, 4097, 0, 0, 0, f32, f32, 2.0};
  Way slice = clustered(long_rows, 4);  // of a GPU, where no cluster of four can run
  slice.machine.cluster = 2;
  slice.cluster = 0;
  test_student(slice, long_rows);
  // Tuned: more blocks than hold the row, more than every GPU runs together, more than there are chunks; few threads.
  const Machine hopper{1, 227 << 10, 90, 8, 16};
  for (const int64_t v : {7, 4097}) {
    const Case c{3, v, 1, 0, 0, bf16, bf16, 2.0};
    for (const int cluster : {2, 8, 16}) test_student({"tuned", hopper, cluster, {cluster, 64}}, c);
    test_student({"tuned, more than runs", {1, 227 << 10, 90, 2, 2}, 2, {16, 64}}, c);
    test_student({"tuned, threads", hopper, 1, {0, 96}}, c);
  }
  for (const Way& way : {two_sweeps, staged, clustered({8, 300, 0, 0, 0, f32, f32, 1.0}, 2)}) test_marks(way);
  for (const bool top1 : {false, true}) {
    for (const int64_t v : {9, 77, 333, 4097}) {
      for (const DType d : {f32, bf16, f64}) {
        const Case c{9, v, v % 3, 1, 1, d, d, top1 ? 2.0 : 3.0};
        test_projected({"many sweeps", {1, 0, 75}, 1}, c, top1, true);
        test_projected({"many sweeps", {1, 0, 75}, 1}, c, top1, true, true);
        if (d != f64) test_projected(staged, c, top1, false);
        if (d == f64 || v < 300) continue;
        const int most = static_cast<int>(3 * size_of(d) * v / 2);  // of a block: between a half and all of a row
        test_projected({"staged by two", {1, kHeaderBytes + most, 90, 8}, 2}, c, top1, true);
      }
    }
    for (const DType d : {f32, f64}) {
      test_projected({"a cluster, many sweeps", {8, 0, 90, 8}, 2}, {9, 40'000, 0, 0, 0, d, d, 2.0}, top1, true);
    }
    test_projected(staged, {9, 333, 5, 3, 2, f16, bf16, 2.0}, top1, true);
  }
  test_scale();
  test_parts();
  std::printf("cuda, emulated: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
