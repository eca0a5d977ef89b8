// Whether this is the development build that runs SM12x's kernels on SM90, with the one instruction that SM90 lacks
// done in integers (tile/sm12x/emulated_mma.cuh). It asks for what an SM12x GPU is asked for; only its machine code is
// SM90's.
#pragma once

namespace mxfp4_moe {

#ifdef MXFP4_MOE_EMULATES_SM12X
constexpr bool kEmulatesSm12x = true;
#else
constexpr bool kEmulatesSm12x = false;
#endif

}  // namespace mxfp4_moe
