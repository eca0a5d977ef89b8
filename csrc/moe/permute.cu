// Permute: hidden_states that are MXFP8 already to rows in expert order; what quantize_permute.cu does for bf16 and
// fp16.
//
// in   hidden [T, H] E4M3 with scales E8M0, linear [T, H/32] or 128x4-swizzled (T padded to 128). A scale byte above
//      kMaxInputScale, NaN among them, becomes a poisoned block, as a NaN in bf16 does
// out  as quantize_permute.cu
// Called by layer.cpp between route and GEMM1. Rows past the valid count are not touched.
#include "moe/permuted_rows.cuh"

namespace mxfp4_moe {
namespace {

// The byte of 2^121, twice the largest scale that a quantizer that rounds up makes of bf16 values; what is beyond is no
// quantizer's. reference.MXFP8_INPUT_SCALE_MAX is the same number.
constexpr uint32_t kMaxInputScale = 248;

__global__ void __launch_bounds__(kThreads) permute_kernel(const PermuteArgs args) {
  const int k_tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane;
  const int k_block = column / kScaleBlock;
  wait_for_previous_kernel();
  let_next_kernel_start();

  for (int64_t token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    QuadCodes quad = {};
    if (column < args.hidden_size) {
      const uint2 codes = __ldcg(reinterpret_cast<const uint2*>(args.hidden + token * args.hidden_size + column));
      const int64_t at = args.scale_is_swizzled ? swizzled_scale_offset(token, k_block, args.hidden_size)
                                                : token * (args.hidden_size / kScaleBlock) + k_block;
      const uint32_t scale = __ldcg(args.hidden_scale + at);
      quad = scale > kMaxInputScale
                 ? QuadCodes{kPoisonCodes, kPoisonCodes, kPoisonScale}
                 : QuadCodes{__byte_perm(codes.x, codes.y, 0x6420), __byte_perm(codes.x, codes.y, 0x7531), scale};
    }
    const KTile tiles[1] = {make_k_tile(quad, args.format == RowFormat::kMxfp8InBf16)};
    store_to_rows(tiles, token, 0, k_tile, args);
  }
}

}  // namespace

cudaError_t launch_permute(const PermuteArgs& args, cudaStream_t stream) {
  return args.tokens == 0 ? cudaSuccess : launch_before_gemm(permute_kernel, grid_of(args, 1), kThreads, stream, args);
}

}  // namespace mxfp4_moe
