// Which lane of a warp holds what of the block-scaled MMAs' operands (sm12x/mma.cuh, sm12x/fp4_mma.cuh). Tests compare
// it, element by element, with CuTe's MMA_Traits of SM120_16x8x32_TN_VS and SM120_16x8x64_TN_VS.
#pragma once

#include <stdint.h>

#include "shared/scale_layout.cuh"

namespace mxfp4_moe {

// Fragment maps of m16n8k32 with 8-bit operands. `byte` is the element's place in its 32-bit register.
MXFP4_MOE_HOST_DEVICE constexpr int a_row(int lane, int reg) { return lane / 4 + 8 * (reg % 2); }
MXFP4_MOE_HOST_DEVICE constexpr int a_k(int lane, int reg, int byte) { return lane % 4 * 4 + byte + 16 * (reg / 2); }
MXFP4_MOE_HOST_DEVICE constexpr int b_col(int lane) { return lane / 4; }
MXFP4_MOE_HOST_DEVICE constexpr int b_k(int lane, int reg, int byte) { return lane % 4 * 4 + byte + 16 * reg; }
MXFP4_MOE_HOST_DEVICE constexpr int c_row(int lane, int reg) { return lane / 4 + 8 * (reg / 2); }
MXFP4_MOE_HOST_DEVICE constexpr int c_col(int lane, int reg) { return lane % 4 * 2 + reg % 2; }
// Of m16n8k64 with 4-bit operands, whose rows and columns are the same; `nibble` is the element's place, lowest first.
MXFP4_MOE_HOST_DEVICE constexpr int fp4_a_k(int lane, int reg, int nibble) {
  return lane % 4 * 8 + nibble + 32 * (reg / 2);
}
MXFP4_MOE_HOST_DEVICE constexpr int fp4_b_k(int lane, int reg, int nibble) { return lane % 4 * 8 + nibble + 32 * reg; }
// The row (column) whose scale word this lane must hold; lanes that the instruction does not read hold a valid one.
MXFP4_MOE_HOST_DEVICE constexpr int scale_a_row(int lane) { return lane / 4 + 8 * (lane % 2); }
MXFP4_MOE_HOST_DEVICE constexpr int scale_b_col(int lane) { return lane / 4; }

enum class Fp4Operand { kA, kB };

}  // namespace mxfp4_moe
