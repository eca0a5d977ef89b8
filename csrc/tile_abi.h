// The one contract between a tile extension and the code that calls it (csrc/moe, the tile's own torch op).
//
// A tile extension is a shared library of its own, so nothing but C crosses the border: a struct of facts that the
// build compares with tiles.prove, a struct of arguments, and a function that launches or says why not.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MXFP4_MOE_TILE_ABI_VERSION 8

enum Mxfp4MoeOutType {
  MXFP4_MOE_OUT_FLOAT32 = 0,
  MXFP4_MOE_OUT_BFLOAT16 = 1,
  MXFP4_MOE_OUT_FLOAT16 = 2,
};

// The form of the rows that a tile's kernel reads, and that GEMM1's epilogue writes for GEMM2.
enum Mxfp4MoeActFormat {
  MXFP4_MOE_ACT_MXFP8 = 0,  // E4M3 codes and E8M0 scales, for MMAs that take scales
  MXFP4_MOE_ACT_BF16 = 1,   // bf16, for MMAs that do not (shared/bf16_rows.cuh)
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

// GEMM1's epilogue: weight rows are groups of 8 gates and the 8 ups of the same outputs, n = 2 * intermediate. Instead
// of `out`, the activation (shared/nonlinearities.cuh) is written, as the rows that GEMM2 reads.
typedef struct {
  uint8_t* rows;       // [rows, n / 2] E4M3, even k first, or bf16 (act_format); null: no activation
  uint8_t* scales;     // [ceil(n / 256), rows padded to 4, 4] E8M0, of E4M3 rows
  const float* bias;   // [experts, n] or null
  int32_t quantizes;   // to MXFP8; else the values are rounded to bf16, which only bf16 rows can hold
  int32_t activation;  // Mxfp4MoeFusedActivation
  int32_t rounding;    // Mxfp4MoeOutType: to which the sums, before their bias, and the activation are rounded
  Mxfp4MoePerExpert alpha, beta, limit;  // of all but MXFP4_MOE_SWIGLU
} Mxfp4MoeActivate;

// out[r, :] = act[r, :] . weight[e, :, :]^T for every row r of every m-tile; rows in no m-tile stay untouched.
typedef struct {
  const void* act;        // E4M3 [rows, k], each 32-block stored as its 16 even k, then its 16 odd k; or bf16 [rows, k]
  const void* act_scale;  // uint8 E8M0 [ceil(k/128), rows padded to 4, 4], of E4M3 rows
  const void* weight;     // [experts, weight_bytes(n, k)] E2M1 and E8M0 as in shared/weight_layout.cuh
  void* out;              // [rows, n] of out_type
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
  int32_t act_format;  // Mxfp4MoeActFormat of act: chooses the kernel
  Mxfp4MoeActivate activate;
  void* stream;  // cudaStream_t
} Mxfp4MoeGemmArgs;

// What one kernel of a tile is, as the compiler was told. Compared after each build with tiles.prove.
typedef struct {
  const char* arch;  // "90a" or "120f"
  const char* pair;  // of formats that it reads, weights first: "mxfp4_mxfp8" or "mxfp4_bf16"
  int32_t tile_m, tile_n, swap_ab;
  int32_t threads;
  int32_t stages;
  int32_t stage_bytes;  // that a stage loads
  int32_t smem_bytes;   // dynamic shared memory of one block
  int32_t blocks_per_sm;
  int32_t accumulator_registers;  // per thread
  int32_t activates;              // whether Mxfp4MoeGemmArgs::activate may be set
  int32_t act_format;             // Mxfp4MoeActFormat
} Mxfp4MoeTileFacts;

typedef struct {
  uint32_t abi_version;
  int32_t tile_m, tile_n, swap_ab;
  // Of the kernel that reads rows of this Mxfp4MoeActFormat on this device; nullptr when there is none.
  const Mxfp4MoeTileFacts* (*facts_of)(int32_t device, int32_t act_format);
  // Runs on the current device. nullptr when launched, else the reason (valid until this thread's next call).
  const char* (*launch)(const Mxfp4MoeGemmArgs* args);
} Mxfp4MoeTile;

#ifdef __cplusplus
}
#endif
