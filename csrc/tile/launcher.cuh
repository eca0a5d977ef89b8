// Host side of a tile: checks the arguments, describes the operands to TMA, launches. Returns a reason, never a crash.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdio.h>

#include <algorithm>
#include <type_traits>

#include "shared/per_device.h"
#include "tile/bf16/mma_sync_kernel.cuh"

// No more kernels than are compiled: CuTe's list of wgmma's shapes takes as long to read as most kernels to compile.
#define MXFP4_MOE_IS_SM90_90a 1
#define MXFP4_MOE_IS_SM90_(arch) MXFP4_MOE_IS_SM90_##arch
#define MXFP4_MOE_IS_SM90(arch) MXFP4_MOE_IS_SM90_(arch)
#if MXFP4_MOE_IS_SM90(MXFP4_MOE_ARCH)
#include "tile/sm90/tile_shape.cuh"
#define MXFP4_MOE_HAS_WGMMA (LOGICAL_TILE_M >= 32 && LOGICAL_TILE_N >= 64)
static_assert(MXFP4_MOE_HAS_WGMMA == mxfp4_moe::has_wgmma(LOGICAL_TILE_M, LOGICAL_TILE_N), "one rule, said twice");
#if MXFP4_MOE_HAS_WGMMA
#include "tile/sm90/wgmma_kernel.cuh"
#endif
#else
#include "tile/sm12x/bf16_tile_shape.cuh"
#include "tile/sm12x/plain_kernel.cuh"
#endif

namespace mxfp4_moe {

// Holds the text of the last refusal; one per thread, because serving engines launch from several.
class Refusal {
 public:
  template <class... Args>
  const char* operator()(const char* format, Args... args) {
    snprintf(text_, sizeof text_, format, args...);
    return text_;
  }

 private:
  char text_[512];
};

// Whether a kernel of bf16 rows serves activations of a format too.
template <class Shape>
constexpr bool folds(int32_t act_format) {
  if (Shape::kWeightFormat == MXFP4_MOE_WEIGHT_NVFP4) return Shape::kFolds && act_format == MXFP4_MOE_ACT_NVFP4;
  return Shape::kFolds && (act_format == MXFP4_MOE_ACT_MXFP8 || act_format == MXFP4_MOE_ACT_MXFP4);
}

template <class Shape>
const char* check_arguments(const Mxfp4MoeGemmArgs& a, Refusal& refuse) {
  const auto aligned = [](const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; };
  if (a.k <= 0 || a.k % kBlockK) return refuse("k: expected a positive multiple of %d, got %d", kBlockK, a.k);
  if (a.n <= 0 || a.n % 16) return refuse("n: expected a positive multiple of 16, got %d", a.n);
  if (a.rows < 0) return refuse("rows: expected at least 0, got %d", a.rows);
  if (a.experts <= 0) return refuse("experts: expected at least 1, got %d", a.experts);
  if (a.experts * weight_bytes(a.n, a.k, Shape::kScaleWords) / kWeightUnit > INT32_MAX)
    return refuse("weight: expected at most 2^31 - 1 units of %d bytes, got %lld", kWeightUnit,
                  static_cast<long long>(a.experts * weight_bytes(a.n, a.k, Shape::kScaleWords) / kWeightUnit));
  if (a.out_type < MXFP4_MOE_OUT_FLOAT32 || a.out_type > MXFP4_MOE_OUT_FLOAT16)
    return refuse("out_type: expected 0 (float32), 1 (bfloat16) or 2 (float16), got %d", a.out_type);
  if (a.act_format != Shape::kActFormat || a.weight_format != Shape::kWeightFormat)
    return refuse(
        "act_format, weight_format: expected %d and %d, what this kernel of tile (%d, %d) reads, got %d and %d",
        Shape::kActFormat, Shape::kWeightFormat, Shape::M, Shape::N, a.act_format, a.weight_format);
  if (!aligned(a.act, 16)) return refuse("act: expected an address that is a multiple of 16, got %p", a.act);
  if (!Shape::kReadsHalves && !aligned(a.act_scale, 16))
    return refuse("act_scale: expected an address that is a multiple of 16, got %p", a.act_scale);
  if (!aligned(a.weight, 16)) return refuse("weight: expected an address that is a multiple of 16, got %p", a.weight);
  if constexpr (Shape::kHasFactors)
    if (!a.factors.of_weights || !aligned(a.factors.of_weights, 8))
      return refuse("factors.of_weights: expected an address that is a multiple of 8, got %p", a.factors.of_weights);
  if (a.activate.rows) {
    if (a.activate.format != Shape::kActFormat && !folds<Shape>(a.activate.format))
      return refuse("format: expected %d, which tile (%d, %d) writes on this GPU, got %d", Shape::kActFormat, Shape::M,
                    Shape::N, a.activate.format);
    if (!Shape::kActivates) return refuse("activate: tile (%d, %d) cannot", Shape::M, Shape::N);
    if (a.n % 64) return refuse("n: expected a multiple of 64, gates and ups, got %d", a.n);
    if (a.activate.activation < 0 || !is_fused(static_cast<Activation>(a.activate.activation)))
      return refuse("activation: expected 0 (swiglu), 1 (swiglu_oai), 2 (swiglu_step) or 5 (situ), got %d",
                    a.activate.activation);
    return nullptr;
  }
  if (!aligned(a.out, 16)) return refuse("out: expected an address that is a multiple of 16, got %p", a.out);
  return nullptr;
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver that runs us, so that the library links to the CUDA runtime alone.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled fn = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(p) : nullptr;
  }();
  return fn;
}

