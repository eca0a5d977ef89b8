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

template <typename Logit, int kPerLane>
__global__ void __launch_bounds__(kThreads) topk_softmax_kernel(const TopkSoftmaxArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (token < args.tokens) {
    choose_experts<Logit, kPerLane, 1>(args, token, 0, threadIdx.x % kWarpSize);
  }
}

template <typename Logit>
cudaError_t launch_for(const TopkSoftmaxArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((int64_t{args.tokens} + kTokensPerBlock - 1) / kTokensPerBlock));
  const auto run = [&](auto kernel) { return launch(kernel, grid, kThreads, 0, stream, args); };
  if (args.experts <= 1 * kWarpSize) return run(topk_softmax_kernel<Logit, 1>);
  if (args.experts <= 2 * kWarpSize) return run(topk_softmax_kernel<Logit, 2>);
  if (args.experts <= 4 * kWarpSize) return run(topk_softmax_kernel<Logit, 4>);
  if (args.experts <= 8 * kWarpSize) return run(topk_softmax_kernel<Logit, 8>);
  if (args.experts <= 16 * kWarpSize) return run(topk_softmax_kernel<Logit, 16>);
  return run(topk_softmax_kernel<Logit, 32>);
}

}  // namespace

cudaError_t launch_topk_softmax(const TopkSoftmaxArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) {
    return cudaSuccess;
  }
  switch (args.type) {
    case LogitsType::kFloat32:
      return launch_for<float>(args, stream);
    case LogitsType::kBFloat16:
      return launch_for<__nv_bfloat16>(args, stream);
    case LogitsType::kFloat16:
      return launch_for<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxfp4_moe
