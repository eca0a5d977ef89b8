// Router: from logits to the k best experts of each token and their weights.
//
// in   logits [T, E] fp32, bf16 or fp16
// out  topk_ids [T, k] int32, best first; topk_weights [T, k] fp32: exp(x - max) / sum over the chosen k (renormalize)
//      or over all E
// Equal logits (-0 equals +0): the lower expert first. A NaN counts as the largest logit and makes the token's weights
// NaN, as does a +inf or a row of nothing but -inf: torch's softmax. Called by operators.cpp.
// Why it is fast: one warp per token (choose_experts.cuh).
#include "moe/choose_experts.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTokensPerBlock = kThreads / kWarpSize;

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) topk_softmax_kernel(const TopkSoftmaxArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (token < args.tokens) {
    choose_experts<kPerLane, 1>(args, token, 0, threadIdx.x % kWarpSize);
  }
}

}  // namespace

cudaError_t launch_topk_softmax(const TopkSoftmaxArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) {
    return cudaSuccess;
  }
  const dim3 grid(static_cast<unsigned>((int64_t{args.tokens} + kTokensPerBlock - 1) / kTokensPerBlock));
  return with_width<1, 2, 4, 8, 16, 32>(
      args.experts, [&](auto width) { return launch(topk_softmax_kernel<width()>, grid, kThreads, 0, stream, args); });
}

}  // namespace mxfp4_moe