// One operand as TMA sees it: extents and box innermost first, strides in bytes of all but the innermost.
template <int kRank>
struct TmaOperand {
  const char* name;
  CUtensorMapDataType type;
  const void* address;
  cuuint64_t extents[kRank];
  cuuint64_t strides[kRank - 1];
  cuuint32_t box[kRank];
  CUtensorMapSwizzle swizzle;
};

template <int kRank>
const char* encode(CUtensorMap& map, const TmaOperand<kRank>& t, Refusal& refuse) {
  const EncodeTiled encode_fn = encode_tiled();
  if (!encode_fn) return refuse("the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
  cuuint32_t element_strides[kRank];
  for (auto& s : element_strides) s = 1;
  const CUresult e = encode_fn(&map, t.type, kRank, const_cast<void*>(t.address), t.extents, t.strides, t.box,
                               element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (e != CUDA_SUCCESS) return refuse("%s: TMA descriptor refused by the driver (CUresult %d)", t.name, int(e));
  return nullptr;
}

template <class Shape>
const char* describe(TensorMaps& maps, const Mxfp4MoeGemmArgs& a, Refusal& refuse) {
  const auto u64 = [](int64_t v) { return static_cast<cuuint64_t>(v); };
  const cuuint64_t k = u64(a.k);
  TmaOperand<2> act{"act",
                    CU_TENSOR_MAP_DATA_TYPE_UINT8,
                    a.act,
                    {k, u64(a.rows)},
                    {k},
                    {kTileK, Shape::M},
                    CU_TENSOR_MAP_SWIZZLE_128B};
  if constexpr (Shape::kReadsHalves) {
    act.type = Shape::kHasFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    act.strides[0] = 2 * k;
    act.box[0] = kTileK / 2;
    act.box[1] = Shape::kBoxRows;
  } else if constexpr (Shape::kRowBytes != kTileK) {
    act.extents[0] = act.strides[0] = k / 2;
    act.box[0] = Shape::kRowBytes;
    act.swizzle = CU_TENSOR_MAP_SWIZZLE_64B;
  }
  TmaOperand<2> weight{"weight",
                       CU_TENSOR_MAP_DATA_TYPE_INT32,
                       a.weight,
                       {kWeightUnit / 4, u64(a.experts * weight_bytes(a.n, a.k, Shape::kScaleWords) / kWeightUnit)},
                       {kWeightUnit},
                       {kWeightUnit / 4, Shape::kWeightBytes / kWeightUnit},
                       CU_TENSOR_MAP_SWIZZLE_NONE};
  if (const char* why = encode(maps.act, act, refuse)) return why;
  if constexpr (!Shape::kReadsHalves) {
    // Pairs of words, because a box has at most 256 elements a side and the largest tile wants 260 rows.
    const cuuint64_t sets = u64(scale_k_tiles(a.k) * Shape::kScaleWords), scale_rows = u64(act_scale_rows(a.rows));
    const TmaOperand<2> act_scale{"act_scale",
                                  CU_TENSOR_MAP_DATA_TYPE_INT64,
                                  a.act_scale,
                                  {scale_rows / 2, sets},
                                  {scale_rows * 4},
                                  {Shape::kActScaleRows / 2, Shape::kScaleWords},
                                  CU_TENSOR_MAP_SWIZZLE_NONE};
    if (const char* why = encode(maps.act_scale, act_scale, refuse)) return why;
  }
  if (const char* why = encode(maps.weight, weight, refuse)) return why;
  const int tail_steps = a.k % kTileK / kBlockK;
  weight.box[1] =
      (weight_block_scale_bytes(Shape::kScaleWords) + (tail_steps ? tail_steps : 4) * kWeightStepBytes) / kWeightUnit;
  return encode(maps.weight_tail, weight, refuse);
}

// Blocks of this shape's kernel that the whole device holds at once; opts in to the shared memory on first use.
template <class Shape>
const char* resident_blocks(int device, int& blocks, Refusal& refuse) {
  static PerDevice known;
  cudaError_t e = cudaSuccess;
  blocks = known.get(device, [&] {
    const auto kernel = kernel_of<Shape>(static_cast<Shape*>(nullptr));
    int sms = 0, per_sm = 0;
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess)
      e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, Shape::kThreads, Shape::kSmemBytes);
    return e == cudaSuccess ? sms * per_sm : 0;
  });
  if (blocks > 0) return nullptr;
  cudaGetLastError();
  return refuse("tile (%d, %d): a block of %d threads and %d bytes of shared memory does not fit this GPU (%s)",
                Shape::M, Shape::N, Shape::kThreads, Shape::kSmemBytes, cudaGetErrorString(e));
}

