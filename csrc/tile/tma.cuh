// Bulk copies from global memory to this block's shared memory, completing on an mbarrier.
//
// The destination is written .shared::cta, not .shared::cluster as in CuTe's SM90 atoms: there are no clusters here.
// Everything is a tensor copy, scales too: compute-sanitizer's racecheck does not see that an mbarrier orders a plain
// bulk copy, and reports its every byte. (PTX ISA 8.6, cp.async.bulk.tensor.)
#pragma once

#include <cuda.h>
#include <stdint.h>

#include <cute/arch/util.hpp>

namespace mxfp4_moe {

// L2 eviction priorities as the copy unit encodes them (the values of cute::TMA::CacheHintSm90). Weights are read
// once, by few blocks, and would push everything else out of L2; activations are read by many.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void tma_load_2d(void* smem, const CUtensorMap& map, uint64_t* barrier, int x, int y,
                                            uint64_t cache_hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(cute::cast_smem_ptr_to_uint(smem)),
      "l"(&map), "r"(x), "r"(y), "r"(cute::cast_smem_ptr_to_uint(barrier)), "l"(cache_hint)
      : "memory");
}

// Until the barrier's phase of this parity is complete. CUTLASS's wait is not enough: it does not tell the compiler
// that memory changes with the barrier, so that loads move across, and its time limit costs instructions in every wait.
template <class Barrier>
__device__ __forceinline__ void wait_for(const Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
          cute::cast_smem_ptr_to_uint(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace mxfp4_moe
