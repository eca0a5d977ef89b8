// Bias, activation and FP4: what activation.cu does, for GEMM2s that read MXFP4 or NVFP4 rows, as they are or in bf16.
//
// in   as activation.cu, and of NVFP4 the global scales of all experts, or none
// out  packed codes [R, I / 2] E2M1, plain k order; scales: of MXFP4 [ceil(I/128), R padded to 4, 4] E8M0, of NVFP4
//      [2 ceil(I/128), R padded to 4, 4] E4M3; or bf16 [R, I], both multiplied (shared/folded_fp4.cuh); of NVFP4
//      without global scales row_factors [R] fp32
// Without global scales a row is quantized under 2688 / amax of the whole row, so its activation is computed twice from
// GEMM1's sums: once for amax, then (the sums come from L2) for the codes. Nothing is kept between, so that rows may
// have any length. Rows past the valid count are not touched.
// Called by activation.cu's launch. One block has a row.
#include "moe/activation.cuh"
#include "moe/nvfp4_rows.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;

template <Activation kActivation>
__global__ void __launch_bounds__(kThreads) fp4_activation_kernel(const ActivationArgs args) {
  __shared__ uint32_t of_warps[kThreads / kWarpSize];
  const GlobalScales& given = args.global_scales;
  const bool nvfp4 = is_nvfp4(args.format), of_experts = nvfp4 && given.of_experts != nullptr;
  const RowsOut to = {args.format, args.out, args.scales, args.rows, args.intermediate};
  const int k_tiles = static_cast<int>(scale_k_tiles(args.intermediate));
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int valid_rows = __ldcg(args.valid_rows);

  for (int64_t row = blockIdx.x; row < valid_rows; row += gridDim.x) {
    LaneOutputs<kActivation> outputs;
    GlobalScale global = {};
    if (of_experts) {
      global = with_inverse(__ldg(given.of_experts + __ldcg(given.row_expert + row)));
    }
    uint32_t row_amax = 0;
#pragma unroll 1
    for (int pass = nvfp4 && !of_experts ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
      for (int first = 0; first < k_tiles; first += kTilesPerBlock) {
        const int k_tile = first + threadIdx.x / kLanesPerWord;
        float x[kValuesPerLane];
        outputs.expert_of_bias = -1;  // another column's
        outputs(args, row, k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane, x);
        if (pass == 0) {
          row_amax = max(row_amax, lane_amax(x));
        } else if (!nvfp4) {
          store_mxfp4_tile(make_mxfp4_tile(x, args.format), row, k_tile, to);
        } else {
          store_nvfp4_tile(make_nvfp4_tile(x, pair_amax(x), global, args.format), row, k_tile, to);
        }
      }
      if (pass == 0) {
        global = with_inverse(nvfp4_row_scale(block_max<kThreads>(row_amax, of_warps)));
        if (threadIdx.x == 0) {
          given.row_factors[row] = global.inverse;
        }
      }
    }
  }
}

using Kernel = void (*)(ActivationArgs);

}  // namespace

cudaError_t launch_fp4_activation(const ActivationArgs& args, cudaStream_t stream) {
  const Kernel kernel = kernel_of<Kernel>(args.activation, nullptr, [](auto activation) -> Kernel {
    return fp4_activation_kernel<decltype(activation)::value>;
  });
  return kernel == nullptr ? cudaErrorInvalidValue : launch(kernel, dim3(args.rows), kThreads, 0, stream, args);
}

}  // namespace mxfp4_moe
