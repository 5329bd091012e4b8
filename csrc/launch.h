// The interface between the bindings and the sweeps, without torch: addresses, strides, sizes, options, threads.
#pragma once

#include <cstdint>

#include "row/terms.h"

namespace cudfast {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

CUDFAST_HD constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Rows of a strided matrix whose last axis is dense. Row i starts at data + (i / inner) * outer_stride +
// (i % inner) * inner_stride elements, so (B, S - 1, V) cut out of (B, S, V) needs no copy.
struct Matrix {
  char* data = nullptr;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  DType dtype = DType::f32;
  bool stream = false;  // written past the caches: see cpu/launch.cpp

  CUDFAST_HD char* at(int64_t row, int64_t column) const {
    return data + ((row / inner) * outer_stride + (row % inner) * inner_stride + column) * size_of(dtype);
  }
};

// Sets of classes, one for every class y: indices[offsets[y]] to indices[offsets[y + 1]], ascending.
struct ClassSets {
  const int64_t* offsets = nullptr;  // null: absent
  const int64_t* indices = nullptr;
};

// Bounds on the target, instead of W-Clip: (N, 4), NaN for no bound.
struct Constraints {
  const double* bounds = nullptr;  // null: no constraints; min_near_mass, max_wrong_mass, min_entropy, max_entropy
  ClassSets near;                  // absent: the label alone
  ClassSets wrong;
  bool top1 = false;  // the wrong class is the teacher's top-1, unless that is near
  bool relax = false;
};

// One call: N rows of V classes. Vectors are (N,), dense; a null pointer means absent.
struct Rows {
  int64_t rows = 0;                      // N
  int64_t classes = 0;                   // V
  int64_t padded = 0;                    // width of the logits' own rows, >= V; the padding gets a zero gradient
  Matrix logits;                         // (N, V) student, or the only model
  Matrix target;                         // (N, V) teacher; data null: none
  const int64_t* labels = nullptr;       // (N,)
  const double* weight = nullptr;        // (N,)
  const double* temperature = nullptr;   // (N,)
  const double* coefficients = nullptr;  // (terms, N), or (terms, 1): replace those of the terms
  bool coefficients_per_row = false;
  const char* class_weight = nullptr;  // (V,) in the computing type
  double scalar = 1;                   // temperature of all rows, if they have none of their own
  int64_t ignore_index = -100;
  int64_t unlabeled_index = -1;
  int threads = 1;
  Constraints constraints;

  CUDFAST_HD bool ignored(int64_t row) const {
    return (labels && labels[row] == ignore_index) || (weight && weight[row] == 0);
  }
  CUDFAST_HD bool labelled(int64_t row) const {
    return labels && labels[row] != ignore_index && labels[row] != unlabeled_index;
  }
  CUDFAST_HD double weight_at(int64_t row) const { return weight ? weight[row] : 1.0; }
  CUDFAST_HD double temperature_at(int64_t row) const { return temperature ? temperature[row] : scalar; }
  CUDFAST_HD Coefficients coefficients_at(int64_t row) const {
    if (!coefficients) return {};
    return {coefficients + (coefficients_per_row ? row : 0), coefficients_per_row ? rows : 1};
  }
  CUDFAST_HD double teacher_temperature_at(int64_t row, const Terms& terms) const {
    return terms.teacher_temperature > 0 ? terms.teacher_temperature : temperature_at(row);
  }
  // Whether the sums of some row may have to be computed again without its top-1.
  bool recalibrates(const Terms& terms) const {
    if (!(terms.leaving > 0) || !target.data || constraints.bounds) return false;
    if (terms.teacher_temperature > 0) return terms.teacher_temperature < terms.leaving;
    return temperature || scalar < terms.leaving;
  }
  // Whether rows have more than the sums of row/state.h.
  bool extended(const Terms& terms) const {
    return (terms.sums & ~kStudentEntropy) != 0 || terms.teacher_temperature > 0 || recalibrates(terms);
  }
  // Whether the computation is in f64; then the loss, the state and the upstream gradient have that dtype, too.
  CUDFAST_HD bool wide() const { return logits.dtype == DType::f64 || (target.data && target.dtype == DType::f64); }
};

// Divisors under reduction="mean" of terms that count in all rows, and of those that need a label; 1 for the other
// reductions.
struct Divisors {
  double rows = 1;
  double labelled = 1;
};

// Columns of a packed state, in the order of the fields of row/state.h.
constexpr int kStudentColumns = 11;    // with a target; then e_s if a term needs the student's entropy
constexpr int kTeacherColumns = 4;     // without a target
constexpr int kProjectedColumns = 10;  // after the student's, if there are constraints: see projected.h
CUDFAST_HD constexpr int student_columns(bool entropy) { return kStudentColumns + (entropy ? 1 : 0); }

// Memory for the results. Nothing is written to null pointers.
struct Outputs {
  void* loss = nullptr;  // (N,) with per_row_loss, else a scalar; f32, or f64 if wide
  bool per_row_loss = false;
  void* state = nullptr;    // (N, columns), f32 or f64 as the loss
  int64_t* top1 = nullptr;  // (N,)
  Matrix gradient;          // (N, padded), data null if it is not needed
};

// One upstream gradient for all rows, or one per row.
struct Upstream {
  const void* data = nullptr;  // null: 1
  bool per_row = false;
};

// Temperatures that a row may have (cudfast/options.py).
constexpr double kLowestTemperature = 1e-4;
constexpr double kHighestTemperature = 1e4;

// An error in the vectors of a call, found before any sweep; or in a row's bounds, which only a sweep can find.
enum class Fault : int { none, label, weight, temperature, coefficient, bounds, strides };  // strides: no Matrix fits
struct Check {
  Fault fault = Fault::none;
  int64_t row = 0;  // for a coefficient its place in memory
};
Check check(const Rows& rows, const Terms& terms);

// Sums of the rows' weights.
Divisors count(const Rows& rows);

// First sweep: state and loss of every row; with out.gradient, also the gradient, while the row is in cache.
// The result names the first row that cannot meet its bounds, if any. statistics: a row with a target sums z_one, too.
Check row_state(const Rows& rows, const Terms& terms, bool statistics, Divisors divisors, const Outputs& out);

// Second sweep alone, from a packed state.
void row_gradient(const Rows& rows, const Terms& terms, Divisors divisors, Upstream upstream, const Outputs& from);

}  // namespace cudfast
