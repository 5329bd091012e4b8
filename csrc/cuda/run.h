// One launch: by the CUDA runtime, by the header that CUDFAST_LAUNCHER names, or block after block in the emulation.
#pragma once

#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#elif defined(CUDFAST_LAUNCHER)
#include CUDFAST_LAUNCHER
#else
#include <thread>
#endif

namespace cudfast {
namespace {

#if defined(__CUDACC__)

template <class Kernel>
__global__ void __launch_bounds__(kMaxThreads) row_kernel(const __grid_constant__ Kernel kernel, int cluster) {
  Executor x(cluster);
  kernel(x);
}

// The configuration for cudaLaunchKernelEx.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  Launch(const Grid& grid, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(kHeaderBytes + grid.staged);
    config.stream = static_cast<cudaStream_t>(stream);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;  // the configuration points into it
};

inline cudaError_t ask(int& value, cudaDeviceAttr attribute) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(&value, attribute, device) : error;
}

constexpr int kPortable = 8;  // blocks of the largest cluster that runs on every GPU with clusters

// Lets a kernel have all shared memory of a block, and clusters of this size. The limits are the kernel's, which other
// threads launch, too.
template <class Kernel>
cudaError_t allow_staging(int cluster) {
  const void* const kernel = reinterpret_cast<const void*>(row_kernel<Kernel>);
  int most = 0;
  cudaError_t error = ask(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess && cluster > kPortable) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

template <class Kernel>
const char* run(const Kernel& kernel, const Grid& grid, void* stream) {
  const Launch launch(grid, stream);
  cudaError_t error = grid.staged > 0 ? allow_staging<Kernel>(grid.cluster) : cudaSuccess;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch.config, row_kernel<Kernel>, kernel, grid.cluster);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The most blocks with all of their shared memory that this GPU, or this slice of one, can run as a cluster; not more
// than `most`.
template <class Kernel>
int largest_cluster(int shared, int most) {
  for (int cluster = most; cluster > 1; cluster /= 2) {
    if (allow_staging<Kernel>(cluster) != cudaSuccess) continue;
    const Launch launch({cluster, cluster, kMaxThreads, shared - kHeaderBytes}, nullptr);
    int running = 0;
    const void* const kernel = reinterpret_cast<const void*>(row_kernel<Kernel>);
    if (cudaOccupancyMaxActiveClusters(&running, kernel, &launch.config) == cudaSuccess && running > 0) return cluster;
  }
  static_cast<void>(cudaGetLastError());  // clears the error of a size that cannot run
  return 1;
}

// Whether copies and clusters are used depends on the architecture that the code was compiled for, which may be older
// than the GPU: `Kernel` is any of the kernels, all of which are compiled for the same. Devices are queried once.
template <class Kernel>
const char* find_machine(int device, Machine& found) {
  static std::mutex one;
  static std::map<int, Machine> known;
  const std::lock_guard<std::mutex> alone(one);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess && known.count(device) == 0) {
    int major = 0, minor = 0;
    Machine machine;
    cudaFuncAttributes compiled{};
    const auto add = [&](int& value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = ask(value, attribute);
    };
    add(machine.processors, cudaDevAttrMultiProcessorCount);
    add(machine.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    add(major, cudaDevAttrComputeCapabilityMajor);
    add(minor, cudaDevAttrComputeCapabilityMinor);
    if (error == cudaSuccess) {
      error = cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(row_kernel<Kernel>));
    }
    if (error == cudaSuccess) {
      machine.capability = std::min(10 * major + minor, compiled.ptxVersion);
      machine.cluster = machine.capability < 90 ? 1 : largest_cluster<Kernel>(machine.shared, kPortable);
      machine.widest = machine.capability < 90 ? 1 : largest_cluster<Kernel>(machine.shared, 2 * kPortable);
      known[device] = machine;
    }
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  found = known[device];
  return nullptr;
}

#elif !defined(CUDFAST_LAUNCHER)

template <class Kernel>
const char* run(const Kernel& kernel, const Grid& grid, void*) {
  for (int first = 0; first < grid.blocks; first += grid.cluster) {
    Cluster all(grid, first);
    const auto block = [&](int rank) {
      Executor x(all, rank);
      kernel(x);
    };
    std::vector<std::thread> others;
    for (int rank = 1; rank < grid.cluster; ++rank) others.emplace_back(block, rank);
    block(0);
    for (std::thread& other : others) other.join();
  }
  return nullptr;
}

// A small Hopper GPU: few processors, so that blocks share rows in small tests, too.
template <class Kernel>
const char* find_machine(int, Machine& found) {
  found = {4, 227 << 10, 90, 8, 16};
  return nullptr;
}

#endif

}  // namespace
}  // namespace cudfast
