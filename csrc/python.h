// Conversions for both bindings: tensors and terms of Python to the types of launch.h. Tensors are read through their
// Python methods, without torch headers, so one binary works with every version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "launch.h"

namespace py = pybind11;
using namespace cudfast;

namespace {

// Thrown for logits whose rows a Matrix cannot describe.
struct NoLayout {};

// A Python name, created once: for a small batch, lookups are a considerable part of a call.
#define CUDFAST_NAME(name)                                               \
  ([]() -> PyObject* {                                                   \
    static PyObject* const interned = PyUnicode_InternFromString(#name); \
    return interned;                                                     \
  }())

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object called(py::handle tensor, PyObject* method) {
  return checked(PyObject_CallMethodNoArgs(tensor.ptr(), method));
}

inline int64_t integer(const py::object& value) {
  const long long number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

// Address of a tensor's data; null for None.
template <class T>
inline T* address(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  void* const data = PyLong_AsVoidPtr(called(tensor, CUDFAST_NAME(data_ptr)).ptr());
  if (!data && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<T*>(data);
}

// torch.Size is a tuple of ints.
inline py::object shape_of(py::handle tensor) { return checked(PyObject_GetAttr(tensor.ptr(), CUDFAST_NAME(shape))); }
inline int64_t size_at(const py::object& shape, Py_ssize_t axis) {
  return integer(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(shape.ptr(), axis)));
}
inline int64_t width(const py::object& shape) { return size_at(shape, PyTuple_GET_SIZE(shape.ptr()) - 1); }

// cudfast.rows.layout.DTYPES, in the order of DType.
inline DType dtype_of(py::handle tensor) {
  static PyObject* const known = py::object(py::module_::import("cudfast.rows.layout").attr("DTYPES")).release().ptr();
  const py::object dtype = checked(PyObject_GetAttr(tensor.ptr(), CUDFAST_NAME(dtype)));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(known); ++i) {
    if (PyTuple_GET_ITEM(known, i) == dtype.ptr()) return static_cast<DType>(i);
  }
  throw py::type_error("a dtype that is not in cudfast.rows.layout.DTYPES");
}

// (..., V) logits whose last axis is dense; None is absent.
inline Matrix matrix(py::handle tensor) {
  Matrix m;
  if (tensor.is_none()) return m;
  m.data = address<char>(tensor);
  m.dtype = dtype_of(tensor);
  if (called(tensor, CUDFAST_NAME(is_contiguous)).ptr() == Py_True) {
    m.outer_stride = width(shape_of(tensor));
  } else {
    const py::object layout = py::module_::import("cudfast.rows.layout").attr("row_layout")(tensor);
    if (layout.is_none()) throw NoLayout();
    std::tie(m.inner, m.outer_stride, m.inner_stride) = layout.cast<std::tuple<int64_t, int64_t, int64_t>>();
  }
  return m;
}

// cudfast.classes.sets.ClassSets, or None.
inline ClassSets make_sets(py::handle sets) {
  if (sets.is_none()) return {};
  return {address<const int64_t>(sets.attr("offsets")), address<const int64_t>(sets.attr("indices"))};
}

// cudfast.rows.call.Constraints, field by field.
inline Constraints make_constraints(py::handle fields) {
  const auto field = [&](int i) { return py::handle(PyTuple_GET_ITEM(fields.ptr(), i)); };
  Constraints c;
  c.near = make_sets(field(0));
  c.wrong = make_sets(field(1));
  c.top1 = field(2).cast<bool>();
  c.bounds = address<const double>(field(3));
  c.relax = field(4).cast<bool>();
  return c;
}

// A tensor that has elements but no memory: torch gives 0 as its address.
inline void require_memory(const void* data, py::handle tensor, const char* name) {
  if (data || tensor.is_none()) return;
  throw py::value_error(std::string(name) +
                        " has no memory: its storage has been freed (as FSDP frees a parameter "
                        "that it has not gathered); gather it, or pass a copy");
}

// cudfast.rows.call.Rows, field by field.
inline Rows make_rows(const py::tuple& fields, int64_t ignore_index, int64_t unlabeled_index, int threads) {
  const auto field = [&](int i) { return py::handle(PyTuple_GET_ITEM(fields.ptr(), i)); };
  Rows rows;
  rows.logits = matrix(field(0));
  rows.target = matrix(field(1));
  rows.labels = address<const int64_t>(field(2));
  rows.weight = address<const double>(field(3));
  rows.temperature = address<const double>(field(4));
  rows.coefficients = address<const double>(field(5));
  rows.scalar = field(6).cast<double>();
  rows.classes = field(8).cast<int64_t>();
  if (!field(9).is_none()) rows.constraints = make_constraints(field(9));
  rows.class_weight = address<const char>(field(10));
  const py::object shape = shape_of(field(0));
  rows.padded = width(shape);
  rows.rows = 1;
  for (Py_ssize_t axis = 0; axis + 1 < PyTuple_GET_SIZE(shape.ptr()); ++axis) rows.rows *= size_at(shape, axis);
  if (rows.coefficients) rows.coefficients_per_row = width(shape_of(field(5))) == rows.rows;
  rows.ignore_index = ignore_index;
  rows.unlabeled_index = unlabeled_index;
  rows.threads = threads;
  if (rows.rows > 0 && rows.classes > 0) {
    require_memory(rows.logits.data, field(0), "student_logits (or logits)");
    require_memory(rows.target.data, field(1), "teacher_logits");
    require_memory(rows.labels, field(2), "labels");
    require_memory(rows.weight, field(3), "weight");
    require_memory(rows.temperature, field(4), "temperature");
    require_memory(rows.coefficients, field(5), "the coefficients of the terms");
    require_memory(rows.class_weight, field(10), "class_weight");
  }
  return rows;
}

// cudfast.rows.call.State, or None.
inline void set_state(Outputs& out, const py::object& state) {
  if (state.is_none()) return;
  out.state = address<void>(PyTuple_GET_ITEM(state.ptr(), 0));
  out.top1 = address<int64_t>(PyTuple_GET_ITEM(state.ptr(), 1));
}
inline double* divisors_in(const py::object& state) {
  return state.is_none() ? nullptr : address<double>(PyTuple_GET_ITEM(state.ptr(), 2));
}

// From (kind, coefficient, a, b, c, d), one tuple a term.
inline Terms terms_from(const py::list& given, bool clip, double budget, double margin, int sums,
                        double teacher_temperature, double leaving) {
  if (given.size() > static_cast<size_t>(kMaxTerms)) {
    throw py::value_error(std::to_string(given.size()) + " terms: a kernel takes at most " + std::to_string(kMaxTerms));
  }
  Term terms[kMaxTerms];
  int count = 0;
  for (const py::handle each : given) {
    const auto fields = each.cast<py::tuple>();
    const auto number = [&](size_t i) { return fields[i].cast<double>(); };
    terms[count++] = {fields[0].cast<int>(), number(1), number(2), number(3), number(4), number(5)};
  }
  return make_terms(terms, count, clip, budget, margin, sums, teacher_temperature, leaving);
}

inline void define_terms(py::module_& m) {
  py::class_<Terms>(m, "Terms", py::module_local())
      .def(py::init(&terms_from), py::arg("terms"), py::arg("clip"), py::arg("budget"), py::arg("margin"),
           py::arg("sums"), py::arg("teacher_temperature"), py::arg("leaving"));
}

}  // namespace
