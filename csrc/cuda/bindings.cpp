// pybind11: the two sweeps on a GPU, or in the emulation if the device is -1. No function synchronises with the GPU.
#include <memory>
#include <stdexcept>

#include "../python.h"
#include "launch.h"

namespace {

struct Device {
  const Kernels& kernels;
  Machine machine;
  void* stream;

  Device(int device, uintptr_t on)
      : kernels(device < 0 ? cudfast::kernels<Where::emulated>() : cudfast::kernels<Where::device>()),
        stream(reinterpret_cast<void*>(on)) {
    ask(kernels.machine(device, machine), "the CUDA device " + std::to_string(device) + " cannot be used: ");
  }
  static void ask(const char* error, const std::string& what) {
    if (error) throw std::runtime_error(what + error);
  }
};

void sweep_unlocked(const Call& call, const Terms& terms, int device, uintptr_t stream, const Tuning& tuning = {}) {
  const py::gil_scoped_release unlocked;
  const Device on(device, stream);
  sweep(on.kernels, call, terms, on.machine, on.stream, tuning);
}

// Both sweeps return false for logits whose rows a Matrix cannot describe.
bool state_of_call(const py::tuple& fields, const Terms& terms, int64_t ignore_index, int64_t unlabeled_index,
                   int device, uintptr_t stream, int cluster, int threads, bool statistics, const py::object& divisors,
                   const py::object& loss, const py::object& state, const py::object& gradient,
                   const py::object& parts) try {
  Call call;
  call.rows = make_rows(fields, ignore_index, unlabeled_index, 1);
  call.divisors = address<const double>(divisors);
  call.statistics = statistics;
  call.out.loss = address<void>(loss);
  set_state(call.out, state);
  call.out.gradient = matrix(gradient);
  call.parts = address<void>(parts);
  sweep_unlocked(call, terms, device, stream, {cluster, threads});
  return true;
} catch (const NoLayout&) {
  return false;
}

bool gradient_of_call(const py::tuple& fields, const Terms& terms, int64_t ignore_index, int64_t unlabeled_index,
                      int device, uintptr_t stream, const py::object& upstream, bool per_row_upstream,
                      const py::object& state, const py::object& gradient) try {
  Call call;
  call.rows = make_rows(fields, ignore_index, unlabeled_index, 1);
  call.from = From::state;
  call.divisors = divisors_in(state);
  call.upstream = {address<const void>(upstream), per_row_upstream};
  set_state(call.out, state);
  call.out.gradient = matrix(gradient);
  sweep_unlocked(call, terms, device, stream);
  return true;
} catch (const NoLayout&) {
  return false;
}

void count_rows(const py::object& labels, const py::object& weight, int64_t n, int64_t ignore_index,
                int64_t unlabeled_index, int device, uintptr_t stream, const py::object& divisors) {
  Rows rows;
  rows.rows = n;
  rows.labels = address<const int64_t>(labels);
  rows.weight = address<const double>(weight);
  rows.ignore_index = ignore_index;
  rows.unlabeled_index = unlabeled_index;
  const Device on(device, stream);
  Device::ask(on.kernels.count(rows, address<double>(divisors), on.stream), "the CUDA kernel that counts rows: ");
}

bool scale_rows(const py::object& gradient, int device, uintptr_t stream, const py::object& upstream,
                bool per_row) try {
  const Matrix g = matrix(gradient);
  const py::object shape = shape_of(gradient);
  const int64_t columns = width(shape), rows = integer(called(gradient, CUDFAST_NAME(numel))) / columns;
  const Device on(device, stream);
  const Upstream by{address<const void>(upstream), per_row};
  Device::ask(on.kernels.scale(g, rows, columns, by, shared_rows(rows, columns, on.machine.processors), on.stream),
              "the CUDA kernel that scales a gradient: ");
  return true;
} catch (const NoLayout&) {
  return false;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of cudfast.";
  define_terms(m);
  m.def("row_state", state_of_call);
  m.def("row_gradient", gradient_of_call);
  m.def("count", count_rows);
  m.def("scale", scale_rows);
  m.def("parts", [](int64_t rows, int64_t classes, int device) {
    return shared_rows(rows, classes, Device(device, 0).machine.processors);
  });
  m.attr("PART") = static_cast<int>(sizeof(StudentState<double>) / sizeof(double));
  m.attr("HEADER") = kHeaderBytes;
  m.attr("ARCHITECTURES") = CUDFAST_CUDA_ARCHS;
}
