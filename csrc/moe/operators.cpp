// The torch operators of the layer (namespace mxfp4_moe), on torch's stable ABI alone.
//
// fused_moe runs a layer's five kernels on the current stream: route, quantize-permute, GEMM1 with its activation,
// GEMM2, finalize; GEMM1 leaves the rarer activations to a sixth. With logits instead of topk_ids, route chooses the
// experts first. route, quantize_permute, permute, activation and finalize expose its parts to tests and benchmarks.
// route_topk is the router's kernel, topk_softmax.cu. register_tile takes the address of a loaded tile (tile_abi.h);
// fused_moe finds its GEMM there.
// Every argument is checked before anything is launched; a failed check names argument, expected and actual. Nothing
// here synchronizes or reads device memory. Shapes and layouts: kernels.h.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "emulation.h"
#include "moe/kernels.h"
#include "moe/registry.h"
#include "moe/workspace.h"
#include "shared/schedule.cuh"
#include "shared/weight_layout.cuh"
#include "torch_args.h"

namespace mxfp4_moe {
namespace {

TileRegistry& tiles() {
  static TileRegistry registry;
  return registry;
}

// ---- checks -------------------------------------------------------------------------------------------------------

bool check_ids(const Tensor& ids, int32_t device) {
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Int || type == ScalarType::Long) && ids.dim() == 2,
                  "topk_ids: expected int32 or int64 [tokens, top_k], got ", describe(ids));
  check_placed("topk_ids", ids, device, kElementAlignment);
  return type == ScalarType::Long;
}

HalfType check_half(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::BFloat16 || type == ScalarType::Half) && tensor.dim() == 2, name,
                  ": expected bfloat16 or float16 with 2 dimensions, got ", describe(tensor));
  return type == ScalarType::BFloat16 ? HalfType::kBFloat16 : HalfType::kFloat16;
}

int32_t check_multiple_of_32(const char* name, int64_t value) {
  STD_TORCH_CHECK(value > 0 && value % kScaleBlock == 0 && value <= INT_MAX / 2, name,
                  ": expected a positive multiple of ", kScaleBlock, ", got ", value);
  return static_cast<int32_t>(value);
}

int32_t check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(value >= low && value <= high, name, ": expected ", low, " to ", high, ", got ", value);
  return static_cast<int32_t>(value);
}

// Row numbers are int32; with room for the largest tile past the last row, and for padding to a multiple of 4.
constexpr int64_t kMaxTileM = 1024;
constexpr int64_t kMaxSlots = INT_MAX - kMaxTileM;

Activation check_activation(int64_t activation) {
  return static_cast<Activation>(check_range("activation", activation, 0, kNumActivations - 1));
}

// A number of the activation; float32 [experts] where every expert has its own.
PerExpert check_number(const char* name, double value, const std::optional<Tensor>& values, int64_t experts,
                       int32_t device) {
  PerExpert number = {static_cast<float>(value), nullptr};
  if (values.has_value()) {
    check_tensor(name, *values, ScalarType::Float, {experts}, device, kElementAlignment);
    number.values = static_cast<const float*>(values->data_ptr());
  }
  return number;
}

// hidden_states that are MXFP8: uint8 [tokens, hidden], and the scales that belong to them.
void check_mxfp8(const Tensor& hidden_states, const Tensor& scale, bool swizzled, int32_t device) {
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

void check_launch(const char* kernel, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " kernel did not launch: ", cudaGetErrorString(error));
}

