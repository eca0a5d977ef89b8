// The one contract between a tile extension and the code that calls it (csrc/moe, the tile's own torch op).
//
// A tile extension is a shared library of its own, so nothing but C crosses the border: a struct of facts that the
// build compares with tiles.prove, a struct of arguments, and a function that launches or says why not.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MXFP4_MOE_TILE_ABI_VERSION 10

enum Mxfp4MoeOutType {
  MXFP4_MOE_OUT_FLOAT32 = 0,
  MXFP4_MOE_OUT_BFLOAT16 = 1,
  MXFP4_MOE_OUT_FLOAT16 = 2,
};

// The form of the rows that a tile's kernel reads, and that GEMM1's epilogue writes for GEMM2.
enum Mxfp4MoeActFormat {
  MXFP4_MOE_ACT_MXFP8 = 0,  // E4M3 codes and E8M0 scales, for MMAs that take scales
  MXFP4_MOE_ACT_BF16 = 1,   // bf16, for MMAs that do not (shared/bf16_rows.cuh)
  MXFP4_MOE_ACT_MXFP4 = 2,  // packed E2M1 codes and E8M0 scales
  MXFP4_MOE_ACT_NVFP4 = 3,  // packed E2M1 codes and E4M3 scales, under fp32 factors
  MXFP4_MOE_ACT_FP16 = 4,   // fp16, for the same MMAs as bf16
};

// Of the weights that it reads.
enum Mxfp4MoeWeightFormat {
  MXFP4_MOE_WEIGHT_MXFP4 = 0,  // E2M1 codes and E8M0 scales
  MXFP4_MOE_WEIGHT_NVFP4 = 1,  // E2M1 codes and E4M3 scales, under fp32 factors
};

// One entry of the m-tile list: rows [row_begin, row_end) of the sorted activations, at most tile_m of them, all of
// one expert. The list is made on the device (csrc/moe/route.cu); the host never reads it.
typedef struct {
  int32_t expert;
  int32_t row_begin;
  int32_t row_end;
  int32_t reserved;
} Mxfp4MoeMTile;

// A number that the layer has once, or once per expert.
typedef struct {
  float value;
  const float* values;  // [E] in device memory, or null: then `value` holds for all
} Mxfp4MoePerExpert;

// The activations that GEMM1 can apply itself, with a tile that `activates`.
enum Mxfp4MoeFusedActivation {
  MXFP4_MOE_SWIGLU = 0,
  MXFP4_MOE_SWIGLU_OAI = 1,
  MXFP4_MOE_SWIGLU_STEP = 2,
  MXFP4_MOE_SITU = 5,  // the numbers between are of activations that it does not apply
};

// What the sums of NVFP4 operands, and those of MXFP4 weights by fp16 rows, are multiplied by: the product of a
// weight's factor and, where the rows are NVFP4, in codes or in bf16, of the row's, rounded to fp32. All null where
// there are none. Both factors of MXFP4 weights by fp16 rows are 2^(B - 128), where B is the largest E8M0 byte, at
// least 2, of the expert's blocks that have a code other than zero: the kernel reads B from there, and makes operands
// that count from it. Factors of NVFP4 weights by fp16 rows are 2^7 times their own, because operands are 2^-7 of the
// weights.
typedef struct {
  const float* of_weights;  // [experts, 2]: of columns c with c % 16 < 8 (of w13: gates), and of the others
  const float* of_rows;     // [rows], or null
  const float* of_inputs;   // [experts], where all rows of an expert have the same; or null
} Mxfp4MoeFactors;

