// One launch: by the CUDA runtime, or block after block in the emulation.
#pragma once

#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>

#include <algorithm>
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
  if (grid.staged > 0) {  // the most that a block may ask for: a limit of the kernel, which other threads launch, too
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(row_kernel<Kernel>),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, row_kernel<Kernel>, kernel, grid.cluster);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What is copied or clustered depends on what the code was compiled for, which may be less than what the GPU can do:
// `Kernel` is any of the kernels, all of which are compiled for the same.
template <class Kernel>
const char* find_machine(int device, Machine& found) {
  int major = 0, minor = 0;
  cudaFuncAttributes compiled{};
  cudaError_t error = cudaSetDevice(device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(found.processors, cudaDevAttrMultiProcessorCount);
  ask(found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(row_kernel<Kernel>));
  found.capability = std::min(10 * major + minor, compiled.ptxVersion);
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
template <class Kernel>
const char* find_machine(int, Machine& found) {
  found = {4, 227 << 10, 90};
  return nullptr;
}

#endif

}  // namespace
}  // namespace cudfast