// torch::stable::empty finds its operator by name and boxes the list of sizes at each call, which takes four times as
// long as torch's C function for the same.
template <size_t kDims>
Tensor empty(const int64_t (&shape)[kDims], ScalarType type, int32_t device) {
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

// ---- the whole layer ----------------------------------------------------------------------------------------------

// The router's logits, checked but for their rows; how many experts they are for is theirs to say.
TopkSoftmaxArgs check_logits(const Tensor& router_logits, int64_t top_k, bool renormalize, int32_t device) {
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

// Where a token's experts come from: topk_weights and topk_ids, or the router's logits.
struct Routing {
  int64_t top_k;
  bool ids_are_int64;
  const void* ids;
  const float* weights;
  TopkSoftmaxArgs choice;
  bool from_logits;
};

// Asked of the driver once per device.
int32_t compute_capability_major(int32_t device) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int32_t> known[kMaxDevices];  // threads that come at once write the same value
  if (device < kMaxDevices && known[device] != 0) {
    return known[device];
  }
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  if (device < kMaxDevices) {
    known[device] = major;
  }
  return major;
}

// Clusters are for GPUs on which they have run; elsewhere one block routes, as it does everywhere for few slots.
int32_t most_cluster_blocks(int32_t device) {
  return compute_capability_major(device) == 9 && !kEmulatesSm12x ? kPortableClusterBlocks : 1;
}

Routing check_routing(const std::optional<Tensor>& topk_weights, const std::optional<Tensor>& topk_ids,
                      const std::optional<Tensor>& router_logits, int64_t top_k, bool renormalize, int64_t tokens,
                      int32_t device) {
  Routing routing = {};
  routing.from_logits = router_logits.has_value();
  if (routing.from_logits) {
    STD_TORCH_CHECK(!topk_weights.has_value() && !topk_ids.has_value(),
                    "router_logits: expected none beside topk_weights and topk_ids, got both");
    routing.choice = check_logits(*router_logits, top_k, renormalize, device);
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

// w13 [E, weight_bytes(2I, H)] (I when the activation is not gated) and w2 [E, weight_bytes(H, I)] as MoEWeights holds
// them; out [T, H] is written, in its own dtype, to which intermediate_rounding rounds GEMM1 and the activation as
// well. With hidden_states_scale, hidden_states are uint8 E4M3. Ids count from first_expert, the global id of w13[0].
//
// Without `fold`, no kernel for folded activations runs: that is how a layer of SM12x is tested on SM90.
//
// The rare arguments come last, with defaults: what a caller passes from Python costs 0.1 to 0.2 us each, a default a
// fifth of that.
void fused_moe(const Tensor& hidden_states, const std::optional<Tensor>& topk_weights,
               const std::optional<Tensor>& topk_ids, const std::optional<Tensor>& router_logits, int64_t top_k,
               const Tensor& w13, const std::optional<Tensor>& w13_bias, const Tensor& w2,
               const std::optional<Tensor>& w2_bias, int64_t intermediate_size, int64_t activation_code, double alpha,
               double beta, double limit, int64_t tile_m, int64_t tile_n, const Tensor& out, bool renormalize,
               int64_t first_expert, const std::optional<Tensor>& alphas, const std::optional<Tensor>& betas,
               const std::optional<Tensor>& limits, const std::optional<Tensor>& hidden_states_scale,
               bool scale_is_swizzled, bool intermediate_rounding, bool fold) {
  const int32_t device = device_of("hidden_states", hidden_states);
  const HalfType out_type = check_half("out", out);
  const bool is_mxfp8 = hidden_states_scale.has_value();
  if (is_mxfp8) {
    check_mxfp8(hidden_states, *hidden_states_scale, scale_is_swizzled, device);
  } else {
    check_half("hidden_states", hidden_states);
    check_placed("hidden_states", hidden_states, device);
  }
  const int64_t tokens = hidden_states.size(0);
  const int32_t hidden = check_multiple_of_32("hidden size", hidden_states.size(1));
  Routing routing = check_routing(topk_weights, topk_ids, router_logits, top_k, renormalize, tokens, device);
  const int32_t slots = check_range("tokens * top_k", tokens * routing.top_k, 0, kMaxSlots);

  const Activation activation = check_activation(activation_code);
  STD_TORCH_CHECK(w13.dim() == 2, "w13: expected uint8 [experts, bytes], got ", describe(w13));
  const int32_t experts = check_range("experts", w13.size(0), 1, kMaxExperts);
  check_range("first_expert", first_expert, 0, INT_MAX - kMaxExperts);
  const int32_t intermediate = check_multiple_of_32("intermediate_size", intermediate_size);
  const int32_t gemm1_width = is_gated(activation) ? 2 * intermediate : intermediate;
  check_tensor("w13", w13, ScalarType::Byte, {experts, weight_bytes(gemm1_width, hidden)}, device);
  check_tensor("w2", w2, ScalarType::Byte, {experts, weight_bytes(hidden, intermediate)}, device);
  if (w13_bias.has_value()) {
    check_tensor("w13_bias", *w13_bias, ScalarType::Float, {experts, gemm1_width}, device);
  }
  if (w2_bias.has_value()) {
    check_tensor("w2_bias", *w2_bias, ScalarType::Float, {experts, hidden}, device);
  }
  check_tensor("out", out, out.scalar_type(), {tokens, hidden}, device);
  const PerExpert alpha_number = check_number("alpha", alpha, alphas, experts, device);
  const PerExpert beta_number = check_number("beta", beta, betas, experts, device);
  const PerExpert limit_number = check_number("limit", limit, limits, experts, device);
  const Mxfp4MoeTile* tile = tiles().find(tile_m, tile_n);
  STD_TORCH_CHECK(tile != nullptr, "tile: expected one that is loaded, got (", tile_m, ", ", tile_n, ")");
  if (tokens == 0) {
    return;
  }

  const bool gemm1_activates =
      tile->activates && (activation == Activation::kSwiglu || activation == Activation::kSwigluOai);
  const bool folded = fold && tile->folded_major != 0 && tile->folded_major == compute_capability_major(device);
  const bool folded2 = folded && tile->folds_output;
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const auto m_tile_bound = static_cast<int32_t>(max_m_tiles(slots, experts, tile_m));
  const Workspace layout({slots, hidden, intermediate, m_tile_bound, gemm1_activates ? 0 : gemm1_width,
                          routing.from_logits, folded, folded2});
  const Tensor workspace = empty({layout.bytes}, ScalarType::Byte, device);
  auto* base = data<uint8_t>(workspace);
  const auto at = [base](int64_t offset) { return reinterpret_cast<int32_t*>(base + offset); };
  auto* m_tiles = reinterpret_cast<Mxfp4MoeMTile*>(base + layout.m_tiles);

  RouteArgs route_args = {};
  route_args.topk_ids = routing.ids;
  route_args.ids_are_int64 = routing.ids_are_int64;
  route_args.slots = slots;
  route_args.experts = experts;
  route_args.first_expert = static_cast<int32_t>(first_expert);
  route_args.tile_m = tile->tile_m;
  route_args.slot_row = at(layout.slot_row);
  route_args.row_expert = at(layout.row_expert);
  route_args.valid_rows = at(layout.valid_rows);
  route_args.m_tiles = m_tiles;
  route_args.num_m_tiles = at(layout.num_m_tiles);
  route_args.has_far = folded ? at(layout.has_far) : nullptr;
  route_args.most_blocks = most_cluster_blocks(device);
  if (routing.from_logits) {
    routing.choice.topk_ids = at(layout.topk_ids);
    routing.choice.topk_weights = reinterpret_cast<float*>(base + layout.topk_weights);
    routing.weights = routing.choice.topk_weights;
    route_args.topk_ids = routing.choice.topk_ids;
    check_launch("top-k and route", launch_topk_route(routing.choice, route_args, stream));
  } else {
    check_launch("route", launch_route(route_args, stream));
  }

  const auto to_rows = [&](auto args) {
    args.slot_row = at(layout.slot_row);
    args.tokens = static_cast<int32_t>(tokens);
    args.top_k = static_cast<int32_t>(routing.top_k);
    args.hidden_size = hidden;
    args.codes = base + layout.codes1;
    args.scales = base + layout.scales1;
    args.has_far = folded ? at(layout.has_far) : nullptr;
    return args;
  };
  if (is_mxfp8) {
    PermuteArgs args = to_rows(PermuteArgs{});
    args.hidden = data<const uint8_t>(hidden_states);
    args.hidden_scale = data<const uint8_t>(*hidden_states_scale);
    args.scale_is_swizzled = scale_is_swizzled;
    check_launch("permute", launch_permute(args, stream));
  } else {
    QuantizePermuteArgs args = to_rows(QuantizePermuteArgs{});
    args.hidden = hidden_states.data_ptr();
    args.type = check_half("hidden_states", hidden_states);
    args.hidden_is_ready = true;  // route came between whoever wrote it and this kernel
    check_launch("quantize-permute", launch_quantize_permute(args, stream));
  }

  Mxfp4MoeGemmArgs gemm = {};
  gemm.m_tiles = m_tiles;
  gemm.num_m_tiles = at(layout.num_m_tiles);
  gemm.max_m_tiles = m_tile_bound;
  gemm.kernel = folded ? MXFP4_MOE_KERNEL_FOLDED : MXFP4_MOE_KERNEL_BY_SIZE;
  gemm.rows = slots;
  gemm.experts = experts;
  gemm.m_tiles_are_ready = 1;
  gemm.stream = stream;
  const auto run_gemm = [&](const char* name, const Tensor& weight, int32_t n, int32_t k) {
    gemm.weight = weight.data_ptr();
    gemm.n = n;
    gemm.k = k;
    const char* reason = tile->launch(&gemm);
    STD_TORCH_CHECK(reason == nullptr, name, " did not launch: ", reason);
  };
  const auto rounding = intermediate_rounding ? static_cast<Rounding>(out_type) : Rounding::kNone;
  gemm.act = base + layout.codes1;
  gemm.act_scale = base + layout.scales1;
  gemm.has_far = at(layout.has_far);
  gemm.out = base + layout.gemm1_out;
  gemm.out_type = MXFP4_MOE_OUT_FLOAT32;
  if (gemm1_activates) {
    gemm.activate = {base + layout.codes2,
                     base + layout.scales2,
                     at(layout.has_far) + 1,
                     data<const float>(w13_bias),
                     static_cast<int32_t>(activation),
                     static_cast<int32_t>(rounding),
                     alpha_number,
                     beta_number,
                     limit_number};
  }
  run_gemm("GEMM1", w13, gemm1_width, hidden);

  if (!gemm1_activates) {
    ActivationArgs args = {};
    args.gemm1 = reinterpret_cast<const float*>(base + layout.gemm1_out);
    args.bias = data<const float>(w13_bias);
    args.row_expert = at(layout.row_expert);
    args.valid_rows = at(layout.valid_rows);
    args.rows = slots;
    args.intermediate = intermediate;
    args.activation = activation;
    args.rounding = rounding;
    args.alpha = alpha_number;
    args.beta = beta_number;
    args.limit = limit_number;
    args.codes = base + layout.codes2;
    args.scales = base + layout.scales2;
    args.has_far = folded2 ? at(layout.has_far) + 1 : nullptr;
    check_launch("activation", launch_activation(args, stream));
  }

  gemm.act = base + layout.codes2;
  gemm.act_scale = base + layout.scales2;
  gemm.kernel = folded2 ? MXFP4_MOE_KERNEL_FOLDED : MXFP4_MOE_KERNEL_BY_SIZE;
  gemm.has_far = at(layout.has_far) + 1;
  gemm.out = base + layout.gemm2_out;
  gemm.out_type = static_cast<int32_t>(out_type);
  gemm.activate = {};
  run_gemm("GEMM2", w2, hidden, intermediate);

  FinalizeArgs finalize_args = {};
  finalize_args.gemm2 = base + layout.gemm2_out;
  finalize_args.type = out_type;
  finalize_args.bias = data<const float>(w2_bias);
  finalize_args.topk_weights = routing.weights;
  finalize_args.slot_row = at(layout.slot_row);
  finalize_args.row_expert = at(layout.row_expert);
  finalize_args.tokens = static_cast<int32_t>(tokens);
  finalize_args.top_k = static_cast<int32_t>(routing.top_k);
  finalize_args.hidden_size = hidden;
  finalize_args.out = out.data_ptr();
  check_launch("finalize", launch_finalize(finalize_args, stream));
}

// ---- its parts, for tests and benchmarks --------------------------------------------------------------------------

// Returns expert_offsets, row_slot, slot_row, row_expert, m_tiles, num_m_tiles.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& topk_ids, int64_t num_experts,
                                                                 int64_t tile_m) {
  const int32_t device = device_of("topk_ids", topk_ids);
  RouteArgs args = {};
  args.ids_are_int64 = check_ids(topk_ids, device);
  args.slots = check_range("topk_ids.numel()", topk_ids.numel(), 0, kMaxSlots);
  args.experts = check_range("num_experts", num_experts, 1, kMaxExperts);
  args.tile_m = check_range("tile_m", tile_m, 1, kMaxTileM);
  const DeviceGuard guard(device);
  const Tensor expert_offsets = empty({num_experts + 1}, ScalarType::Int, device);
  const Tensor row_slot = empty({args.slots}, ScalarType::Int, device);
  const Tensor slot_row = empty({args.slots}, ScalarType::Int, device);
  const Tensor row_expert = empty({args.slots}, ScalarType::Int, device);
  const Tensor m_tiles = empty({max_m_tiles(args.slots, num_experts, tile_m), 4}, ScalarType::Int, device);
  const Tensor num_m_tiles = empty({1}, ScalarType::Int, device);
  const Tensor valid_rows = empty({1}, ScalarType::Int, device);  // the last of expert_offsets again
  args.topk_ids = topk_ids.data_ptr();
  args.expert_offsets = data<int32_t>(expert_offsets);
  args.row_slot = data<int32_t>(row_slot);
  args.slot_row = data<int32_t>(slot_row);
  args.row_expert = data<int32_t>(row_expert);
  args.valid_rows = data<int32_t>(valid_rows);
  args.m_tiles = data<Mxfp4MoeMTile>(m_tiles);
  args.num_m_tiles = data<int32_t>(num_m_tiles);
  args.most_blocks = most_cluster_blocks(device);
  check_launch("route", launch_route(args, current_stream(device)));
  return {expert_offsets, row_slot, slot_row, row_expert, m_tiles, num_m_tiles};
}

// The MXFP8 rows of both quantizing kernels.
std::tuple<Tensor, Tensor> empty_rows(int64_t rows, int64_t k, int32_t device) {
  return {empty({rows, k}, ScalarType::Byte, device),
          empty({scale_k_tiles(k), act_scale_rows(rows), 4}, ScalarType::Byte, device)};
}

// The number of valid rows is the last value of expert_offsets.
const int32_t* check_offsets(const Tensor& expert_offsets, int32_t device) {
  STD_TORCH_CHECK(expert_offsets.dim() == 1 && expert_offsets.numel() >= 2,
                  "expert_offsets: expected int32 [experts + 1], got ", describe(expert_offsets));
  check_tensor("expert_offsets", expert_offsets, ScalarType::Int, {expert_offsets.numel()}, device, kElementAlignment);
  return data<const int32_t>(expert_offsets) + expert_offsets.numel() - 1;
}

// Returns codes [R, H] and scales.
std::tuple<Tensor, Tensor> quantize_permute(const Tensor& hidden_states, const Tensor& slot_row, int64_t top_k) {
  const int32_t device = device_of("hidden_states", hidden_states);
  QuantizePermuteArgs args = {};
  args.type = check_half("hidden_states", hidden_states);
  check_placed("hidden_states", hidden_states, device);
  args.hidden_size = check_multiple_of_32("hidden size", hidden_states.size(1));
  args.top_k = check_range("top_k", top_k, 1, kMaxExperts);
  const int32_t slots = check_range("tokens * top_k", hidden_states.size(0) * top_k, 0, kMaxSlots);
  args.tokens = static_cast<int32_t>(hidden_states.size(0));
  check_tensor("slot_row", slot_row, ScalarType::Int, {slots}, device, kElementAlignment);
  const DeviceGuard guard(device);
  const auto [codes, scales] = empty_rows(slots, args.hidden_size, device);
  args.hidden = hidden_states.data_ptr();
  args.slot_row = data<const int32_t>(slot_row);
  args.codes = data<uint8_t>(codes);
  args.scales = data<uint8_t>(scales);
  check_launch("quantize-permute", launch_quantize_permute(args, current_stream(device)));
  return {codes, scales};
}

// The same of hidden_states that are MXFP8: uint8 E4M3 [T, H] and their scales.
std::tuple<Tensor, Tensor> permute(const Tensor& hidden_states, const Tensor& hidden_states_scale,
                                   bool scale_is_swizzled, const Tensor& slot_row, int64_t top_k) {
  const int32_t device = device_of("hidden_states", hidden_states);
  PermuteArgs args = {};
  check_mxfp8(hidden_states, hidden_states_scale, scale_is_swizzled, device);
  args.hidden_size = check_multiple_of_32("hidden size", hidden_states.size(1));
  args.top_k = check_range("top_k", top_k, 1, kMaxExperts);
  const int32_t slots = check_range("tokens * top_k", hidden_states.size(0) * top_k, 0, kMaxSlots);
  args.tokens = static_cast<int32_t>(hidden_states.size(0));
  check_tensor("slot_row", slot_row, ScalarType::Int, {slots}, device, kElementAlignment);
  const DeviceGuard guard(device);
  const auto [codes, scales] = empty_rows(slots, args.hidden_size, device);
  args.hidden = data<const uint8_t>(hidden_states);
  args.hidden_scale = data<const uint8_t>(hidden_states_scale);
  args.scale_is_swizzled = scale_is_swizzled;
  args.slot_row = data<const int32_t>(slot_row);
  args.codes = data<uint8_t>(codes);
  args.scales = data<uint8_t>(scales);
  check_launch("permute", launch_permute(args, current_stream(device)));
  return {codes, scales};
}

// Returns codes [R, I] and scales. rounding: 0 for none, else an Mxfp4MoeOutType.
std::tuple<Tensor, Tensor> activation(const Tensor& gemm1, const Tensor& row_expert, const Tensor& expert_offsets,
                                      const std::optional<Tensor>& w13_bias, int64_t activation, double alpha,
                                      double beta, double limit, const std::optional<Tensor>& alphas,
                                      const std::optional<Tensor>& betas, const std::optional<Tensor>& limits,
                                      int64_t rounding) {
  const int32_t device = device_of("gemm1", gemm1);
  ActivationArgs args = {};
  args.activation = check_activation(activation);
  args.rounding =
      static_cast<Rounding>(check_range("rounding", rounding, MXFP4_MOE_OUT_FLOAT32, MXFP4_MOE_OUT_FLOAT16));
  const int64_t widths = is_gated(args.activation) ? 2 : 1;
  STD_TORCH_CHECK(gemm1.dim() == 2, "gemm1: expected float32 [rows, ", widths, " * intermediate], got ",
                  describe(gemm1));
  args.rows = check_range("rows", gemm1.size(0), 0, kMaxSlots);
  args.intermediate = check_multiple_of_32("intermediate size", gemm1.size(1) / widths);
  check_tensor("gemm1", gemm1, ScalarType::Float, {args.rows, widths * args.intermediate}, device);
  check_tensor("row_expert", row_expert, ScalarType::Int, {args.rows}, device, kElementAlignment);
  args.valid_rows = check_offsets(expert_offsets, device);
  const int64_t experts = expert_offsets.numel() - 1;
  if (w13_bias.has_value()) {
    check_tensor("w13_bias", *w13_bias, ScalarType::Float, {experts, widths * args.intermediate}, device);
  }
  args.alpha = check_number("alpha", alpha, alphas, experts, device);
  args.beta = check_number("beta", beta, betas, experts, device);
  args.limit = check_number("limit", limit, limits, experts, device);
  const DeviceGuard guard(device);
  const auto [codes, scales] = empty_rows(args.rows, args.intermediate, device);
  args.gemm1 = data<const float>(gemm1);
  args.bias = data<const float>(w13_bias);
  args.row_expert = data<const int32_t>(row_expert);
  args.codes = data<uint8_t>(codes);
  args.scales = data<uint8_t>(scales);
  check_launch("activation", launch_activation(args, current_stream(device)));
  return {codes, scales};
}

// Returns out [T, H] of gemm2's dtype.
Tensor finalize(const Tensor& gemm2, const Tensor& slot_row, const Tensor& row_expert, const Tensor& topk_weights,
                const std::optional<Tensor>& w2_bias) {
  const int32_t device = device_of("gemm2", gemm2);
  STD_TORCH_CHECK(topk_weights.dim() == 2, "topk_weights: expected float32 [tokens, top_k], got ",
                  describe(topk_weights));
  const int64_t tokens = topk_weights.size(0), top_k = topk_weights.size(1);
  FinalizeArgs args = {};
  args.type = check_half("gemm2", gemm2);
  args.hidden_size = check_multiple_of_32("hidden size", gemm2.size(1));
  const int32_t slots = check_range("tokens * top_k", tokens * top_k, 0, kMaxSlots);
  check_tensor("gemm2", gemm2, gemm2.scalar_type(), {slots, args.hidden_size}, device);
  check_tensor("slot_row", slot_row, ScalarType::Int, {slots}, device, kElementAlignment);
  check_tensor("row_expert", row_expert, ScalarType::Int, {slots}, device, kElementAlignment);
  check_tensor("topk_weights", topk_weights, ScalarType::Float, {tokens, top_k}, device, kElementAlignment);
  if (w2_bias.has_value()) {
    STD_TORCH_CHECK(w2_bias->dim() == 2, "w2_bias: expected float32 [experts, hidden], got ", describe(*w2_bias));
    check_tensor("w2_bias", *w2_bias, ScalarType::Float, {w2_bias->size(0), args.hidden_size}, device);
  }
  const DeviceGuard guard(device);
  const Tensor out = empty({tokens, args.hidden_size}, gemm2.scalar_type(), device);
  args.gemm2 = gemm2.data_ptr();
  args.bias = data<const float>(w2_bias);
  args.topk_weights = data<const float>(topk_weights);
  args.slot_row = data<const int32_t>(slot_row);
  args.row_expert = data<const int32_t>(row_expert);
  args.tokens = static_cast<int32_t>(tokens);
  args.top_k = static_cast<int32_t>(top_k);
  args.out = out.data_ptr();
  check_launch("finalize", launch_finalize(args, current_stream(device)));
  return out;
}

// ---- the router ---------------------------------------------------------------------------------------------------

// Returns topk_weights and topk_ids, both [T, k].
std::tuple<Tensor, Tensor> route_topk(const Tensor& router_logits, int64_t top_k, bool renormalize) {
  const int32_t device = device_of("router_logits", router_logits);
  TopkSoftmaxArgs args = check_logits(router_logits, top_k, renormalize, device);
  const DeviceGuard guard(device);
  const Tensor topk_weights = empty({args.tokens, top_k}, ScalarType::Float, device);
  const Tensor topk_ids = empty({args.tokens, top_k}, ScalarType::Int, device);
  args.topk_weights = data<float>(topk_weights);
  args.topk_ids = data<int32_t>(topk_ids);
  check_launch("topk-softmax", launch_topk_softmax(args, current_stream(device)));
  return {topk_weights, topk_ids};
}

void register_tile(int64_t entry) {
  const std::string reason = tiles().add(reinterpret_cast<const Mxfp4MoeTile*>(static_cast<uintptr_t>(entry)));
  STD_TORCH_CHECK(reason.empty(), reason);
}

}  // namespace
}  // namespace mxfp4_moe

