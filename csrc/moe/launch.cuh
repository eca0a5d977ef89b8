// What the layer's small kernels share: sizes, and how they are launched.
#pragma once

#include "../tile/dependent_launch.cuh"

namespace mxfp4_moe {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxGridY = 65535;

// Not early, as tile/dependent_launch.cuh does: when the kernels before this one are done.
template <typename Kernel, typename... Args>
cudaError_t launch_in_order(Kernel kernel, dim3 grid, int threads, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace mxfp4_moe
