// Warps and grids, as the layer's small kernels see them.
#pragma once

namespace mxfp4_moe {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxGridY = 65535;

}  // namespace mxfp4_moe
