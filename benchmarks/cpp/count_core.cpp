// One thread over the native kernels, for valgrind --tool=callgrind: what runs inside counted() is counted, a dump
// each. Prints a line for each dump, in their order: instruction set, case, logits. See benchmarks/instructions.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cpu/sweeps.h"
#include "../../csrc/launch.h"

using namespace cudfast;

extern "C" __attribute__((noinline)) void counted(const std::function<void()>& work) { work(); }

namespace {

// The same numbers everywhere, within +-`scale`.
std::vector<float> values(int64_t count, float scale, uint32_t seed) {
  std::vector<float> found(static_cast<size_t>(count));
  for (float& value : found) {
    seed = seed * 1664525u + 1013904223u;
    value = scale * (static_cast<float>(seed >> 8) / 8388608.0f - 1.0f);
  }
  return found;
}

std::vector<char> stored(const std::vector<float>& from, DType dtype) {
  std::vector<char> found(from.size() * static_cast<size_t>(size_of(dtype)));
  for (size_t i = 0; i < from.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &from[i], 4);
    const uint16_t upper = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::f32) std::memcpy(&found[4 * i], &bits, 4);
    if (dtype == DType::bf16) std::memcpy(&found[2 * i], &upper, 2);
  }
  return found;
}

enum class Work { gradient, state, second_sweep };

struct Case {
  const char* name;
  int64_t rows, classes;
  DType dtype = DType::f32;
  double temperature = 2;
  Work work = Work::gradient;
  bool teacher = false;
  bool bounded = false;  // by Constraints on both masses, instead of W-Clip
};

void run(const Case& c, const char* isa) {
  const auto s = stored(values(c.rows * c.classes, 6, 1), c.dtype),
             t = stored(values(c.rows * c.classes, 9, 2), c.dtype);
  std::vector<char> gradient(s.size());
  std::vector<int64_t> labels, top1(static_cast<size_t>(c.rows));
  for (int64_t i = 0; i < c.rows; ++i) labels.push_back((i * 37) % c.classes);
  std::vector<double> bounds;
  for (int64_t i = 0; i < c.rows; ++i) bounds.insert(bounds.end(), {0.3, 0.01, __builtin_nan(""), __builtin_nan("")});
  std::vector<float> state(static_cast<size_t>(c.rows * (kStudentColumns + kProjectedColumns)));
  float loss = 0;

  const auto matrix = [&](const std::vector<char>& data) {
    return Matrix{const_cast<char*>(data.data()), c.rows, 0, c.classes, c.dtype};
  };
  Rows rows;
  rows.rows = c.rows;
  rows.classes = rows.padded = c.classes;
  rows.logits = matrix(s);
  rows.labels = labels.data();
  rows.scalar = c.teacher ? 1 : c.temperature;
  if (!c.teacher) rows.target = matrix(t);
  if (c.bounded) {
    rows.constraints.bounds = bounds.data();
    rows.constraints.top1 = true;
  }
  const Term student[] = {{kForwardKl, 0.8}, {kCrossEntropy, 0.2}};
  const Term teacher[] = {{kCrossEntropy, 1}, {kFocal, 1, 10, 1}, {kGatedEntropy, -0.1, 0.5, 1, 1, 0}};
  const Terms terms = c.teacher ? make_terms(teacher, 3, false, 0, 1) : make_terms(student, 2, !c.bounded, 0.5, 0.7);
  const Divisors divisors = count(rows);
  Outputs out;
  out.loss = &loss;
  if (c.work != Work::gradient) {
    out.state = state.data();
    out.top1 = top1.data();
  }
  const auto first = [&] {
    if (row_state(rows, terms, false, divisors, out).fault != Fault::none) std::abort();
  };
  if (c.work == Work::second_sweep) {
    first();
    out.gradient = matrix(gradient);
    counted([&] { row_gradient(rows, terms, divisors, {}, out); });
  } else {
    if (c.work == Work::gradient) out.gradient = matrix(gradient);
    first();  // memory that a thread keeps from call to call is there
    counted(first);
  }
  if (!(loss > 0)) std::abort();
  std::printf("%s\t%s\t%lld\n", isa, c.name, static_cast<long long>(c.rows * c.classes));
}

}  // namespace

int main() {
  const Case cases[] = {
      {"student, float32", 4, 32000},
      {"student, bfloat16", 4, 32000, DType::bf16},
      {"student, temperature 3", 4, 32000, DType::f32, 3},
      {"student, state alone", 4, 32000, DType::f32, 2, Work::state},
      {"student, gradient from the state", 4, 32000, DType::f32, 2, Work::second_sweep},
      {"student, 32 x 77", 32, 77},
      {"student, bounds on both masses", 4, 32000, DType::f32, 2, Work::gradient, false, true},
      {"teacher, float32", 4, 32000, DType::f32, 1, Work::gradient, true},
  };
  int count = 0;
  const char* const* names = runnable(count);
  for (int i = 0; i < count; ++i) {
    use(names[i]);
    for (const Case& c : cases) run(c, names[i]);
  }
}