// Weights that stream once need not push others out of L2: of few bytes, the lines that others left there stay, which
// would have to be written back. But copies that say so are 3 % slower, which counts with many: 970 MB came at 2.91 and
// 3.01 TB/s, 141 MB at 2.52 and 2.37, 282 MB at 2.66 and 2.68 (H100).
template <class Shape>
uint64_t weight_hint(const Mxfp4MoeGemmArgs& a) {
  const int64_t experts = a.rows < a.experts ? a.rows : a.experts;
  return experts * weight_bytes(a.n, a.k, Shape::kScaleWords) > Shape::Arch::kFewWeightBytes ? kEvictNormal
                                                                                             : kEvictFirst;
}

// m-tiles times tiles along n, at most: the host knows only a bound of the m-tiles, which with few tokens is nearly
// what there is.
template <class Shape>
int64_t max_output_tiles(const Mxfp4MoeGemmArgs& a) {
  return static_cast<int64_t>(a.max_m_tiles) * ceil_div(a.n, Shape::N);
}

template <class Shape>
const char* launch_tile(const Mxfp4MoeGemmArgs& a) {
  static thread_local Refusal refuse;
  if (const char* why = check_arguments<Shape>(a, refuse)) return why;
  if (a.rows == 0 || a.max_m_tiles == 0) return nullptr;

  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return refuse("no current CUDA device (%s)", cudaGetErrorString(e));
  int blocks = 0;
  if (const char* why = resident_blocks<Shape>(device, blocks, refuse)) return why;
  TensorMaps maps;
  if (const char* why = describe<Shape>(maps, a, refuse)) return why;
  const GemmParams params{a.out, a.m_tiles,           a.num_m_tiles,         a.out_type, a.rows,   a.n,
                          a.k,   a.m_tiles_are_ready, weight_hint<Shape>(a), a.activate, a.factors};
  const auto grid = static_cast<unsigned>(std::min<int64_t>(max_output_tiles<Shape>(a), blocks));
  if (cudaError_t e = launch(kernel_of<Shape>(static_cast<Shape*>(nullptr)), dim3(grid), Shape::kThreads,
                             Shape::kSmemBytes, static_cast<cudaStream_t>(a.stream), maps, params))
    return refuse("tile (%d, %d): launch failed (%s)", Shape::M, Shape::N, cudaGetErrorString(e));
  return nullptr;
}

}  // namespace mxfp4_moe
