// MXFP4 and NVFP4 of rows as they are: what FlashInfer's mxfp4_quantize, nvfp4_quantize and fp4_quantize give their
// callers, in one launch.
//
// in   x [R, K] bf16 or fp16; of NVFP4 the global scale, one fp32 in device memory
// out  packed codes [R, K/2] E2M1, low nibble = even k; scales, E8M0 of 32 values or E4M3 of 16, B to a row: [R, B]; or
//      in tiles of 128 or 8 rows by four blocks, [ceil(R/128)][ceil(B/4)][512] or [ceil(R/8)][ceil(B/4)][8][4]
// Padding is written too: zero bytes for blocks past K and rows past R. The arithmetic is shared/fp4.cuh. Nobody has
// looked at the global scale: if it is not finite and above 0, all scales are NaN. Called by operators.cpp.
// Why it is fast: as mxfp8_quantize.cu.
#include "moe/plain_rows.cuh"
#include "shared/fp4.cuh"

namespace mxfp4_moe {

// A global scale makes it NVFP4.
__device__ __forceinline__ int64_t scale_words(const Fp4QuantizeArgs& args) {
  return args.global_scale != nullptr ? (args.k / 16 + 3) / 4 : scale_k_tiles(args.k);
}

namespace {

template <bool kNvfp4>
struct Blocks {
  static constexpr int kValuesOf = kNvfp4 ? 16 : kScaleBlock;
  static constexpr int kLanesOf = kValuesOf / kValues;
  static constexpr int kLanesOfWord = 4 * kLanesOf;
};

// One row's part of a lane: its codes and, from one lane of each block or word, scales. All 32 lanes call it.
template <bool kNvfp4>
__device__ __forceinline__ void quantize(const float (&x)[kValues], const Fp4QuantizeArgs& args, float global,
                                         float inverse, int64_t row, int column) {
  using Of = Blocks<kNvfp4>;
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    amax = max(amax, magnitude(x[i]));
  }
#pragma unroll
  for (int stride = 1; stride < Of::kLanesOf; stride *= 2) {
    amax = max(amax, __shfl_xor_sync(kAllLanes, amax, stride));
  }
  const uint32_t scale = kNvfp4 ? nvfp4_scale(amax, global) : mxfp4_scale(amax);
  const int lane = threadIdx.x % kWordLanes;
  uint32_t word = scale << (8 * (lane % Of::kLanesOfWord / Of::kLanesOf));
#pragma unroll
  for (int stride = Of::kLanesOf; stride < Of::kLanesOfWord; stride *= 2) {
    word |= __shfl_xor_sync(kAllLanes, word, stride);
  }
  if (row >= args.rows) {
    return;
  }
  const int blocks = args.k / Of::kValuesOf;
  if (column < args.k) {
    const float multiplier = kNvfp4 ? nvfp4_multiplier(amax, scale, inverse) : mxfp4_multiplier(scale);
    *reinterpret_cast<uint32_t*>(args.codes + (row * args.k + column) / 2) = fp4_codes(amax, multiplier, x);
    if (args.layout == ScaleLayout::kLinear && lane % Of::kLanesOf == 0) {
      args.scales[row * blocks + column / Of::kValuesOf] = static_cast<uint8_t>(scale);
    }
  }
  const int number = column / (4 * Of::kValuesOf);
  if (args.layout != ScaleLayout::kLinear && lane % Of::kLanesOfWord == 0 && number < scale_words(args)) {
    store_word(args, row, number, word);
  }
}

template <QuantizeInput kInput, bool kNvfp4, int kRows>
__global__ void __launch_bounds__(kThreads) fp4_quantize_kernel(const Fp4QuantizeArgs args) {
  const int k_tile = blockIdx.x * kTiles + threadIdx.x / kWordLanes;
  const int column = k_tile * kWordLanes * kValues + threadIdx.x % kWordLanes * kValues;
  const int64_t stride = gridDim.y;
  wait_for_previous_kernel();
  let_next_kernel_start();
  store_padding(args);
  float global = 1.0f;
  if constexpr (kNvfp4) {
    const float given = __ldcg(args.global_scale);
    global = given > 0.0f && magnitude(given) < kFloatInfBits ? given : __uint_as_float(0x7fc00000u);
  }
  const float inverse = __frcp_rn(global);
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
      quantize<kNvfp4>(x, args, global, inverse, first + i * stride, column);
    }
  }
}

template <QuantizeInput kInput, bool kNvfp4>
cudaError_t launch_rows(const Fp4QuantizeArgs& args, cudaStream_t stream) {
  return args.rows <= kFewRows ? launch(fp4_quantize_kernel<kInput, kNvfp4, 1>, grid_of_rows(args.rows, args.k, 1),
                                        kThreads, 0, stream, args)
                               : launch(fp4_quantize_kernel<kInput, kNvfp4, kRowsAtOnce>,
                                        grid_of_rows(args.rows, args.k, kRowsAtOnce), kThreads, 0, stream, args);
}

template <QuantizeInput kInput>
cudaError_t launch_for(const Fp4QuantizeArgs& args, cudaStream_t stream) {
  return args.global_scale != nullptr ? launch_rows<kInput, true>(args, stream)
                                      : launch_rows<kInput, false>(args, stream);
}

}  // namespace

cudaError_t launch_fp4_quantize(const Fp4QuantizeArgs& args, cudaStream_t stream) {
  if (args.rows == 0) {
    return cudaSuccess;
  }
  return args.type == HalfType::kBFloat16 ? launch_for<QuantizeInput::kBFloat16>(args, stream)
                                          : launch_for<QuantizeInput::kFloat16>(args, stream);
}

}  // namespace mxfp4_moe
