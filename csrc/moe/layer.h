// One call of a layer, as the operator fused_moe hands it over.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "moe/checks.h"

namespace mxfp4_moe {

struct LayerArgs {
  using Tensor = torch::stable::Tensor;
  using MaybeTensor = std::optional<Tensor>;

  const Tensor& hidden_states;             // [T, H] bfloat16 or float16; with a scale uint8 E4M3
  const MaybeTensor& hidden_states_scale;  // E8M0, linear or 128x4-swizzled
  bool scale_is_swizzled;

  const MaybeTensor& topk_weights;  // these two, or router_logits
  const MaybeTensor& topk_ids;
  const MaybeTensor& router_logits;
  int64_t top_k;
  bool renormalize;
  const RouterRule& router;  // of router_logits
  int64_t first_expert;      // the global id of w13[0], from which ids count

  int64_t weight_format;  // Mxfp4MoeWeightFormat
  const Tensor& w13;      // [E, weight_bytes(2I, H)] (I when the activation is not gated), as MoEWeights holds it
  const MaybeTensor& w13_bias;
  const Tensor& w2;  // [E, weight_bytes(H, I)]
  const MaybeTensor& w2_bias;
  int64_t intermediate_size;
  // Of NVFP4 weights, and of MXFP4 weights with fp16 rows, float32 [E, 2]: what the sums of gates and of ups are
  // multiplied by (tile_abi.h); of w2 twice the same.
  const MaybeTensor& w13_factors;
  const MaybeTensor& w2_factors;
  // Of NVFP4 rows whose scales the checkpoint has, float32 [E]: the same for the rows, and what they are multiplied by
  // before they are quantized.
  const MaybeTensor& w13_input_factors;
  const MaybeTensor& w2_input_factors;
  const MaybeTensor& w13_input_global_scales;
  const MaybeTensor& w2_input_global_scales;

  int64_t activation;  // enum Activation
  double alpha, beta, limit;
  const MaybeTensor& alphas;  // [E] each, where every expert has its own
  const MaybeTensor& betas;
  const MaybeTensor& limits;
  bool intermediate_rounding;  // GEMM1's values and the activation's, to out's dtype

  int64_t tile_m, tile_n;
  int64_t activation_format;  // enum ActivationFormat: what the GEMMs' rows become first
  const Tensor& out;          // [T, H], written in its own dtype
};

// Checks everything, then launches the layer's kernels on the current stream of hidden_states' device.
void run_layer(const LayerArgs& args);

}  // namespace mxfp4_moe
