// The launches of one dtype, recorded: see recorder.h. Linked with csrc/cuda/launch.cpp and bindings.cpp it is a module
// like cudfast/_cuda.
#include "cuda/rows.h"

#if CUDFAST_DTYPE < 0

cudfast::Recorder cudfast_recorder = nullptr;
cudfast::Machine cudfast_machine{};

namespace cudfast {

template <>
const Kernels& kernels<Where::device>() {
  return kernels<Where::emulated>();
}

}  // namespace cudfast

#endif
