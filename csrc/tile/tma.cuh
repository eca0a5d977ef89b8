// Bulk copies from global memory to this block's shared memory, completing on an mbarrier.
//
// The destination is written .shared::cta, not .shared::cluster as in CuTe's SM90 atoms: there are no clusters here.
// Everything is a tensor copy, scales too: compute-sanitizer's racecheck does not see that an mbarrier orders a plain
// bulk copy, and reports its every byte. (PTX ISA 8.6, cp.async.bulk.tensor.)
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "tile/mbarrier.cuh"

namespace mxfp4_moe {

// L2 eviction priorities as the copy unit encodes them (the values of cute::TMA::CacheHintSm90). Weights are read
// once, by few blocks, and would push everything else out of L2; activations are read by many.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void tma_load_2d(void* smem, const CUtensorMap& map, const Barrier* barrier, int x, int y,
                                            uint64_t cache_hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(shared_address(smem)),
      "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier)), "l"(cache_hint)
      : "memory");
}

}  // namespace mxfp4_moe
