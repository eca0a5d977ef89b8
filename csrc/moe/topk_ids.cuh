// Experts' ids as callers have them, int32 or int64: a branch that all lanes take alike, as for the logits' dtype.
#pragma once

#include <stdint.h>

namespace mxfp4_moe {

__device__ __forceinline__ int64_t load_id(const void* ids, bool are_int64, int64_t slot) {
  return are_int64 ? __ldcg(static_cast<const long long*>(ids) + slot)
                   : __ldcg(static_cast<const int32_t*>(ids) + slot);
}

}  // namespace mxfp4_moe
