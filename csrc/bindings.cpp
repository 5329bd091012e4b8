// pybind11: launch.h for tensors, and row/ on scalars in double for the tests.
#include <pybind11/stl.h>

#include <cmath>
#include <vector>

#include "cpu/pool.h"
#include "cpu/sweeps.h"
#include "launch.h"
#include "python.h"
#include "finish.h"
#include "row/element.h"
#include "row/search.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// (fault, row).
using Answer = std::pair<int, int64_t>;
Answer answer(const Check& check) { return {static_cast<int>(check.fault), check.row}; }
constexpr std::pair<const char*, Fault> kFaults[] = {{"label", Fault::label},
                                                     {"weight", Fault::weight},
                                                     {"temperature", Fault::temperature},
                                                     {"coefficient", Fault::coefficient},
                                                     {"bounds", Fault::bounds},
                                                     {"strides", Fault::strides}};

enum class Reduction : int { none = 0, sum = 1, mean = 2 };

// ---- The two sweeps ----

Divisors divisors_of(const Rows& rows, Reduction reduction, Divisors given) {
  if (!std::isnan(given.rows)) return given;
  if (reduction == Reduction::mean) return count(rows);
  return {};
}

Answer state_of_call(const py::tuple& fields, const Terms& terms, int64_t ignore_index, int64_t unlabeled_index,
                     int threads, int reduction, double items, double labelled_items, bool statistics,
                     const py::object& loss, const py::object& state, const py::object& gradient) try {
  const Rows rows = make_rows(fields, ignore_index, unlabeled_index, threads);
  Outputs out;
  out.loss = address<void>(loss);
  out.per_row_loss = static_cast<Reduction>(reduction) == Reduction::none;
  set_state(out, state);
  out.gradient = matrix(gradient);
  double* const divisors = divisors_in(state);

  const py::gil_scoped_release unlocked;
  const Check fault = check(rows, terms);
  if (fault.fault != Fault::none) return answer(fault);
  const Divisors d = divisors_of(rows, static_cast<Reduction>(reduction), {items, labelled_items});
  const Check unmet = row_state(rows, terms, statistics, d, out);
  if (divisors) {
    divisors[0] = d.rows;
    divisors[1] = d.labelled;
  }
  return answer(unmet);
} catch (const NoLayout&) {
  return answer({Fault::strides, 0});
}

Answer gradient_of_call(const py::tuple& fields, const Terms& terms, int64_t ignore_index, int64_t unlabeled_index,
                        int threads, const py::object& upstream, bool per_row_upstream, const py::object& state,
                        const py::object& gradient) try {
  const Rows rows = make_rows(fields, ignore_index, unlabeled_index, threads);
  Outputs from;
  set_state(from, state);
  from.gradient = matrix(gradient);
  const double* const divisors = divisors_in(state);
  const Upstream u{address<const void>(upstream), per_row_upstream};

  const py::gil_scoped_release unlocked;
  const Check fault = check(rows, terms);
  if (fault.fault != Fault::none) return answer(fault);
  row_gradient(rows, terms, {divisors[0], divisors[1]}, u, from);
  return answer({});
} catch (const NoLayout&) {
  return answer({Fault::strides, 0});
}

