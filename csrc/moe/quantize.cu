// Quantize-permute: hidden_states to MXFP8 rows in expert order.
//
// in   hidden [T, H] bf16 or fp16; row_slot [R]: the slot t * k + j that each sorted row came from
// out  codes [R, H] E4M3, each block of 32 stored even k first; scales [ceil(H/128), R padded to 4, 4] E8M0
// Called by ops.cpp between route and GEMM1. A token is quantized once per expert that it goes to, which costs writes
// that GEMM1 needs anyway; its reads after the first come from L2. Rows past the valid count are not touched.
// Why it is fast: each lane does one 16-byte load and two 4-byte stores that fill whole 32-byte sectors with its
// neighbours, a quad finds amax with two shuffles, and a half-warp writes one scale word.
#include "half8.cuh"
#include "quantize_mx.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;

template <HalfType kType>
__global__ void __launch_bounds__(kThreads) quantize_permute_kernel(const QuantizePermuteArgs args) {
  const int k_tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane;
  const auto* hidden = static_cast<const typename Half8<kType>::Element*>(args.hidden);
  const int valid_rows = *args.valid_rows;

  for (int64_t row = blockIdx.y; row < valid_rows; row += gridDim.y) {
    float x[kValuesPerLane] = {};
    if (column < args.hidden_size) {
      const int64_t token = args.row_slot[row] / args.top_k;
      widen8<kType>(__ldg(reinterpret_cast<const uint4*>(hidden + token * args.hidden_size + column)), x);
    }
    store_k_tile(quantize_quad(x), row, k_tile, args.hidden_size, args.rows, args.codes, args.scales);
  }
}

}  // namespace

cudaError_t launch_quantize_permute(const QuantizePermuteArgs& args, cudaStream_t stream) {
  if (args.rows == 0) {
    return cudaSuccess;
  }
  const int k_tiles = static_cast<int>(scale_k_tiles(args.hidden_size));
  const dim3 grid((k_tiles + kTilesPerBlock - 1) / kTilesPerBlock, args.rows < kMaxGridY ? args.rows : kMaxGridY);
  return args.type == HalfType::kBFloat16
             ? launch(quantize_permute_kernel<HalfType::kBFloat16>, grid, kThreads, 0, stream, args)
             : launch(quantize_permute_kernel<HalfType::kFloat16>, grid, kThreads, 0, stream, args);
}

}  // namespace mxfp4_moe
