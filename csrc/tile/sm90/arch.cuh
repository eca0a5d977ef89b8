// SM90 (archs.cuh).
#pragma once

#include <stdint.h>

namespace mxfp4_moe {

struct Sm90 {
  static constexpr int kSmemPerSm = 228 * 1024;
  static constexpr int64_t kFewWeightBytes = 320 << 20;
  static constexpr bool kFolds = true, kPassesTiles = true;
};

}  // namespace mxfp4_moe
