// Bias, activation and the rows that GEMM2 reads: what lies between the two GEMMs.
//
// in   gemm1 fp32; gated: [R, 2I], columns in groups of 16, 8 gates, then the 8 ups of the same outputs; not gated:
//      [R, I]; bias likewise [E, 2I] or [E, I]
// out  codes [R, I] E4M3, each block of 32 stored even k first; scales [ceil(I/128), R padded to 4, 4] E8M0
//      or bf16 or fp16 [R, I] (shared/bf16_rows.cuh). FP4: fp4_activation.cu
// g += bias, u += bias (not gated: x += bias), then the activation (shared/nonlinearities.cuh). Where `rounding` says
// so, it rounds what it reads from gemm1, and what it quantizes, to bf16 or fp16 (RNE; beyond fp16's range to
// infinity): so do pipelines that keep these values in the output dtype. alpha, beta and limit are one number, or one
// per expert.
// Called by layer.cpp after GEMM1, for the activations and tiles that GEMM1's own epilogue does not take. Rows past the
// valid count are not touched.
// Why it is fast: neighbouring lanes share two groups of outputs, so that every load of a warp takes whole 32-byte
// sectors, and exchange four results; a block keeps the biases of its columns while the rows' expert is the same; with
// many rows L1 is as large as it can be; and the result never leaves registers before it is what GEMM2 reads.
#include "moe/activation.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;
// With many rows, a block has several one behind the other, mostly of one expert.
constexpr int kManyRows = 4096, kRowsOfBlock = 8;

// Blocks that an SM has room for, at least: loads in flight are what hides the way to memory.
constexpr int blocks_of_sm(Activation activation) {
  switch (activation) {
    case Activation::kSwigluOai:
    case Activation::kGeglu:
    case Activation::kSitu:
      return 7;
    default:
      return is_gated(activation) ? 8 : 10;
  }
}

// kFp16: a kernel of its own, so that the others' is what it is without.
template <Activation kActivation, bool kFp16>
__global__ void __launch_bounds__(kThreads, blocks_of_sm(kActivation))
    activation_kernel(const ActivationArgs args, int rows_of_block) {
  const int k_tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane;
  const RowsOut to = {args.format, args.out, args.scales, args.rows, args.intermediate};
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int valid_rows = __ldcg(args.valid_rows);

  LaneOutputs<kActivation> outputs;
  for (int64_t begin = int64_t{blockIdx.y} * rows_of_block; begin < valid_rows; begin += gridDim.y * rows_of_block) {
    const int64_t end = min(begin + rows_of_block, int64_t{valid_rows});
    for (int64_t row = begin; row < end; ++row) {
      float x[kValuesPerLane];
      outputs(args, row, column, x);
      if constexpr (kFp16) {
        store_k_tile(make_fp16_tile(x), row, k_tile, to);
      } else {
        store_k_tile(make_k_tile(x, args.format), row, k_tile, to);
      }
    }
  }
}

using Kernel = void (*)(ActivationArgs, int);

}  // namespace

cudaError_t launch_activation(const ActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0) {
    return cudaSuccess;
  }
  if (is_mxfp4(args.format) || is_nvfp4(args.format)) {
    return launch_fp4_activation(args, stream);
  }
  const Kernel kernel = kernel_of<Kernel>(args.activation, nullptr, [&](auto activation) -> Kernel {
    constexpr Activation kActivation = decltype(activation)::value;
    return args.format == RowFormat::kFp16 ? activation_kernel<kActivation, true>
                                           : activation_kernel<kActivation, false>;
  });
  if (kernel == nullptr) {
    return cudaErrorInvalidValue;
  }
  const int k_tiles = static_cast<int>(scale_k_tiles(args.intermediate));
  const int rows_of_block = args.rows < kManyRows ? 1 : kRowsOfBlock;
  const int blocks = (args.rows + rows_of_block - 1) / rows_of_block;
  const dim3 grid((k_tiles + kTilesPerBlock - 1) / kTilesPerBlock, blocks < kMaxGridY ? blocks : kMaxGridY);
  LaunchOptions options;
  if (args.rows >= kManyRows) {
    options.carveout = cudaSharedmemCarveoutMaxL1;
  }
  return launch_with(options, kernel, grid, kThreads, stream, args, rows_of_block);
}

}  // namespace mxfp4_moe
