// The one contract between a tile extension and the code that calls it (csrc/moe, the tile's own torch op).
//
// A tile extension is a shared library of its own, so nothing but C crosses the border: a struct of facts that the
// build compares with tiles.prove, a struct of arguments, and a function that launches or says why not.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MXFP4_MOE_TILE_ABI_VERSION 6

enum Mxfp4MoeOutType {
  MXFP4_MOE_OUT_FLOAT32 = 0,
  MXFP4_MOE_OUT_BFLOAT16 = 1,
  MXFP4_MOE_OUT_FLOAT16 = 2,
};

// The form of the rows that a GEMM reads.
enum Mxfp4MoeActFormat {
  MXFP4_MOE_ACT_MXFP8 = 0,
  MXFP4_MOE_ACT_FOLDED = 1,  // bf16, for MMAs that take no scales (shared/folded.cuh)
};

// The kernels of a tile. All give the same bits. A layer asks for BY_SIZE; the other numbers are for tests, and the
// places of Mxfp4MoeTileFacts::kernels.
enum Mxfp4MoeKernel {
  MXFP4_MOE_KERNEL_BY_SIZE = 0,     // the rule in tile/launcher.cuh: by act_format and the call's size
  MXFP4_MOE_KERNEL_PLAIN = 1,       // tile/plain_kernel.cuh, which every tile has
  MXFP4_MOE_KERNEL_PARALLEL_K = 2,  // tile/sm90/parallel_k_kernel.cuh; a tile without it refuses
  MXFP4_MOE_KERNEL_FOLDED = 3,      // tile/sm90/, for folded activations (shared/folded.cuh)
};
#define MXFP4_MOE_KERNELS 3  // that a tile may have

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
// of `out`, the activation (shared/nonlinearities.cuh) is written, as the MXFP8 rows that GEMM2 reads.
typedef struct {
  uint8_t* codes;      // [rows, n / 2] E4M3, even k first, or folded (gemm2_format); null: no activation
  uint8_t* scales;     // [ceil(n / 256), rows padded to 4, 4] E8M0
  int32_t* has_far;    // device memory, one value: set to 1 where output is folded and a block is far
  const float* bias;   // [experts, n] or null
  int32_t activation;  // Mxfp4MoeFusedActivation
  int32_t rounding;    // Mxfp4MoeOutType: to which the sums, before their bias, and the activation are rounded
  Mxfp4MoePerExpert alpha, beta, limit;  // of all but MXFP4_MOE_SWIGLU
} Mxfp4MoeActivate;

// out[r, :] = act[r, :] . weight[e, :, :]^T for every row r of every m-tile; rows in no m-tile stay untouched.
typedef struct {
  const void* act;         // uint8 E4M3 [rows, k], each 32-block stored as its 16 even k, then its 16 odd k; or folded
  const void* act_scale;   // uint8 E8M0 [ceil(k/128), rows padded to 4, 4]
  const int32_t* has_far;  // device memory, one value: whether any row has a far block; read where act is folded
  const void* weight;      // [experts, weight_bytes(n, k)] E2M1 and E8M0 as in shared/weight_layout.cuh
  void* out;               // [rows, n] of out_type
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
  int32_t act_format;  // Mxfp4MoeActFormat
  int32_t kernel;      // Mxfp4MoeKernel
  Mxfp4MoeActivate activate;
  void* stream;  // cudaStream_t
} Mxfp4MoeGemmArgs;

// One kernel of a tile on one arch, as the compiler was told. Compared after each build with tiles.prove.
typedef struct {
  int32_t kernel;  // Mxfp4MoeKernel; 0 where the tile does not have it, and all else is 0 too
  int32_t threads;
  int32_t stages;
  int32_t stage_bytes;  // that a stage loads
  int32_t smem_bytes;   // dynamic shared memory of one block
  int32_t blocks_per_sm;
  int32_t accumulator_registers;  // per thread
} Mxfp4MoeKernelFacts;

// What a tile is on one arch: its kernels, and what a layer has to know.
typedef struct {
  const char* arch;  // "90a" or "120f"
  int32_t tile_m, tile_n, swap_ab;
  Mxfp4MoeKernelFacts kernels[MXFP4_MOE_KERNELS];  // kernel 1 first
  int32_t activates;                               // whether Mxfp4MoeGemmArgs::activate may be set
  // Mxfp4MoeActFormat of the rows that a layer gives GEMM1, and of those that GEMM1's epilogue writes for GEMM2. A tile
  // that reads folded rows reads MXFP8 too.
  int32_t gemm1_format, gemm2_format;
} Mxfp4MoeTileFacts;

typedef struct {
  uint32_t abi_version;
  int32_t tile_m, tile_n, swap_ab;
  // Of the arch whose machine code this device runs; nullptr when there is none.
  const Mxfp4MoeTileFacts* (*facts_of)(int32_t device);
  // Runs on the current device. nullptr when launched, else the reason (valid until this thread's next call).
  const char* (*launch)(const Mxfp4MoeGemmArgs* args);
} Mxfp4MoeTile;

#ifdef __cplusplus
}
#endif
