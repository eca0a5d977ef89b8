// SM90 (archs.cuh).
#pragma once

#include <stdint.h>

namespace mxfp4_moe {

struct Sm90 {
  static constexpr int kSmemPerSm = 228 * 1024;
  static constexpr bool kLongWarps = false;
  static constexpr int kUnrolledFragments = 1;  // FP4 is expanded in too many instructions for more
  static constexpr int64_t kFewWeightBytes = 320 << 20;
};

}  // namespace mxfp4_moe
