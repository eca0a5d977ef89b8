// What the operators check before anything is launched, each saying argument, expected and actual; and how they
// allocate. Letters as in kernels.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <optional>

#include "moe/kernels.h"
#include "shared/scale_layout.cuh"
#include "torch_args.h"

namespace mxfp4_moe {

// ---- tensors ------------------------------------------------------------------------------------------------------

// torch::stable::empty finds its operator by name and boxes the list of sizes at each call, which takes four times as
// long as torch's C function for the same.
template <size_t kDims>
inline Tensor empty(const int64_t (&shape)[kDims], ScalarType type, int32_t device) {
  int64_t strides[kDims];
  int64_t stride = 1;
  for (size_t d = kDims; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  AtenTensorHandle tensor = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(
      kDims, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cuda(), device, &tensor);
  STD_TORCH_CHECK(error == 0, "torch could not allocate ",
                  describe(type_name(type), std::initializer_list<int64_t>{stride}), " on cuda:", device);
  return Tensor(tensor);
}

// tensor.data_ptr() with a type; const goes with T.
template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// ---- checks -------------------------------------------------------------------------------------------------------

inline bool check_ids(const Tensor& ids, int32_t device) {
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Int || type == ScalarType::Long) && ids.dim() == 2,
                  "topk_ids: expected int32 or int64 [tokens, top_k], got ", describe(ids));
  check_placed("topk_ids", ids, device, kElementAlignment);
  return type == ScalarType::Long;
}

inline HalfType check_half(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::BFloat16 || type == ScalarType::Half) && tensor.dim() == 2, name,
                  ": expected bfloat16 or float16 with 2 dimensions, got ", describe(tensor));
  return type == ScalarType::BFloat16 ? HalfType::kBFloat16 : HalfType::kFloat16;
}

inline int32_t check_multiple_of_32(const char* name, int64_t value) {
  STD_TORCH_CHECK(value > 0 && value % kScaleBlock == 0 && value <= INT_MAX / 2, name,
                  ": expected a positive multiple of ", kScaleBlock, ", got ", value);
  return static_cast<int32_t>(value);
}

inline int32_t check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(value >= low && value <= high, name, ": expected ", low, " to ", high, ", got ", value);
  return static_cast<int32_t>(value);
}

// Row numbers are int32; with room for the largest tile past the last row, and for padding to a multiple of 4.
constexpr int64_t kMaxTileM = 1024;
constexpr int64_t kMaxSlots = INT_MAX - kMaxTileM;

inline Activation check_activation(int64_t activation) {
  return static_cast<Activation>(check_range("activation", activation, 0, kNumActivations - 1));
}

inline ActivationFormat check_activation_format(int64_t format) {
  return static_cast<ActivationFormat>(check_range("activation_format", format, 0, kNumActivationFormats - 1));
}

inline const char* name_of(ActivationFormat format) {
  constexpr const char* kNames[kNumActivationFormats] = {"mxfp8", "bf16", "mxfp4", "nvfp4", "fp16"};
  return kNames[static_cast<int>(format)];
}

inline int32_t check_weight_format(int64_t format) {
  return check_range("weight_format", format, MXFP4_MOE_WEIGHT_MXFP4, MXFP4_MOE_WEIGHT_NVFP4);
}

// The float32 scales of NVFP4 weights, or of their inputs: given where they are wanted, and nowhere else.
inline const float* check_scales(const char* name, const std::optional<Tensor>& scales, bool wanted,
                                 std::initializer_list<int64_t> shape, int32_t device,
                                 int64_t alignment = kElementAlignment) {
  STD_TORCH_CHECK(scales.has_value() == wanted, name, ": expected ", wanted ? "a tensor" : "none",
                  " with these formats of weights and activations, got ", wanted ? "none" : "one");
  if (!wanted) {
    return nullptr;
  }
  check_tensor(name, *scales, ScalarType::Float, shape, device, alignment);
  return data<const float>(*scales);
}

// A number of the activation; float32 [experts] where every expert has its own.
inline PerExpert check_number(const char* name, double value, const std::optional<Tensor>& values, int64_t experts,
                              int32_t device) {
  PerExpert number = {static_cast<float>(value), nullptr};
  if (values.has_value()) {
    check_tensor(name, *values, ScalarType::Float, {experts}, device, kElementAlignment);
    number.values = static_cast<const float*>(values->data_ptr());
  }
  return number;
}

// hidden_states that are MXFP8: uint8 [tokens, hidden], and the scales that belong to them.
inline void check_mxfp8(const Tensor& hidden_states, const Tensor& scale, bool swizzled, int32_t device) {
  STD_TORCH_CHECK(hidden_states.scalar_type() == ScalarType::Byte && hidden_states.dim() == 2,
                  "hidden_states: expected uint8 [tokens, hidden] with hidden_states_scale, got ",
                  describe(hidden_states));
  check_placed("hidden_states", hidden_states, device);
  const int64_t tokens = hidden_states.size(0), hidden = hidden_states.size(1);
  if (swizzled) {
    check_tensor("hidden_states_scale", scale, ScalarType::Byte, {swizzled_scale_bytes(tokens, hidden)}, device,
                 kElementAlignment);
  } else {
    check_tensor("hidden_states_scale", scale, ScalarType::Byte, {tokens, hidden / kScaleBlock}, device,
                 kElementAlignment);
  }
}

