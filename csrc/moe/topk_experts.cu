// Any router: from logits to the k best experts of each token and their weights.
//
// in   logits [T, E] fp32, bf16 or fp16; e_score_correction_bias [E] fp32 or none; or, for their weights alone, ids
// out  topk_ids [T, k] int32, best first; topk_weights [T, k] fp32
// In fp32, each operation rounded on its own, in this order, here and in reference/routers.py, with the same bits:
//   score    sigmoid(x), sqrt(softplus(x)), or softmax over all E (scores.cuh)
//   choice   score + bias; with neither bias nor groups the logit itself, with which every score rises
//   groups   E / num_expert_group experts in a row; a group's score is the sum of its two highest choices, or the
//            highest; topk_group groups are kept, and only their experts can be chosen
//   weight   score, without the bias; if renormalized over (the sum of the k in order + 1e-20); times the scaling
//            factor
// Equal choices, or groups (-0 equals +0): the lower number first. A NaN counts as the largest, so an expert with one,
// or its group, is chosen; its own weight is NaN, renormalized all of its token's. -inf as bias takes an expert out,
// +inf puts it first, and neither reaches a weight. Called by operators.cpp. topk_softmax.cu has the rule of gpt-oss.
// Why it is fast: one warp per token (score_experts.cuh).
#include "moe/score_experts.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTokensPerBlock = kThreads / kWarpSize;

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) topk_experts_kernel(const TopkExpertsArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (token < args.choice.tokens) {
    score_experts<kPerLane>(args, token, threadIdx.x % kWarpSize);
  }
}

}  // namespace

cudaError_t launch_topk_experts(const TopkExpertsArgs& args, cudaStream_t stream) {
  if (is_topk_softmax(args)) {
    return launch_topk_softmax(args.choice, stream);
  }
  if (args.choice.tokens == 0) {
    return cudaSuccess;
  }
  const dim3 grid(static_cast<unsigned>((int64_t{args.choice.tokens} + kTokensPerBlock - 1) / kTokensPerBlock));
  return with_width<4, 8, 16, 32>(args.choice.experts, [&](auto width) {
    return launch(topk_experts_kernel<width()>, grid, kThreads, 0, stream, args);
  });
}

}  // namespace mxfp4_moe
