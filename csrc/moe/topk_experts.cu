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

template <ScoringFunc kScoring, int kPerLane, bool kGiven>
__global__ void __launch_bounds__(kThreads) topk_experts_kernel(const TopkExpertsArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (token < args.choice.tokens) {
    score_experts<kScoring, kPerLane, kGiven>(args, token, threadIdx.x % kWarpSize);
  }
}

template <ScoringFunc kScoring, bool kGiven>
cudaError_t launch_for(const TopkExpertsArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((int64_t{args.choice.tokens} + kTokensPerBlock - 1) / kTokensPerBlock));
  const auto run = [&](auto kernel) { return launch(kernel, grid, kThreads, 0, stream, args); };
  if (args.choice.experts <= 4 * kWarpSize) return run(topk_experts_kernel<kScoring, 4, kGiven>);
  if (args.choice.experts <= 8 * kWarpSize) return run(topk_experts_kernel<kScoring, 8, kGiven>);
  if (args.choice.experts <= 16 * kWarpSize) return run(topk_experts_kernel<kScoring, 16, kGiven>);
  return run(topk_experts_kernel<kScoring, 32, kGiven>);
}

template <ScoringFunc kScoring>
cudaError_t launch_for(const TopkExpertsArgs& args, cudaStream_t stream) {
  return args.given_ids != nullptr ? launch_for<kScoring, true>(args, stream)
                                   : launch_for<kScoring, false>(args, stream);
}

}  // namespace

cudaError_t launch_topk_experts(const TopkExpertsArgs& args, cudaStream_t stream) {
  if (is_topk_softmax(args)) {
    return launch_topk_softmax(args.choice, stream);
  }
  if (args.choice.tokens == 0) {
    return cudaSuccess;
  }
  switch (args.scoring_func) {
    case ScoringFunc::kSoftmax:
      return launch_for<ScoringFunc::kSoftmax>(args, stream);
    case ScoringFunc::kSigmoid:
      return launch_for<ScoringFunc::kSigmoid>(args, stream);
    case ScoringFunc::kSqrtSoftplus:
      return launch_for<ScoringFunc::kSqrtSoftplus>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxfp4_moe
