// MXFP8 of rows as they are: what FlashInfer's mxfp8_quantize gives its callers, in one launch.
//
// in   x [R, K] bf16, fp16 or fp32
// out  codes [R, Kp] E4M3 in plain k order, Kp = K padded; scales E8M0: [R, Kp/32]; or in tiles of 128 or 8 rows by
//      four blocks, [ceil(R/128)][ceil(Kp/128)][512] (shared/scale_layout.cuh) or [ceil(R/8)][ceil(Kp/128)][8][4]
// Padding is written too: zero codes past K, zero bytes for blocks past K and rows past R. A block of zeros keeps the
// signs of its zeros; all else is shared/mxfp8.cuh. Called by operators.cpp.
// Why it is fast: one launch, no host work, each byte once; each lane loads 16 or 32 bytes and stores 8, a quad finds
// amax with two shuffles, a half-warp writes one scale word. With many rows a lane has four loads in flight.
#include "moe/plain_rows.cuh"
#include "shared/mxfp8.cuh"

namespace mxfp4_moe {

__device__ __forceinline__ int64_t scale_words(const Mxfp8QuantizeArgs& args) { return scale_k_tiles(args.padded_k); }

namespace {

// One row's part of a lane: its codes and, from one lane of each block or K tile, scales. All 32 lanes call it.
__device__ __forceinline__ void quantize(const float (&x)[kValues], const Mxfp8QuantizeArgs& args, int64_t row,
                                         int k_tile, int column) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    amax = max(amax, magnitude(x[i]));
  }
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 1));
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 2));
  const uint32_t scale = mx_scale(amax);
  const int lane = threadIdx.x % kWordLanes;
  uint32_t word = scale << (8 * (lane / kLanes));
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  word |= __shfl_xor_sync(kAllLanes, word, 8);
  if (row >= args.rows) {
    return;
  }
  if (column < args.padded_k) {
    const float r = e8m0_reciprocal(scale);
    const bool is_poison = amax >= kFloatInfBits;
    const uint32_t low = encode4(x[0] * r, x[1] * r, x[2] * r, x[3] * r);
    const uint32_t high = encode4(x[4] * r, x[5] * r, x[6] * r, x[7] * r);
    *reinterpret_cast<uint2*>(args.codes + row * args.padded_k + column) =
        is_poison ? make_uint2(kPoisonCodes, kPoisonCodes) : make_uint2(low, high);
    if (args.layout == ScaleLayout::kLinear && lane % kLanes == 0) {
      args.scales[(row * args.padded_k + column) / kScaleBlock] = static_cast<uint8_t>(scale);
    }
  }
  if (args.layout != ScaleLayout::kLinear && lane == 0 && k_tile < scale_k_tiles(args.padded_k)) {
    store_word(args, row, k_tile, word);
  }
}

template <QuantizeInput kInput, int kRows>
__global__ void __launch_bounds__(kThreads) mxfp8_quantize_kernel(const Mxfp8QuantizeArgs args) {
  const int k_tile = blockIdx.x * kTiles + threadIdx.x / kWordLanes;
  const int column = k_tile * kWordLanes * kValues + threadIdx.x % kWordLanes * kValues;
  const int64_t stride = gridDim.y;
  wait_for_previous_kernel();
  let_next_kernel_start();
  store_padding(args);
  for (int64_t first = blockIdx.y; first < args.rows; first += kRows * stride) {
    Values<kInput> loaded[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first + i * stride;
      if (row < args.rows && column < args.k) {
        loaded[i].load(args.x, row * args.k + column);
      } else {
        loaded[i].clear();
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float x[kValues];
      loaded[i].widen_to(x);
      quantize(x, args, first + i * stride, k_tile, column);
    }
  }
}

template <QuantizeInput kInput, int kRows>
cudaError_t launch_rows(const Mxfp8QuantizeArgs& args, cudaStream_t stream) {
  const dim3 grid = grid_of_rows(args.rows, args.padded_k, kRows);
  return launch(mxfp8_quantize_kernel<kInput, kRows>, grid, kThreads, 0, stream, args);
}

template <QuantizeInput kInput>
cudaError_t launch_for(const Mxfp8QuantizeArgs& args, cudaStream_t stream) {
  return args.rows <= kFewRows ? launch_rows<kInput, 1>(args, stream) : launch_rows<kInput, kRowsAtOnce>(args, stream);
}

}  // namespace

cudaError_t launch_mxfp8_quantize(const Mxfp8QuantizeArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.padded_k == 0) {
    return cudaSuccess;
  }
  switch (args.input) {
    case QuantizeInput::kFloat32:
      return launch_for<QuantizeInput::kFloat32>(args, stream);
    case QuantizeInput::kBFloat16:
      return launch_for<QuantizeInput::kBFloat16>(args, stream);
    case QuantizeInput::kFloat16:
      return launch_for<QuantizeInput::kFloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxfp4_moe
