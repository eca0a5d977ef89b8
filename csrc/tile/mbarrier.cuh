// mbarriers of shared memory, and what is needed around them that CUDA C++ has no name for (PTX ISA, "mbarrier",
// "elect.sync").
//
// CUTLASS has them too. But its headers for them bring libcu++ and iostream along, 140,000 lines that took two thirds
// of a tile's compile time; of CUTLASS the tiles include wgmma's MMAs alone.
#pragma once

#include <stdint.h>

namespace mxfp4_moe {

// As instructions name it; 32 bits.
__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// True in one lane of a warp, all of which ask.
__device__ __forceinline__ bool elect_one_lane() {
  uint32_t is_elected = 0;
  asm volatile("{ .reg .pred elected; elect.sync _|elected, 0xffffffff; @elected mov.u32 %0, 1; }" : "+r"(is_elected));
  return is_elected != 0;
}

// Eight bytes of shared memory: how many arrivals and bytes a phase still waits for.
class Barrier {
 public:
  __device__ __forceinline__ void init(uint32_t arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)));
  }
  // An arrival after which so many bytes of copies are still to come.
  __device__ __forceinline__ void arrive_and_expect_tx(uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes));
  }

 private:
  uint64_t state_;
};

// Makes barriers' init visible to the copies that complete on them.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;"); }

// Until the barrier's phase of this parity is complete. Memory changes with the barrier: no load moves across.
__device__ __forceinline__ void wait_for(const Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace mxfp4_moe