// `bytes` of the pool, as a buffer that torch.frombuffer takes.
struct Memory {
  explicit Memory(size_t count) : bytes(count), block(Pool::instance().take(count)) {}
  ~Memory() { Pool::instance().give(block); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  size_t bytes;
  Block block;
};

// ---- row/ on scalars, so that a test can compare every function with its mirror ----

using Numbers = std::vector<double>;

constexpr int kEverySum = kStudentOne | kTeacherOne | kTeacherEntropy | kStudentEntropy | kReverse | kUniform | kSquare;

StudentState<double> student(const Numbers& v) {
  return {v.at(0),
          v.at(1),
          v.at(2),
          v.at(3),
          v.at(4),
          v.at(5),
          v.at(6),
          v.at(7),
          v.at(8),
          v.at(9),
          v.at(10),
          v.at(11),
          static_cast<int64_t>(v.at(12))};
}
Numbers numbers(const StudentState<double>& s) {
  return {s.m_t,
          s.s_k,
          s.m_s,
          s.z_tau,
          s.s_tau,
          s.a,
          s.s_one,
          s.z_one,
          s.t_y,
          s.s_y,
          s.impossible,
          s.e_s,
          static_cast<double>(s.k)};
}
TeacherState<double> teacher(const Numbers& v) { return {v.at(0), v.at(1), v.at(2), v.at(3)}; }
Numbers numbers(const TeacherState<double>& s) { return {s.m_s, s.s_one, s.e_s, s.s_y}; }

// All fields of a state, in the order of a packed one's columns.
ExtendedState<double> extended_student(const Numbers& v) {
  ExtendedState<double> s;
  size_t i = 0;
  each_column(s, kEverySum, true, [&](double& field) { field = v.at(i++); });
  s.k = static_cast<int64_t>(v.at(i));
  return s;
}
Numbers numbers(ExtendedState<double> s) {
  Numbers v;
  each_column(s, kEverySum, true, [&](double& field) { v.push_back(field); });
  v.push_back(static_cast<double>(s.k));
  return v;
}
ExtendedTeacherState<double> extended_teacher(const Numbers& v) {
  ExtendedTeacherState<double> s;
  size_t i = 0;
  each_column(s, kEverySum, false, [&](double& field) { field = v.at(i++); });
  return s;
}
Numbers numbers(ExtendedTeacherState<double> s) {
  Numbers v;
  each_column(s, kEverySum, false, [&](double& field) { v.push_back(field); });
  return v;
}

template <class End, class State>
End finished(const State& state, bool labelled, double tau, const Terms& terms, double share_rows,
             double share_labelled, const Numbers& own) {
  const Coefficients coefficients{own.empty() ? nullptr : own.data(), 1};
  End end;
  finish(state, labelled, tau, terms, {share_rows, share_labelled}, coefficients, 1.0, end);
  return end;
}
template <class End>
Numbers numbers_of(const End& end) {
  const auto& c = end.gradient;
  return {end.value, end.target.z_tau, end.target.impossible ? 1.0 : 0.0, c.student_tau, c.teacher_tau, c.one,
          c.log,     c.label};
}
template <class... Given>
Numbers extended_numbers(const Given&... given) {
  const auto end = finished<ExtendedEnd<double>>(given...);
  Numbers found = numbers_of(end);
  for (const double value : {end.gradient.reverse, end.gradient.uniform}) found.push_back(value);
  return found;
}

void define_row(py::module_ row) {
  row.def("student_fold", [](const Numbers& dt, const Numbers& ds, double inv_t, double inv_s, double weight) {
    StudentSums<double> s{};
    ExtendedSums<double> more{};
    for (size_t i = 0; i < dt.size(); ++i) {
      fold<0, kEverySum, kHoles>(s, more, dt.at(i), ds.at(i), inv_t, inv_s, weight);
    }
    return Numbers{s.z_tau, s.s_tau,    s.a,    s.s_one,      s.z_one,      s.impossible, s.e_s,
                   s.e_one, more.s_two, more.b, more.missing, more.uniform, more.share,   more.possible};
  });
  row.def("student_merge", [](const Numbers& left, const Numbers& right, double inv_tau) {
    return numbers(merge(student(left), student(right), inv_tau));
  });
  row.def("extended_merge", [](const Numbers& left, const Numbers& right, double inv_t, double inv_s) {
    return numbers(merge(extended_student(left), extended_student(right), Inverse<double>{inv_t, inv_s}));
  });
  row.def("teacher_fold", [](const Numbers& x, double weight) {
    TeacherSums<double> s{};
    ExtendedSums<double> more{};
    for (const double value : x) {
      fold<true>(s, value);
      fold_own<kUniform | kSquare>(more, value, std::exp(value), weight);
    }
    return Numbers{s.s_one, s.e_s, more.s_two, more.uniform, more.share, more.possible};
  });
  row.def("teacher_merge",
          [](const Numbers& left, const Numbers& right) { return numbers(merge(teacher(left), teacher(right))); });
  row.def("extended_teacher_merge", [](const Numbers& left, const Numbers& right) {
    return numbers(merge(extended_teacher(left), extended_teacher(right)));
  });
  row.def("wclip", [](double u, double budget, double margin) {
    const auto c = wclip(u, budget, margin);
    return Numbers{c.r, c.t_k, c.t_y};
  });
  static constexpr auto clip_from = [](const Numbers& v) { return Clip<double>{v.at(0), v.at(1), v.at(2)}; };
  row.def("replace", [](const Numbers& state, const Numbers& clip, double inv_t, double inv_s) {
    const auto t = replace(student(state), clip_from(clip), inv_t, inv_s);
    return Numbers{t.z_tau, t.a, t.impossible};
  });
  row.def("leaves", [](const Numbers& state, const Numbers& clip, double inv_t, double inv_s) {
    return leaves(student(state), clip_from(clip), {inv_t, inv_s});
  });
  row.def("recalibrated",
          [](const Numbers& state, const Numbers& clip, const Numbers& rest, double inv_t, double inv_s) {
            auto found = extended_student(state);
            recalibrate(found, clip_from(clip), Rest<double>{rest.at(0), rest.at(1), rest.at(2)}, {inv_t, inv_s}, true);
            return numbers(found);
          });
  row.def("masses", [](double near, double wrong, double rest, double low, double high) {
    const auto m = masses(near, wrong, rest, low, high);
    const auto flag = [](bool b) { return b ? 1.0 : 0.0; };
    return Numbers{m.near,          m.wrong,          m.rest, flag(m.near_binds), flag(m.wrong_binds),
                   flag(m.no_near), flag(m.all_wrong)};
  });
  row.def("tempered_fold", [](const Numbers& x, double beta) {
    TemperedSums<double> sums{0, 0, 0};
    for (const double value : x) beta == 0 ? fold<true>(sums, value, beta) : fold<false>(sums, value, beta);
    return Numbers{sums.z, sums.e, sums.v};
  });
  row.def("log_mass", [](const Numbers& s, double beta) {
    return log_mass(TemperedState<double>{s.at(0), s.at(1), s.at(2), s.at(3)}, beta);
  });
  row.def("entropy", [](const std::vector<Numbers>& s, const Numbers& m, double beta) {
    TemperedState<double> sets[3];
    for (size_t i = 0; i < 3; ++i) sets[i] = {s.at(i).at(0), s.at(i).at(1), s.at(i).at(2), s.at(i).at(3)};
    const auto found =
        entropy(sets, Masses<double>{m.at(0), m.at(1), m.at(2), m.at(3) != 0, m.at(4) != 0, false, false}, beta);
    return Numbers{found.value, found.slope};
  });
  row.attr("SEARCH") = std::vector<double>{
      kSweeps, kSteps, kPlaces, kNats, Search{false}.tolerance(), Search{true}.tolerance(), kHottest};
  static constexpr auto end = [](const Numbers& v) { return End<double>{v.at(0), {v.at(1), v.at(2)}}; };
  row.def("temper",
          [](const Numbers& low, const Numbers& high, double wanted) { return temper(end(low), end(high), wanted); });
  row.def("spread", [](const Numbers& low, const Numbers& high, double step, double share) {
    return spread(end(low), end(high), step, share);
  });
  row.def("row_weights", [](bool ignored, bool labelled, double weight) {
    const auto w = row_weights(ignored, labelled, weight);
    return Numbers{w.rows, w.labelled};
  });
  row.def("finish", [](const Numbers& state, bool labelled, double tau, const Terms& terms, double share_rows,
                       double share_labelled, const Numbers& own) {
    const auto end = [&](const auto& from) {
      return numbers_of(finished<RowEnd<double>>(from, labelled, tau, terms, share_rows, share_labelled, own));
    };
    return state.size() == 4 ? end(teacher(state)) : end(student(state));
  });
  row.def("extended_finish", [](const Numbers& state, bool labelled, double tau, const Terms& terms, double share_rows,
                                double share_labelled, const Numbers& own) {
    return state.size() == 8
               ? extended_numbers(extended_teacher(state), labelled, tau, terms, share_rows, share_labelled, own)
               : extended_numbers(extended_student(state), labelled, tau, terms, share_rows, share_labelled, own);
  });
  row.def("focal", [](double log_p, double gamma, double alpha) {
    const auto f = focal(log_p, gamma, alpha);
    return Numbers{f.value, f.slope};
  });
  row.def("gate", [](double log_p, double threshold, double scale, double power) {
    const auto w = gate(log_p, threshold, scale, power);
    return Numbers{w.value, w.slope};
  });
  row.def("term", [](int kind, double a, double b, double c, double d, double forward_kl, double reverse_kl,
                     double log_p, double entropy, double lse, double uniform) {
    ExtendedValues<double> at;
    static_cast<RowValues<double>&>(at) = {forward_kl, log_p, entropy, lse};
    at.reverse_kl = reverse_kl;
    at.uniform = uniform;
    const auto found = evaluate(Term{kind, 1, a, b, c, d}, at);
    const auto& by = found.slopes;
    return Numbers{found.value, by.forward_kl, by.reverse_kl, by.log_p, by.entropy, by.lse, by.uniform};
  });
  row.def("student_element", [](const Numbers& c, double dt, double ds, double inv_tau) {
    const StudentLogGradient<double> of{{c.at(0), c.at(1), c.at(2) * c.at(4)}, c.at(3) * c.at(4), c.at(5)};
    return element<0, true, true>(of, dt, ds, inv_tau);
  });
  row.def("extended_element", [](const Numbers& c, double dt, double ds, double inv_t, double inv_s, double weight) {
    const StudentLogGradient<double> of{{c.at(0), c.at(1), c.at(2) * c.at(4)}, c.at(3) * c.at(4), c.at(5)};
    const Exponentials<double> e{std::exp(dt * inv_t), std::exp(ds * inv_s)};
    return element<kReverse | kUniform, true, true>(ExtendedStudentGradient<double>{of, c.at(6), c.at(7)}, e,
                                                    std::exp(ds), dt, ds, inv_t, inv_s, weight);
  });
  row.def("teacher_element", [](const Numbers& c, double x, double inv_z, double log_z, double weight) {
    const ExtendedTeacherGradient<double> of{{c.at(0), c.at(1)}, c.at(2)};
    return element(of, x, inv_z, log_z, weight);
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of cudfast.";
  define_terms(m);
  m.def("row_state", state_of_call);
  m.def("row_gradient", gradient_of_call);

  m.attr("STUDENT_COLUMNS") = kStudentColumns;
  m.attr("PROJECTED_COLUMNS") = kProjectedColumns;
  m.attr("TEACHER_COLUMNS") = kTeacherColumns;
  m.attr("BLOCK") = kBlock;
  py::dict faults;  // by name, for an enum in Python
  for (const auto& [name, fault] : kFaults) faults[name] = static_cast<int>(fault);
  m.attr("FAULTS") = faults;
#if defined(_OPENMP)
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
#if defined(__clang__)
  m.attr("COMPILER") = "clang " __clang_version__;
#else
  m.attr("COMPILER") = "g++ " __VERSION__;
#endif
  m.def("isa", [] { return std::string(sweeps().isa); });
  m.def("isa_warning", [] { return std::string(isa_warning()); });
  m.def("isa_check_seconds", isa_check_seconds);
  m.def("use_isa", [](const std::string& isa) { return use(isa.c_str()); });
  m.def("runnable_isas", [] {
    int count = 0;
    const char* const* names = runnable(count);
    return std::vector<std::string>(names, names + count);
  });
  py::class_<Memory>(m, "Memory", py::buffer_protocol()).def(py::init<size_t>()).def_buffer([](Memory& memory) {
    return py::buffer_info(static_cast<char*>(memory.block.data), static_cast<py::ssize_t>(memory.bytes));
  });
  m.def("clear_pool", [] { Pool::instance().clear(); });
  m.def("limit_pool", [](size_t bytes) { Pool::instance().limit(bytes); });
  m.def("pooled_bytes", [] { return Pool::instance().kept(); });
  m.def("exp32", [](const py::object& x, const py::object& y, int64_t n) {
    sweeps().exp32(address<const float>(x), address<float>(y), n);
  });
  m.def("exp64", [](const py::object& x, const py::object& y, int64_t n) {
    sweeps().exp64(address<const double>(x), address<double>(y), n);
  });
  define_row(m.def_submodule("row", "csrc/row on scalars, in double"));
}
