// pybind11: launch.h for tensors as addresses, and row/ on scalars in double for the tests. No torch headers: one
// binary serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/sweeps.h"
#include "launch.h"
#include "row/element.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;
using namespace cudfast;

namespace {

// (address, inner rows, outer stride, inner stride, dtype); address 0 is absent.
using MatrixArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;
// (labels, weight, per_row): addresses of (N,) vectors, 0 is absent.
using VectorsArgument = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
// (N, V, padded V).
using ShapeArgument = std::tuple<int64_t, int64_t, int64_t>;
// (loss, state, top1, divisors): addresses, 0 is not written.
using ResultsArgument = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
// (fault, row).
using Answer = std::pair<int, int64_t>;

enum class Reduction : int { none = 0, sum = 1, mean = 2 };

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

Matrix matrix(const MatrixArgument& m) {
  return {address<char>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m),
          static_cast<DType>(std::get<4>(m))};
}

Rows make_rows(const ShapeArgument& shape, const MatrixArgument& logits, const MatrixArgument& target,
               const VectorsArgument& vectors, double scalar, int64_t ignore_index, int64_t unlabeled_index,
               int threads) {
  Rows rows;
  std::tie(rows.rows, rows.classes, rows.padded) = shape;
  rows.logits = matrix(logits);
  rows.target = matrix(target);
  rows.labels = address<const int64_t>(std::get<0>(vectors));
  rows.weight = address<const double>(std::get<1>(vectors));
  rows.per_row = address<const double>(std::get<2>(vectors));
  rows.scalar = scalar;
  rows.ignore_index = ignore_index;
  rows.unlabeled_index = unlabeled_index;
  rows.threads = threads;
  return rows;
}

Divisors divisors_of(const Rows& rows, Reduction reduction, double num_items) {
  if (!std::isnan(num_items)) return {num_items, num_items};
  if (reduction == Reduction::mean) return count(rows);
  return {};
}

void state_of(const Rows& rows, const StudentOptions& options, bool statistics, Divisors d, const Outputs& out) {
  student_state(rows, options, statistics, d, out);
}
void state_of(const Rows& rows, const TeacherOptions& options, bool, Divisors d, const Outputs& out) {
  teacher_state(rows, options, d, out);
}
void gradient_of(const Rows& rows, const StudentOptions& options, Divisors d, Upstream u, const Outputs& from) {
  student_gradient(rows, options, d, u, from);
}
void gradient_of(const Rows& rows, const TeacherOptions& options, Divisors d, Upstream u, const Outputs& from) {
  teacher_gradient(rows, options, d, u, from);
}

template <class Options>
Answer row_state(const ShapeArgument& shape, const MatrixArgument& logits, const MatrixArgument& target,
                 const VectorsArgument& vectors, double scalar, int64_t ignore_index, int64_t unlabeled_index,
                 int threads, const Options& options, int reduction, double num_items, bool statistics,
                 const ResultsArgument& results, bool wide, const MatrixArgument& gradient, bool fresh) {
  const Rows rows = make_rows(shape, logits, target, vectors, scalar, ignore_index, unlabeled_index, threads);
  const Check fault = check(rows);
  if (fault.fault != Fault::none) return {static_cast<int>(fault.fault), fault.row};
  const Divisors divisors = divisors_of(rows, static_cast<Reduction>(reduction), num_items);
  Outputs out;
  out.loss = address<void>(std::get<0>(results));
  out.state = address<void>(std::get<1>(results));
  out.top1 = address<int64_t>(std::get<2>(results));
  out.per_row_loss = static_cast<Reduction>(reduction) == Reduction::none;
  out.wide = wide;
  out.gradient = matrix(gradient);
  out.fresh = fresh;
  state_of(rows, options, statistics, divisors, out);
  if (double* d = address<double>(std::get<3>(results))) {
    d[0] = divisors.kd;
    d[1] = divisors.ce;
  }
  return {0, 0};
}

template <class Options>
Answer row_gradient(const ShapeArgument& shape, const MatrixArgument& logits, const MatrixArgument& target,
                    const VectorsArgument& vectors, double scalar, int64_t ignore_index, int64_t unlabeled_index,
                    int threads, const Options& options, uintptr_t upstream, bool per_row_upstream,
                    const ResultsArgument& results, bool wide, const MatrixArgument& gradient, bool fresh) {
  const Rows rows = make_rows(shape, logits, target, vectors, scalar, ignore_index, unlabeled_index, threads);
  const Check fault = check(rows);
  if (fault.fault != Fault::none) return {static_cast<int>(fault.fault), fault.row};
  Outputs from;
  from.state = address<void>(std::get<1>(results));
  from.top1 = address<int64_t>(std::get<2>(results));
  from.wide = wide;
  from.gradient = matrix(gradient);
  from.fresh = fresh;
  const double* d = address<const double>(std::get<3>(results));
  gradient_of(rows, options, {d[0], d[1]}, {address<const void>(upstream), per_row_upstream}, from);
  return {0, 0};
}

// ---- row/ on scalars, so that a test can hold every function against its mirror ----

using Numbers = std::vector<double>;

StudentState<double> student(const Numbers& v) {
  return {v.at(0), v.at(1), v.at(2), v.at(3), v.at(4),  v.at(5),
          v.at(6), v.at(7), v.at(8), v.at(9), v.at(10), static_cast<int64_t>(v.at(11))};
}
Numbers numbers(const StudentState<double>& s) {
  return {s.m_t,   s.s_k,   s.m_s, s.z_tau, s.s_tau,      s.a,
          s.s_one, s.z_one, s.t_y, s.s_y,   s.impossible, static_cast<double>(s.k)};
}
TeacherState<double> teacher(const Numbers& v) { return {v.at(0), v.at(1), v.at(2), v.at(3)}; }
Numbers numbers(const TeacherState<double>& s) { return {s.m, s.z, s.e, s.z_y}; }

