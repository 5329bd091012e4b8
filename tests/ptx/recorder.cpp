// The launches of one dtype, recorded: see recorder.h. Linked with csrc/cuda/launch.cpp and bindings.cpp it is a module
// like cudfast/_cuda.
#include "cuda/rows.h"

#if CUDFAST_DTYPE < 0

namespace cudfast {

Recorder recorder = nullptr;
Machine recorded;

template <>
const Kernels& kernels<Where::device>() {
  return kernels<Where::emulated>();
}

}  // namespace cudfast

extern "C" void cudfast_record(cudfast::Recorder recorder, int processors, int shared, int cluster) {
  cudfast::recorder = recorder;
  cudfast::recorded.processors = processors;
  cudfast::recorded.shared = shared;
  cudfast::recorded.capability = 90;
  cudfast::recorded.cluster = cudfast::recorded.widest = cluster;
}

#endif
