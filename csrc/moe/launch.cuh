// What the layer's small kernels share: sizes, and how they are launched.
#pragma once

#include "../tile/dependent_launch.cuh"

namespace mxfp4_moe {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxGridY = 65535;

}  // namespace mxfp4_moe
