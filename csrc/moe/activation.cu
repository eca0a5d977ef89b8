// Bias, activation and the rows that GEMM2 reads: what lies between the two GEMMs.
//
// in   gemm1 fp32; gated: [R, 2I], columns in groups of 16, 8 gates, then the 8 ups of the same outputs; not gated:
//      [R, I]; bias likewise [E, 2I] or [E, I]
// out  codes [R, I] E4M3, each block of 32 stored even k first; scales [ceil(I/128), R padded to 4, 4] E8M0
//      or bf16 [R, I] (shared/bf16_rows.cuh)
// g += bias, u += bias (not gated: x += bias), then the activation (shared/nonlinearities.cuh). Where `rounding` says
// so, it rounds what it reads from gemm1, and what it quantizes, to bf16 or fp16 (RNE; beyond fp16's range to
// infinity): so do pipelines that keep these values in the output dtype. alpha, beta and limit are one number, or one
// per expert.
// Called by layer.cpp after GEMM1, for the activations and tiles that GEMM1's own epilogue does not take. Rows past the
// valid count are not touched.
// Why it is fast: neighbouring lanes share two groups of outputs, so that every load of a warp takes whole 32-byte
// sectors, and exchange four results; a block keeps the biases of its columns while the rows' expert is the same; with
// many rows L1 is as large as it can be; and the result never leaves registers before it is what GEMM2 reads.
#include "moe/mx_rows.cuh"
#include "shared/nonlinearities.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;
// With many rows, a block has several one behind the other, mostly of one expert.
constexpr int kManyRows = 4096, kRowsOfBlock = 8;

constexpr int kHalfGroup = kValuesPerLane / 2;  // a lane's outputs of a group of 8: its neighbour has the other four

// What a lane reads of two groups: four gates and four ups each, or four values.
template <bool kGated>
struct TwoGroups {
  static constexpr int kVectors = kGated ? 2 : 1;
  float x[2][kVectors][kHalfGroup];

  // `row` begins at the first group's column of what GEMM1 wrote, or of the biases.
  __device__ __forceinline__ void load(const float* row) {
    const int half = threadIdx.x % 2 * kHalfGroup;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float* at = row + (group * kVectors + v) * kValuesPerLane + half;
        const float4 four = __ldcg(reinterpret_cast<const float4*>(at));
        x[group][v][0] = four.x;
        x[group][v][1] = four.y;
        x[group][v][2] = four.z;
        x[group][v][3] = four.w;
      }
    }
  }

  template <typename Change>
  __device__ __forceinline__ void for_each(const Change& change) {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kHalfGroup; ++i) {
          change(x[group][v][i], group, v, i);
        }
      }
    }
  }
};

// From four outputs of each of two groups to eight of one: the even lane's is the first. All 32 lanes call it.
__device__ __forceinline__ void exchange(const float (&y)[2][kHalfGroup], float (&x)[kValuesPerLane]) {
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int i = 0; i < kHalfGroup; ++i) {
    const float mine = odd ? y[1][i] : y[0][i];
    const float other = __shfl_xor_sync(kAllLanes, odd ? y[0][i] : y[1][i], 1);
    x[i] = odd ? other : mine;
    x[i + kHalfGroup] = odd ? mine : other;
  }
}

// Rounds, if `rounding` says so, all values that for_each(change) changes. One branch for all of them, which all lanes
// take alike, is what those who do not round pay.
template <typename ForEach>
__device__ __forceinline__ void round_each(Rounding rounding, const ForEach& for_each) {
  if (rounding == Rounding::kBFloat16) {
    for_each([](float& x) { x = round_to(Rounding::kBFloat16, x); });
  } else if (rounding == Rounding::kFloat16) {
    for_each([](float& x) { x = round_to(Rounding::kFloat16, x); });
  }
}

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

