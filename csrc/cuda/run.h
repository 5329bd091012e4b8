// One launch: by the CUDA runtime, or block after block in the emulation.
#pragma once

#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace cudfast {
namespace {

#if defined(__CUDACC__)

template <class Kernel>
__global__ void __launch_bounds__(kMaxThreads) row_kernel(const __grid_constant__ Kernel kernel, int cluster) {
  Executor x(cluster);
  kernel(x);
}

template <class Kernel>
const char* run(const Kernel& kernel, const Grid& grid, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(kHeaderBytes + grid.staged);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  cudaError_t error = cudaSuccess;
  if (grid.staged > 0) {
    error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(row_kernel<Kernel>),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.dynamicSmemBytes));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, row_kernel<Kernel>, kernel, grid.cluster);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* find_machine(int device, Machine& found) {
  int major = 0, minor = 0;
  cudaError_t error = cudaSetDevice(device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(found.processors, cudaDevAttrMultiProcessorCount);
  ask(found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  found.capability = 10 * major + minor;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

template <class Kernel>
const char* run(const Kernel& kernel, const Grid& grid, void*) {
  for (int first = 0; first < grid.blocks; first += grid.cluster) {
    Executor x(grid, first);
    kernel(x);
  }
  return nullptr;
}

// A small Hopper: few processors, so that rows are shared soon.
inline const char* find_machine(int, Machine& found) {
  found = {4, 227 << 10, 90};
  return nullptr;
}

#endif

}  // namespace
}  // namespace cudfast
