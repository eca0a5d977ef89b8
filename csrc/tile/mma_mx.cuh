// The seam: one block-scaled MMA, D[16,8] += (A[16,32] . B[8,32]^T) * 2^(scale_a[row] - 127) * 2^(scale_b[col] - 127).
//
// One side per architecture: sm12x/mma.cuh and sm90/mma.cuh. All start from the same registers (lane_maps.cuh):
// activations as ldmatrix brings them, one 32-bit word of eight FP4 codes per lane, row and step, and per K tile one
// 32-bit word of four E8M0 scales in the lanes from which SM12x reads them with thread selector 0: A's row g from lane
// 4g, row g+8 from lane 4g+1, B's column g from lane 4g. The selector picks the word's scale, 0 to 3. A side has
//   Fragment                       what the instruction takes of 8 rows: eight k per lane, in the same order for both
//                                  operands
//   expand_act, expand_weight      those registers to a Fragment
//   ScaleA, ScaleB                 what the instruction takes of the scales
//   share_scale_a, share_scale_b   those words to a ScaleA, a ScaleB
//   mx_mma                         D += A . B, scaled
//   kSelectorIsImmediate           whether the selector must be a constant
//   kAccumulatorUnit               what an accumulator counts
#pragma once

#include "tile/lane_maps.cuh"

// Whether this is compiled for a GPU whose MMA takes scales, or, in a development build for tests, as if it were
// (sm12x/emulated_mma.cuh). The host pass of nvcc compiles no device code.
#if defined(MXFP4_MOE_EMULATES_SM12X) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200)
#define MXFP4_MOE_MMA_TAKES_SCALES
#endif

#ifdef __CUDACC__
#ifdef MXFP4_MOE_MMA_TAKES_SCALES
#include "tile/sm12x/mma.cuh"
#else
#include "tile/sm90/mma.cuh"
#endif
#endif