template <class Sums>
Sums folded(Sums sums, const Numbers& a, const Numbers& b, double inv_tau) {
  for (size_t i = 0; i < a.size(); ++i) {
    if constexpr (sizeof(Sums) == sizeof(TeacherSums<double>)) {
      fold<true>(sums, a.at(i));
    } else {
      fold<0, 2, true>(sums, a.at(i), b.at(i), inv_tau);
    }
  }
  return sums;
}

void define_row(py::module_ row) {
  row.def("student_fold", [](const Numbers& dt, const Numbers& ds, double inv_tau) {
    const auto s = folded(StudentSums<double>{}, dt, ds, inv_tau);
    return Numbers{s.z_tau, s.s_tau, s.a, s.s_one, s.z_one, s.impossible};
  });
  row.def("student_merge", [](const Numbers& left, const Numbers& right, double inv_tau) {
    return numbers(merge(student(left), student(right), inv_tau));
  });
  row.def("teacher_fold", [](const Numbers& x) {
    const auto s = folded(TeacherSums<double>{}, x, {}, 1.0);
    return Numbers{s.z, s.e};
  });
  row.def("teacher_merge",
          [](const Numbers& left, const Numbers& right) { return numbers(merge(teacher(left), teacher(right))); });
  row.def("wclip", [](double u, double budget, double margin) {
    const auto c = wclip(u, budget, margin);
    return Numbers{c.r, c.t_k, c.t_y};
  });
  row.def("replace", [](const Numbers& state, const Numbers& clip, double inv_tau) {
    const auto t = replace(student(state), Clip<double>{clip.at(0), clip.at(1), clip.at(2)}, inv_tau);
    return Numbers{t.z_tau, t.a, t.impossible};
  });
  row.def("row_weights", [](bool ignored, bool labelled, double weight) {
    const auto w = row_weights(ignored, labelled, weight);
    return Numbers{w.kd, w.ce};
  });
  row.def("student_finish",
          [](const Numbers& state, bool labelled, double tau, const StudentOptions& options, double kd, double ce) {
            const auto s = student(state);
            const auto loss = finish(s, labelled, tau, options);
            const auto c = coefficients(s, loss, tau, kd, ce);
            return Numbers{loss.kd,       loss.ce,       loss.z_tau,    loss.impossible ? 1.0 : 0.0,
                           c.student_tau, c.teacher_tau, c.student_one, c.label};
          });
  row.def("focal", [](double log_p, double gamma, double alpha) {
    const auto t = focal(log_p, gamma, alpha);
    return Numbers{t.value, t.slope};
  });
  row.def("gate", [](double log_p, const TeacherOptions& options) {
    const auto t = gate(log_p, options);
    return Numbers{t.value, t.slope};
  });
  row.def("teacher_finish", [](const Numbers& state, double alpha, const TeacherOptions& options, double scale) {
    const auto loss = finish(teacher(state), alpha, options);
    const auto c = coefficients(loss, scale);
    return Numbers{loss.value, loss.entropy, c.one, c.log, c.label};
  });
  row.def("student_element", [](const Numbers& c, double dt, double ds, double inv_tau) {
    return element<0, 1, true>(StudentGradient<double>{c.at(0), c.at(1), c.at(2), c.at(3)}, dt, ds, inv_tau);
  });
  row.def("teacher_element", [](const Numbers& c, double x, double inv_z, double log_z) {
    return element(TeacherGradient<double>{c.at(0), c.at(1), c.at(2)}, x, inv_z, log_z);
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of cudfast.";
  py::class_<StudentOptions>(m, "StudentOptions")
      .def(py::init<double, double, bool, double, double>(), py::arg("kd_weight"), py::arg("ce_weight"),
           py::arg("clip"), py::arg("budget"), py::arg("margin"));
  py::class_<TeacherOptions>(m, "TeacherOptions")
      .def(py::init<double, double, double, double, double, double, double, bool>(), py::arg("ce_weight"),
           py::arg("focal_weight"), py::arg("entropy_weight"), py::arg("gamma"), py::arg("gate_threshold"),
           py::arg("gate_scale"), py::arg("gate_power"), py::arg("differentiate_gate"));
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("student_state", row_state<StudentOptions>, release());
  m.def("teacher_state", row_state<TeacherOptions>, release());
  m.def("student_gradient", row_gradient<StudentOptions>, release());
  m.def("teacher_gradient", row_gradient<TeacherOptions>, release());

  m.attr("STUDENT_COLUMNS") = kStudentColumns;
  m.attr("TEACHER_COLUMNS") = kTeacherColumns;
  m.attr("BLOCK") = kBlock;
#if defined(_OPENMP)
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  m.attr("COMPILER") = __VERSION__;
  m.def("isa", [] { return std::string(sweeps().isa); });
  m.def("isa_warning", [] { return std::string(isa_warning()); });
  m.def("use_isa", [](const std::string& isa) { return use(isa.c_str()); });
  m.def("runnable_isas", [] {
    int count = 0;
    const char* const* names = runnable(count);
    return std::vector<std::string>(names, names + count);
  });
  m.def("exp32", [](uintptr_t x, uintptr_t y, int64_t n) { sweeps().exp32(address<float>(x), address<float>(y), n); });
  m.def("exp64",
        [](uintptr_t x, uintptr_t y, int64_t n) { sweeps().exp64(address<double>(x), address<double>(y), n); });
  define_row(m.def_submodule("row", "csrc/row on scalars, in double"));
}
