// What the layer's small kernels share: sizes, and how they are launched.
#pragma once

#include "shared/launch.cuh"

namespace mxfp4_moe {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxGridY = 65535;

// Not early, as shared/launch.cuh does: when the kernels before this one are done.
template <typename Kernel, typename... Args>
cudaError_t launch_in_order(Kernel kernel, dim3 grid, int threads, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Whether launches may say how L1 and shared memory are split: since CUDA 12.5, and older drivers serve CUDA 12 wheels.
inline bool driver_takes_carveout() {
  static const bool it_does = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12050;
  }();
  return it_does;
}

// As early as shared/launch.cuh does, but on SMs that have given their shared memory back to L1: loads in
// flight need lines there, and behind a GEMM's block there are few. An SM changes over when nothing runs on it.
template <typename Kernel, typename... Args>
cudaError_t launch_with_most_l1(Kernel kernel, dim3 grid, int threads, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[1].val.sharedMemCarveout = cudaSharedmemCarveoutMaxL1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = driver_takes_carveout() ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace mxfp4_moe
