// Programmatic dependent launch: a kernel starts while the one before it is still running (PTX ISA, griddepcontrol).
//
// The rule of every kernel that starts early: each warp that writes waits, and the block then lets the next kernel
// start; nothing is written before the wait, and nothing is read that the kernel just before may write. So while a
// kernel runs, all before its predecessor are complete, and what those wrote may be read even before the wait. All of
// it is read past L1 (__ldcg, relaxed.gpu) and nothing through the read-only path (__ldg): that one may serve what it
// holds for as long as the kernel runs, and the kernel runs while others still write. __ldg is for weights, biases and
// numbers that were there before the layer. finalize does not start early (docs/decisions.md).
#pragma once

#include <cuda_runtime.h>

namespace mxfp4_moe {

#ifdef __CUDACC__

// Until the kernels before this one are complete and what they wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// Blocks that run at once and see each other's shared memory; 1: no cluster.
struct ClusterOf {
  int blocks;
};

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, size_t smem_bytes, cudaStream_t stream, ClusterOf cluster,
                   const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster.blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster.blocks > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, size_t smem_bytes, cudaStream_t stream, const Args&... args) {
  return launch(kernel, grid, threads, smem_bytes, stream, ClusterOf{1}, args...);
}

#endif  // __CUDACC__

}  // namespace mxfp4_moe
