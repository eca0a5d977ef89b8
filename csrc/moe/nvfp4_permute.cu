// Quantize-permute to NVFP4: hidden_states to the rows that GEMM1 reads, in expert order.
//
// in   hidden [T, H] bf16 or fp16; slot_row [T * k]: the sorted row of each slot t * k + j, or -1; and the global
//      scales of all experts, or none
// out  packed codes [R, H / 2] E2M1, plain k order; scales [2 ceil(H/128), R padded to 4, 4] E4M3; or bf16 [R, H], both
//      multiplied (shared/folded_fp4.cuh); where no global scales are given, row_factors [R] fp32
// Under its expert's global scale each of a token's rows has other codes. Without one all have the same, under 2688 /
// amax of the whole token, whose reciprocal is the rows' factor. Rows past the valid count are not touched.
// Called by quantize_permute.cu's launch. One block has a token: it reads it once for amax, while route still runs, and
// once more (from L2) for each four of its rows.
#include "moe/halves.cuh"
#include "moe/nvfp4_rows.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 256;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;
constexpr int kChoicesAtOnce = 4;

template <HalfType kType>
__device__ __forceinline__ void load_lane(const QuantizePermuteArgs& args, int64_t token, int column,
                                          float (&x)[kValuesPerLane]) {
  const auto* hidden = static_cast<const typename Half<kType>::Element*>(args.hidden);
  const uint4 packed = column < args.hidden_size
                           ? __ldcg(reinterpret_cast<const uint4*>(hidden + token * args.hidden_size + column))
                           : make_uint4(0, 0, 0, 0);
  widen<kType>(packed, x);
}

template <HalfType kType>
__global__ void __launch_bounds__(kThreads) nvfp4_permute_kernel(const QuantizePermuteArgs args) {
  __shared__ uint32_t of_warps[kThreads / kWarpSize];
  const GlobalScales& given = args.global_scales;
  const bool of_experts = given.of_experts != nullptr;
  const int64_t token = blockIdx.x;
  if (!args.hidden_is_ready) {
    wait_for_previous_kernel();
  }
  GlobalScale of_token = {};
  if (!of_experts) {
    uint32_t amax = 0;
#pragma unroll 4
    for (int column = threadIdx.x * kValuesPerLane; column < args.hidden_size; column += kThreads * kValuesPerLane) {
      float x[kValuesPerLane];
      load_lane<kType>(args, token, column, x);
      amax = max(amax, lane_amax(x));
    }
    of_token = with_inverse(nvfp4_row_scale(block_max<kThreads>(amax, of_warps)));
  }
  wait_for_previous_kernel();
  let_next_kernel_start();

  const RowsOut to = {args.format, args.rows, args.scales, int64_t{args.tokens} * args.top_k, args.hidden_size};
  const int k_tiles = static_cast<int>(scale_k_tiles(args.hidden_size));
  for (int j0 = 0; j0 < args.top_k; j0 += kChoicesAtOnce) {
    int rows[kChoicesAtOnce];
    GlobalScale of_rows[kChoicesAtOnce];
#pragma unroll
    for (int j = 0; j < kChoicesAtOnce; ++j) {
      rows[j] = j0 + j < args.top_k ? __ldcg(args.slot_row + token * args.top_k + j0 + j) : -1;
    }
#pragma unroll
    for (int j = 0; j < kChoicesAtOnce; ++j) {
      of_rows[j] = of_token;
      if (of_experts && rows[j] >= 0) {
        of_rows[j] = with_inverse(__ldg(given.of_experts + __ldcg(given.row_expert + rows[j])));
      }
      if (!of_experts && rows[j] >= 0 && threadIdx.x == 0) {
        given.row_factors[rows[j]] = of_token.inverse;
      }
    }
    for (int first = 0; first < k_tiles; first += kTilesPerBlock) {
      const int k_tile = first + threadIdx.x / kLanesPerWord;
      float x[kValuesPerLane];
      load_lane<kType>(args, token,
                       k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane, x);
      const uint32_t amax = pair_amax(x);
      Nvfp4Tile tile = {};
#pragma unroll
      for (int j = 0; j < kChoicesAtOnce; ++j) {
        if (j == 0 || of_experts) {
          tile = make_nvfp4_tile(x, amax, of_rows[j], args.format);
        }
        if (rows[j] >= 0) {  // the same for the whole block
          store_nvfp4_tile(tile, rows[j], k_tile, to);
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_nvfp4_permute(const QuantizePermuteArgs& args, cudaStream_t stream) {
  const auto kernel = args.type == HalfType::kBFloat16 ? nvfp4_permute_kernel<HalfType::kBFloat16>
                                                       : nvfp4_permute_kernel<HalfType::kFloat16>;
  return launch_before_gemm(kernel, dim3(args.tokens), kThreads, stream, args);
}

}  // namespace mxfp4_moe
