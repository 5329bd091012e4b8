// Hands every launch of a CUDA kernel to a function that a test sets, instead of running it: CUDFAST_LAUNCHER of
// csrc/cuda/run.h. The dispatch, the plans and the arguments are the package's own.
#pragma once

#include <typeinfo>

#include "cuda/launch.h"

namespace cudfast {

// The kernel's type as the compiler mangles it, its argument, and the grid. The answer is null, or what went wrong.
using Recorder = const char* (*)(const char* type, const void* kernel, int bytes, int blocks, int cluster, int threads,
                                 int shared);

}  // namespace cudfast

// For all launches that follow: the function, and what they think the GPU has.
extern "C" __attribute__((visibility("default"))) void cudfast_record(cudfast::Recorder recorder, int processors,
                                                                      int shared, int cluster);

namespace cudfast {

extern Recorder recorder;
extern Machine recorded;

namespace {

template <class Kernel>
const char* run(const Kernel& kernel, const Grid& grid, void*) {
  return recorder(typeid(Kernel).name(), &kernel, sizeof kernel, grid.blocks, grid.cluster, grid.threads,
                  kHeaderBytes + grid.staged);
}

template <class Kernel>
const char* find_machine(int, Machine& found) {
  found = recorded;
  return nullptr;
}

}  // namespace
}  // namespace cudfast