// Tiles register fragments of the same namespace, and may be loaded first.
STABLE_TORCH_LIBRARY_FRAGMENT(mxfp4_moe, m) {
  m.def("register_tile(int entry) -> ()");
  m.def(
      "fused_moe(Tensor hidden_states, Tensor? topk_weights, Tensor? topk_ids, Tensor? router_logits, int top_k, "
      "Tensor w13, Tensor? w13_bias, Tensor w2, Tensor? w2_bias, int intermediate_size, int activation, float alpha, "
      "float beta, float limit, int tile_m, int tile_n, Tensor(a!) out, bool renormalize=True, int first_expert=0, "
      "Tensor? alphas=None, Tensor? betas=None, Tensor? limits=None, Tensor? hidden_states_scale=None, "
      "bool scale_is_swizzled=False, bool intermediate_rounding=False, bool fold=True) -> ()");
  m.def("route(Tensor topk_ids, int num_experts, int tile_m) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("quantize_permute(Tensor hidden_states, Tensor slot_row, int top_k) -> (Tensor, Tensor)");
  m.def(
      "permute(Tensor hidden_states, Tensor hidden_states_scale, bool scale_is_swizzled, Tensor slot_row, int top_k) "
      "-> "
      "(Tensor, Tensor)");
  m.def(
      "activation(Tensor gemm1, Tensor row_expert, Tensor expert_offsets, Tensor? w13_bias, int activation, "
      "float alpha, float beta, float limit, Tensor? alphas, Tensor? betas, Tensor? limits, int rounding=0) "
      "-> (Tensor, Tensor)");
  m.def("finalize(Tensor gemm2, Tensor slot_row, Tensor row_expert, Tensor topk_weights, Tensor? w2_bias) -> Tensor");
  m.def("route_topk(Tensor router_logits, int top_k, bool renormalize) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_moe, CompositeExplicitAutograd, m) {
  m.impl("register_tile", TORCH_BOX(&mxfp4_moe::register_tile));
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_moe, CUDA, m) {
  m.impl("fused_moe", TORCH_BOX(&mxfp4_moe::fused_moe));
  m.impl("route", TORCH_BOX(&mxfp4_moe::route));
  m.impl("quantize_permute", TORCH_BOX(&mxfp4_moe::quantize_permute));
  m.impl("permute", TORCH_BOX(&mxfp4_moe::permute));
  m.impl("activation", TORCH_BOX(&mxfp4_moe::activation));
  m.impl("finalize", TORCH_BOX(&mxfp4_moe::finalize));
  m.impl("route_topk", TORCH_BOX(&mxfp4_moe::route_topk));
}

// `import mxfp4_moe._ext.moe` runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit_moe(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "moe", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
