// The kernels' own expansion of weights, run on the host: reads words, writes each one's registers. Device code, so what
// it asks CUDA for is declared here; only the expansion is ever called.
// MXFP4_MOE_ORDER_CONTAINERS chooses SM12x's expand_weight (csrc/tile/sm12x/mma.cuh), without it it is expand_bf16 or
// expand_fp16 (csrc/tile/bf16). Their headers want CUTLASS on a device, so the test cuts the function out of one:
// expand_pairs.inc.
#include <stdint.h>
#include <stdio.h>

#define __CUDACC__
#define __device__
#define __host__
#define __forceinline__ inline
#define __CUDA_ARCH__ 1200

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) {  // CUDA Math API, "Integer Intrinsics"
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by % 32));
}

inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (by % 32) >> 32);
}

#ifdef MXFP4_MOE_ORDER_CONTAINERS
struct {
  int x;
} threadIdx;

#include "tile/sm12x/mma.cuh"

struct Registers {
  mxfp4_moe::Fragment of_word;
  explicit Registers(uint32_t word) : of_word(mxfp4_moe::expand_weight(word)) {}
};
#else
#include "expand_pairs.inc"

struct Registers {
  uint32_t pairs[4];
  explicit Registers(uint32_t word) { expand(pairs, word); }
};
#endif

int main() {
  for (uint32_t word; fread(&word, 4, 1, stdin) == 1;) {
    const Registers registers(word);
    fwrite(&registers, sizeof registers, 1, stdout);
  }
}
