// The architectures of the manifest, each as a type: what shapes and launcher take from it (sm12x/arch.cuh,
// sm90/arch.cuh).
//   kSmemPerSm           bytes of shared memory of a multiprocessor; a block may opt in to 1 KB less
//   kFewWeightBytes      GEMMs that may read more than this load weights at L2's normal priority (launcher.cuh)
//   kFolds               kernels of bf16 rows serve MXFP8, MXFP4 and NVFP4 activations too, whose codes and scales fold
//                        into bf16
//   kPassesTiles         in kernels of bf16 and fp16 rows, who loads tells who multiplies of each output tile
//                        (bf16/passed_tiles.cuh)
#pragma once

#include "tile/sm12x/arch.cuh"
#include "tile/sm90/arch.cuh"

namespace mxfp4_moe {

using Arch_90a = Sm90;
using Arch_120a = Sm12x;
using Arch_120f = Sm12x;
using Arch_121a = Sm12x;
using Arch_121f = Sm12x;

}  // namespace mxfp4_moe
