// Quantize-permute: hidden_states to the rows that GEMM1 reads, in expert order.
//
// in   hidden [T, H] bf16 or fp16; slot_row [T * k]: the sorted row of each slot t * k + j, or -1
// out  codes [R, H] E4M3, each block of 32 stored even k first; scales [ceil(H/128), R padded to 4, 4] E8M0
//      or bf16 [R, H], the same values or as they came (shared/bf16_rows.cuh); or fp16 [R, H] as they came; or of
//      MXFP4 packed E2M1 [R, H / 2], plain k order, and scales as MXFP8's, or bf16 again (shared/folded_fp4.cuh)
//      NVFP4: nvfp4_permute.cu
// Called by layer.cpp between route and GEMM1. A token is quantized once and written once per expert that it goes to.
// Rows past the valid count are not touched.
// Why it is fast: nothing but the writes needs the routing, so the rest is done while route still runs; each lane does
// one 16-byte load and, of bf16, one 16-byte store per row, a quad finds amax with two shuffles, and a half-warp writes
// one scale word. Four choices' row numbers are asked for at once.
#include "moe/halves.cuh"
#include "moe/permuted_rows.cuh"

namespace mxfp4_moe {
namespace {

// With more tokens than this, a thread has several at once: then all of them are read and quantized while route runs.
constexpr int kFewTokens = 512, kTokensAtOnce = 4;

// A kernel each for MXFP4 and for fp16 rows, so that the others' are what they are without them.
enum class RowKind { kOthers, kMxfp4, kFp16 };

template <HalfType kType, int kTokens, RowKind kKind>
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
      if constexpr (kKind == RowKind::kFp16 && kType == HalfType::kFloat16) {
        tiles[t].words = packed[t];
        continue;
      }
      float x[kValuesPerLane];
      widen<kType>(packed[t], x);
      if constexpr (kKind == RowKind::kMxfp4) {
        tiles[t] = make_mxfp4_tile(x, args.format);
      } else if constexpr (kKind == RowKind::kFp16) {
        tiles[t] = make_fp16_tile(x);
      } else {
        tiles[t] = make_k_tile(x, args.format);
      }
    }
    if (token == blockIdx.y) {
      wait_for_previous_kernel();
      let_next_kernel_start();
    }
    store_to_rows<kKind == RowKind::kMxfp4>(tiles, token, stride, k_tile, args);
  }
}

template <HalfType kType, RowKind kKind>
cudaError_t launch_quantize(const QuantizePermuteArgs& args, cudaStream_t stream) {
  const int at_once = args.tokens <= kFewTokens ? 1 : kTokensAtOnce;
  const auto kernel =
      at_once == 1 ? quantize_permute_kernel<kType, 1, kKind> : quantize_permute_kernel<kType, kTokensAtOnce, kKind>;
  return launch_before_gemm(kernel, grid_of(args, at_once), kThreads, stream, args);
}

template <HalfType kType>
cudaError_t launch_for(const QuantizePermuteArgs& args, cudaStream_t stream) {
  if (is_mxfp4(args.format)) {
    return launch_quantize<kType, RowKind::kMxfp4>(args, stream);
  }
  return args.format == RowFormat::kFp16 ? launch_quantize<kType, RowKind::kFp16>(args, stream)
                                         : launch_quantize<kType, RowKind::kOthers>(args, stream);
}

}  // namespace

cudaError_t launch_quantize_permute(const QuantizePermuteArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) {
    return cudaSuccess;
  }
  if (is_nvfp4(args.format)) {
    return launch_nvfp4_permute(args, stream);
  }
  return args.type == HalfType::kBFloat16 ? launch_for<HalfType::kBFloat16>(args, stream)
                                          : launch_for<HalfType::kFloat16>(args, stream);
}

}  // namespace mxfp4_moe
