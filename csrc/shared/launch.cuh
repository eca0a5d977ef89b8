// Programmatic dependent launch: a kernel starts while the one before it is still running (PTX ISA, griddepcontrol).
//
// The rule of every kernel that starts early: each warp that writes waits, and the block then lets the next kernel
// start; nothing is written before the wait, and nothing is read that the kernel just before may write. So while a
// kernel runs, all before its predecessor are complete, and what those wrote may be read even before the wait. All of
// it is read past L1 (__ldcg, relaxed.gpu) and nothing through the read-only path (__ldg): that one may serve what it
// holds for as long as the kernel runs, and the kernel runs while others still write. __ldg is for weights, biases and
// numbers that were there before the layer. finalize of many tokens does not start early (docs/decisions.md, with why
// the rule is enough; tests/cpu/test_dependent_launch.py visits every order of events).
#pragma once

#include <cuda_runtime.h>

namespace mxfp4_moe {

#ifdef __CUDACC__

// Until the kernels before this one are complete and what they wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// What a launch asks for beside grid, threads and stream.
struct LaunchOptions {
  size_t smem_bytes = 0;   // dynamic
  int cluster_blocks = 1;  // that run at once and see each other's shared memory; 1: no cluster
  bool early = true;       // by the rule above; else when the kernels before this one are done
  // How an SM's memory is divided into L1 and shared memory while the kernel runs there; an SM changes over when
  // nothing runs on it. cudaSharedmemCarveoutMaxL1: loads in flight need lines there, and behind a GEMM's block there
  // are few.
  // cudaSharedmemCarveoutMaxShared: the next kernel, a GEMM, may start beside this one's blocks.
  int carveout = cudaSharedmemCarveoutDefault;
};

// Whether launches may say how L1 and shared memory are split: since CUDA 12.5, and older drivers serve CUDA 12 wheels.
inline bool driver_takes_carveout() {
  static const bool it_does = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12050;
  }();
  return it_does;
}

template <typename Kernel, typename... Args>
cudaError_t launch_with(const LaunchOptions& options, Kernel kernel, dim3 grid, int threads, cudaStream_t stream,
                        const Args&... args) {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = options.smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  const auto ask = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = id;
    return attribute.val;
  };
  if (options.early) {
    ask(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
  }
  if (options.cluster_blocks > 1) {
    ask(cudaLaunchAttributeClusterDimension).clusterDim = {static_cast<unsigned>(options.cluster_blocks), 1, 1};
  }
  if (options.carveout != cudaSharedmemCarveoutDefault && driver_takes_carveout()) {
    ask(cudaLaunchAttributePreferredSharedMemoryCarveout).sharedMemCarveout = options.carveout;
  }
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// The launch of a kernel of small blocks before a GEMM. Where an SM that runs one has little shared memory, none of the
// GEMM's blocks can start there; the others get them all, and then the SMs that were left out get more than their part
// of the next GEMM's, which they are late with (docs/performance.md).
template <typename Kernel, typename... Args>
cudaError_t launch_before_gemm(Kernel kernel, dim3 grid, int threads, cudaStream_t stream, const Args&... args) {
  LaunchOptions options;
  options.carveout = cudaSharedmemCarveoutMaxShared;
  return launch_with(options, kernel, grid, threads, stream, args...);
}

// The usual launch: early.
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, size_t smem_bytes, cudaStream_t stream, const Args&... args) {
  LaunchOptions options;
  options.smem_bytes = smem_bytes;
  return launch_with(options, kernel, grid, threads, stream, args...);
}

#endif  // __CUDACC__

}  // namespace mxfp4_moe