// GEMM1's epilogue: weight rows are groups of 8 gates and the 8 ups of the same outputs, n = 2 * intermediate. Instead
// of `out`, the activation (shared/nonlinearities.cuh) is written, as the rows that GEMM2 reads.
typedef struct {
  uint8_t* rows;       // [rows, n / 2] as the kernel reads `act`; null: no activation
  uint8_t* scales;     // as `act_scale`, of n / 2 values
  const float* bias;   // [experts, n] or null
  int32_t format;      // Mxfp4MoeActFormat: what values are quantized to; of bf16 and fp16 rows, which hold any, the
                       // rows' own stands for not at all
  int32_t activation;  // Mxfp4MoeFusedActivation
  int32_t rounding;    // Mxfp4MoeOutType: to which the sums, before their bias, and the activation are rounded
  Mxfp4MoePerExpert alpha, beta, limit;  // of all but MXFP4_MOE_SWIGLU
  const float* global_scales;            // [experts], of NVFP4 rows; or null
} Mxfp4MoeActivate;

// out[r, :] = act[r, :] . weight[e, :, :]^T for every row r of every m-tile; rows in no m-tile stay untouched.
typedef struct {
  // E4M3 [rows, k], each 32-block stored as its 16 even k, then its 16 odd k; bf16 or fp16 [rows, k]; or E2M1
  // [rows, k / 2], low nibble = even k.
  const void* act;
  // uint8 E8M0 [ceil(k/128), rows padded to 4, 4] of MXFP8 and MXFP4 rows; E4M3 [2 ceil(k/128), rows padded to 4, 4] of
  // NVFP4 rows; of bf16 and fp16 rows none.
  const void* act_scale;
  const void* weight;  // [experts, weight_bytes(n, k)] as in shared/weight_layout.cuh
  void* out;           // [rows, n] of out_type
  const Mxfp4MoeMTile* m_tiles;
  const int32_t* num_m_tiles;  // device memory, one value
  int32_t max_m_tiles;         // upper bound from shapes alone; sizes the grid
  int32_t out_type;            // Mxfp4MoeOutType
  int32_t rows;
  int32_t n;  // multiple of 16
  int32_t k;  // multiple of 32
  int32_t experts;
  // Nonzero: the m-tiles were written by a kernel that was complete when the one just before this was running, so that
  // weights may be fetched before that one is done (programmatic dependent launch).
  int32_t m_tiles_are_ready;
  int32_t act_format;     // Mxfp4MoeActFormat of act, and
  int32_t weight_format;  // Mxfp4MoeWeightFormat of weight: choose the kernel
  Mxfp4MoeFactors factors;
  Mxfp4MoeActivate activate;
  void* stream;  // cudaStream_t
} Mxfp4MoeGemmArgs;

// What one kernel of a tile is, as the compiler was told. Compared after each build with tiles.prove.
typedef struct {
  const char* arch;  // "90a" or "120f"
  const char* pair;  // of formats that it reads, weights first, such as "mxfp4_mxfp8"
  int32_t tile_m, tile_n, swap_ab;
  int32_t threads;
  int32_t stages;
  int32_t stage_bytes;  // that a stage loads
  int32_t smem_bytes;   // dynamic shared memory of one block
  int32_t blocks_per_sm;
  int32_t accumulator_registers;  // per thread
  int32_t activates;              // whether Mxfp4MoeGemmArgs::activate may be set
  int32_t act_format;             // Mxfp4MoeActFormat
  int32_t weight_format;          // Mxfp4MoeWeightFormat
  int32_t folds;                  // whether bf16 rows may hold quantized values, codes times scales
} Mxfp4MoeTileFacts;

typedef struct {
  uint32_t abi_version;
  int32_t tile_m, tile_n, swap_ab;
  // Of the kernel that reads these formats (Mxfp4MoeWeightFormat, Mxfp4MoeActFormat) on this device, or nullptr.
  const Mxfp4MoeTileFacts* (*facts_of)(int32_t device, int32_t weight_format, int32_t act_format);
  // Runs on the current device. nullptr when launched, else the reason (valid until this thread's next call).
  const char* (*launch)(const Mxfp4MoeGemmArgs* args);
} Mxfp4MoeTile;

#ifdef __cplusplus
}
#endif
