// The kernel's own expand_weight (csrc/tile/mma_mx.cuh), run on the host: reads words, writes each one's registers.
// The header is device code, so what it asks CUDA for is declared here; only the expansion is ever called.
// MXFP4_MOE_ORDER_CONTAINERS chooses SM12x's, without it it is SM90's.
#include <stdint.h>
#include <stdio.h>

#define __CUDACC__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#ifdef MXFP4_MOE_ORDER_CONTAINERS
#define __CUDA_ARCH__ 1200
#else
#define __CUDA_ARCH__ 900
#endif

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) {  // CUDA Math API, "Integer Intrinsics"
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by % 32));
}
struct {
  int x;
} threadIdx;
uint32_t __shfl_sync(unsigned, uint32_t, int);
uint32_t __byte_perm(uint32_t, uint32_t, uint32_t);
float __uint_as_float(uint32_t);
float fmaf(float, float, float);

#include "tile/mma_mx.cuh"

int main() {
  for (uint32_t word; fread(&word, 4, 1, stdin) == 1;) {
    const mxfp4_moe::Fragment fragment = mxfp4_moe::expand_weight(word);
    fwrite(&fragment, sizeof fragment, 1, stdout);
  }
}
