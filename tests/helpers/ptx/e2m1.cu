// Conversions to E2M1 alone, for test_ptx_fp4_rows.py: of x [8 * words] each code by hand, and words of eight.
#include "shared/fp4.cuh"

struct Conversions {
  const float* x;
  uint8_t* by_hand;
  uint32_t* words;
};

extern "C" __global__ void encode(const Conversions to) {
  const int word = blockIdx.x * blockDim.x + threadIdx.x;
  float eight[8];
  for (int i = 0; i < 8; ++i) {
    eight[i] = to.x[word * 8 + i];
    to.by_hand[word * 8 + i] = static_cast<uint8_t>(mxfp4_moe::e2m1_by_hand(eight[i]));
  }
  to.words[word] = mxfp4_moe::encode8_e2m1(eight);
}
