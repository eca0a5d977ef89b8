// SM120 and SM121 (archs.cuh).
#pragma once

#include <stdint.h>

namespace mxfp4_moe {

struct Sm12x {
  static constexpr int kSmemPerSm = 100 * 1024;
  static constexpr int64_t kFewWeightBytes = INT64_MAX;
  static constexpr bool kFolds = false, kPassesTiles = false;
};

}  // namespace mxfp4_moe