inline void check_launch(const char* kernel, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " kernel did not launch: ", cudaGetErrorString(error));
}

// The router's logits, checked but for their rows; how many experts they are for is theirs to say.
inline TopkSoftmaxArgs check_logits(const Tensor& router_logits, int64_t top_k, bool renormalize, int32_t device) {
  TopkSoftmaxArgs args = {};
  const ScalarType type = router_logits.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half) &&
                      router_logits.dim() == 2,
                  "router_logits: expected float32, bfloat16 or float16 [tokens, experts], got ",
                  describe(router_logits));
  check_placed("router_logits", router_logits, device, kElementAlignment);
  args.logits = router_logits.data_ptr();
  args.type = type == ScalarType::Float      ? LogitsType::kFloat32
              : type == ScalarType::BFloat16 ? LogitsType::kBFloat16
                                             : LogitsType::kFloat16;
  args.tokens = check_range("tokens", router_logits.size(0), 0, INT_MAX);
  args.experts = check_range("experts", router_logits.size(1), 1, kMaxExperts);
  args.top_k = check_range("top_k", top_k, 1, std::min<int64_t>(args.experts, kMaxTopK));
  args.renormalize = renormalize;
  return args;
}

// What a router is, beside top_k and renormalize, as operators get it; the defaults are topk_softmax's.
struct RouterRule {
  const std::optional<Tensor>& e_score_correction_bias;  // float32 [experts]
  int64_t scoring_func;                                  // enum ScoringFunc
  int64_t num_expert_group;
  int64_t topk_group;
  int64_t group_score;  // enum GroupScore
  double routed_scaling_factor;
};

// Any router, checked but for its logits' rows.
inline TopkExpertsArgs check_router(const Tensor& router_logits, int64_t top_k, bool renormalize,
                                    const RouterRule& rule, int32_t device) {
  TopkExpertsArgs args = {};
  args.choice = check_logits(router_logits, top_k, renormalize, device);
  const int32_t experts = args.choice.experts;
  args.scoring_func = static_cast<ScoringFunc>(check_range("scoring_func", rule.scoring_func, 0, kNumScoringFuncs - 1));
  if (rule.e_score_correction_bias.has_value()) {
    check_tensor("e_score_correction_bias", *rule.e_score_correction_bias, ScalarType::Float, {experts}, device,
                 kElementAlignment);
    args.bias = data<const float>(*rule.e_score_correction_bias);
  }
  args.num_expert_group =
      check_range("num_expert_group", rule.num_expert_group, 1, std::min(experts, kMaxExpertGroups));
  args.topk_group = check_range("topk_group", rule.topk_group, 1, args.num_expert_group);
  args.group_score = static_cast<GroupScore>(check_range("group_score", rule.group_score, 0, 1));
  const int32_t each = experts / args.num_expert_group;
  STD_TORCH_CHECK(each * args.num_expert_group == experts, "num_expert_group: expected a divisor of ", experts,
                  " experts, got ", args.num_expert_group);
  STD_TORCH_CHECK(args.num_expert_group == 1 || args.group_score == GroupScore::kMax || each > 1,
                  "num_expert_group: expected groups of two experts at least, whose scores are added, got ",
                  args.num_expert_group, " of ", experts, " experts");
  STD_TORCH_CHECK(each * args.topk_group >= args.choice.top_k, "topk_group: expected groups with ", args.choice.top_k,
                  " experts together, got ", args.topk_group, " of ", each, " each");
  args.routed_scaling_factor = static_cast<float>(rule.routed_scaling_factor);
  return args;
}

// Where a token's experts come from: topk_weights and topk_ids, or the router's logits.
struct Routing {
  int64_t top_k;
  bool ids_are_int64;
  const void* ids;
  const float* weights;
  TopkExpertsArgs router;
  bool from_logits;
};

inline Routing check_routing(const std::optional<Tensor>& topk_weights, const std::optional<Tensor>& topk_ids,
                             const std::optional<Tensor>& router_logits, int64_t top_k, bool renormalize,
                             const RouterRule& rule, int64_t tokens, int32_t device) {
  Routing routing = {};
  routing.from_logits = router_logits.has_value();
  if (routing.from_logits) {
    STD_TORCH_CHECK(!topk_weights.has_value() && !topk_ids.has_value(),
                    "router_logits: expected none beside topk_weights and topk_ids, got both");
    routing.router = check_router(*router_logits, top_k, renormalize, rule, device);
    STD_TORCH_CHECK(router_logits->size(0) == tokens, "router_logits: expected [", tokens, ", experts], got ",
                    describe(*router_logits));
    routing.top_k = top_k;
    return routing;
  }
  STD_TORCH_CHECK(topk_weights.has_value() && topk_ids.has_value(),
                  "topk_weights and topk_ids: expected both, or router_logits, got neither or one");
  routing.ids_are_int64 = check_ids(*topk_ids, device);
  routing.top_k = topk_ids->size(1);
  check_tensor("topk_weights", *topk_weights, ScalarType::Float, {tokens, routing.top_k}, device, kElementAlignment);
  STD_TORCH_CHECK(topk_ids->size(0) == tokens && routing.top_k > 0, "topk_ids: expected [", tokens, ", top_k], got ",
                  describe(*topk_ids));
  routing.ids = topk_ids->data_ptr();
  routing.weights = data<const float>(*topk_weights);
  return routing;
}

}  // namespace mxfp4_moe
