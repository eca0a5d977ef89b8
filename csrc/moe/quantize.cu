// Quantize-permute: hidden_states to MXFP8 rows in expert order. Permute: the same for hidden_states that are MXFP8.
//
// in   hidden [T, H] bf16 or fp16; slot_row [T * k]: the sorted row of each slot t * k + j, or -1
//      or hidden [T, H] E4M3 with scales E8M0, linear [T, H/32] or 128x4-swizzled (T padded to 128). A scale byte above
//      kMaxInputScale, NaN among them, becomes a poisoned block, as a NaN in bf16 does
// out  codes [R, H] E4M3, each block of 32 stored even k first; scales [ceil(H/128), R padded to 4, 4] E8M0
//      or, instead of codes, folded bf16 [R, H] (shared/folded.cuh)
// Called by layer.cpp between route and GEMM1. A token is quantized once and written once per expert that it goes to.
// Rows past the valid count are not touched.
// Why it is fast: nothing but the writes needs the routing, so the rest is done while route still runs; each lane does
// one 16-byte load and, folded, one 16-byte store per row, a quad finds amax with two shuffles, and a half-warp writes
// one scale word. Four choices' row numbers are asked for at once.
#include "moe/halves.cuh"
#include "moe/quantize_mx.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;
// The byte of 2^121, twice the largest scale that a quantizer that rounds up makes of bf16 values. SM90's kernels
// multiply scales by 2^6, which overflows fp32 beyond it. reference.MXFP8_INPUT_SCALE_MAX is the same number.
constexpr uint32_t kMaxInputScale = 248;

// With more tokens than this, a thread has several at once: then all of them are read and quantized while route runs.
constexpr int kFewTokens = 512, kTokensAtOnce = 4;
constexpr int kChoicesAtOnce = 4;

// Writes one K tile of kTokens tokens, from `token` on, `stride` apart, to each of their rows.
template <int kTokens, typename Args>
__device__ __forceinline__ void store_to_rows(const KTile (&tiles)[kTokens], int64_t token, int64_t stride, int k_tile,
                                              const Args& args) {
  const RowsOut to = {args.codes, args.scales, args.has_far, int64_t{args.tokens} * args.top_k, args.hidden_size};
  for (int j0 = 0; j0 < args.top_k; j0 += kChoicesAtOnce) {
    int rows[kTokens][kChoicesAtOnce];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t of = token + t * stride;
#pragma unroll
      for (int j = 0; j < kChoicesAtOnce; ++j) {
        const bool is_one = of < args.tokens && j0 + j < args.top_k;
        rows[t][j] = is_one ? __ldcg(args.slot_row + of * args.top_k + j0 + j) : -1;
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int j = 0; j < kChoicesAtOnce; ++j) {
        if (rows[t][j] >= 0) {  // the same for the whole warp
          store_k_tile(tiles[t], rows[t][j], k_tile, to);
        }
      }
    }
  }
}

template <HalfType kType, int kTokens>
__global__ void __launch_bounds__(kThreads) quantize_permute_kernel(const QuantizePermuteArgs args) {
  const int k_tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane;
  const auto* hidden = static_cast<const typename Half<kType>::Element*>(args.hidden);
  const int64_t stride = gridDim.y;
  if (!args.hidden_is_ready) {
    wait_for_previous_kernel();
  }
  for (int64_t token = blockIdx.y; token < args.tokens; token += kTokens * stride) {
    uint4 packed[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t of = token + t * stride;
      packed[t] = of < args.tokens && column < args.hidden_size
                      ? __ldcg(reinterpret_cast<const uint4*>(hidden + of * args.hidden_size + column))
                      : make_uint4(0, 0, 0, 0);
    }
    KTile tiles[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float x[kValuesPerLane];
      widen<kType>(packed[t], x);
      tiles[t] = make_k_tile(quantize_quad(x), args.has_far != nullptr);
    }
    if (token == blockIdx.y) {
      wait_for_previous_kernel();
      let_next_kernel_start();
    }
    store_to_rows(tiles, token, stride, k_tile, args);
  }
}

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
    const KTile tiles[1] = {make_k_tile(quad, args.has_far != nullptr)};
    store_to_rows(tiles, token, 0, k_tile, args);
  }
}

template <typename Args>
dim3 grid_of(const Args& args, int tokens_at_once) {
  const int k_tiles = static_cast<int>(scale_k_tiles(args.hidden_size));
  const int of_tokens = (args.tokens + tokens_at_once - 1) / tokens_at_once;
  return dim3((k_tiles + kTilesPerBlock - 1) / kTilesPerBlock, of_tokens < kMaxGridY ? of_tokens : kMaxGridY);
}

template <HalfType kType>
cudaError_t launch_quantize(const QuantizePermuteArgs& args, cudaStream_t stream) {
  return args.tokens <= kFewTokens
             ? launch(quantize_permute_kernel<kType, 1>, grid_of(args, 1), kThreads, 0, stream, args)
             : launch(quantize_permute_kernel<kType, kTokensAtOnce>, grid_of(args, kTokensAtOnce), kThreads, 0, stream,
                      args);
}

}  // namespace

cudaError_t launch_quantize_permute(const QuantizePermuteArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) {
    return cudaSuccess;
  }
  return args.type == HalfType::kBFloat16 ? launch_quantize<HalfType::kBFloat16>(args, stream)
                                          : launch_quantize<HalfType::kFloat16>(args, stream);
}

cudaError_t launch_permute(const PermuteArgs& args, cudaStream_t stream) {
  return args.tokens == 0 ? cudaSuccess : launch(permute_kernel, grid_of(args, 1), kThreads, 0, stream, args);
}

}  // namespace mxfp4_moe