template <Activation kActivation>
__global__ void __launch_bounds__(kThreads, blocks_of_sm(kActivation))
    activation_kernel(const ActivationArgs args, int rows_of_block) {
  constexpr bool kGated = is_gated(kActivation);
  using Groups = TwoGroups<kGated>;
  const int k_tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane;
  const int64_t width = int64_t{args.intermediate} * (kGated ? 2 : 1);
  const int first_column = (column - threadIdx.x % 2 * kValuesPerLane) * (kGated ? 2 : 1);  // of the two lanes' groups
  const RowsOut to = {args.format, args.out, args.scales, args.rows, args.intermediate};
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int valid_rows = __ldcg(args.valid_rows);

  Groups bias = {};
  int expert_of_bias = -1;
  for (int64_t begin = int64_t{blockIdx.y} * rows_of_block; begin < valid_rows; begin += gridDim.y * rows_of_block) {
    const int64_t end = min(begin + rows_of_block, int64_t{valid_rows});
    for (int64_t row = begin; row < end; ++row) {
      float y[2][kHalfGroup] = {};
      if (column < args.intermediate) {
        Groups sums;
        sums.load(args.gemm1 + row * width + first_column);
        const int expert = __ldcg(args.row_expert + row);
        if (args.bias != nullptr && expert != expert_of_bias) {
          bias.load(args.bias + expert * width + first_column);
          expert_of_bias = expert;
        }
        round_each(args.rounding,
                   [&](const auto& change) { sums.for_each([&](float& x, int, int, int) { change(x); }); });
        if (args.bias != nullptr) {
          sums.for_each([&](float& x, int group, int v, int i) { x += bias.x[group][v][i]; });
        }
        Numbers numbers = {};
        if constexpr (has_numbers(kActivation)) {
          numbers = {of_expert(args.alpha, expert), of_expert(args.beta, expert), of_expert(args.limit, expert)};
        }
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
          for (int i = 0; i < kHalfGroup; ++i) {
            if constexpr (kGated) {
              y[group][i] = apply<kActivation>(sums.x[group][0][i], sums.x[group][1][i], numbers);
            } else {
              y[group][i] = apply<kActivation>(sums.x[group][0][i], numbers);
            }
          }
        }
        round_each(args.rounding, [&](const auto& change) {
#pragma unroll
          for (int i = 0; i < kValuesPerLane; ++i) {
            change(y[i / kHalfGroup][i % kHalfGroup]);
          }
        });
      }
      float x[kValuesPerLane];
      exchange(y, x);
      store_k_tile(make_k_tile(x, args.format), row, k_tile, to);
    }
  }
}

using Kernel = void (*)(ActivationArgs, int);

Kernel kernel_of(Activation activation) {
  switch (activation) {
    case Activation::kSwiglu:
      return activation_kernel<Activation::kSwiglu>;
    case Activation::kSwigluOai:
      return activation_kernel<Activation::kSwigluOai>;
    case Activation::kSwigluStep:
      return activation_kernel<Activation::kSwigluStep>;
    case Activation::kGeglu:
      return activation_kernel<Activation::kGeglu>;
    case Activation::kGegluTanh:
      return activation_kernel<Activation::kGegluTanh>;
    case Activation::kSitu:
      return activation_kernel<Activation::kSitu>;
    case Activation::kSilu:
      return activation_kernel<Activation::kSilu>;
    case Activation::kGelu:
      return activation_kernel<Activation::kGelu>;
    case Activation::kGeluTanh:
      return activation_kernel<Activation::kGeluTanh>;
    case Activation::kRelu:
      return activation_kernel<Activation::kRelu>;
    case Activation::kRelu2:
      return activation_kernel<Activation::kRelu2>;
    case Activation::kClampedRelu2:
      return activation_kernel<Activation::kClampedRelu2>;
    case Activation::kIdentity:
      return activation_kernel<Activation::kIdentity>;
  }
  return nullptr;
}

}  // namespace

cudaError_t launch_activation(const ActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0) {
    return cudaSuccess;
  }
  const Kernel kernel = kernel_of(args.activation);
  if (kernel == nullptr) {
    return cudaErrorInvalidValue;
  }
  const int k_tiles = static_cast<int>(scale_k_tiles(args.intermediate));
  const int rows_of_block = args.rows < kManyRows ? 1 : kRowsOfBlock;
  const int blocks = (args.rows + rows_of_block - 1) / rows_of_block;
  const dim3 grid((k_tiles + kTilesPerBlock - 1) / kTilesPerBlock, blocks < kMaxGridY ? blocks : kMaxGridY);
  LaunchOptions options;
  options.most_l1 = args.rows >= kManyRows;
  return launch_with(options, kernel, grid, kThreads, stream, args, rows_of_block);
}

}  // namespace mxfp4_moe
