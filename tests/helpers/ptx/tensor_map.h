// What cuTensorMapEncodeTiled demands of its arguments, and a tensor map that a program can read: the real one's 128
// bytes are nobody's business but the hardware's.
//
// The rules are those of the CUDA driver API's reference ("Tensor Map Object Management"), for maps without interleave,
// which are all that our code makes.
#pragma once

#include <cuda.h>
#include <stdint.h>
#include <string.h>

#include <string>

namespace mxfp4_moe {

// Little-endian; ptx/ reads it by these offsets.
struct TensorMap {
  uint64_t magic = 0x50414D524F534E54;  // "TNSORMAP"
  uint32_t data_type = 0, rank = 0;
  uint64_t address = 0;
  uint64_t extents[5] = {};                                              // elements, innermost first
  uint64_t strides_bytes[4] = {};                                        // of all dimensions but the innermost
  uint32_t box[5] = {};                                                  // elements
  uint16_t interleave = 0, swizzle = 0, l2_promotion = 0, oob_fill = 0;  // CUDA's enum values
  uint32_t reserved = 0;
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
static_assert(offsetof(TensorMap, extents) == 24 && offsetof(TensorMap, strides_bytes) == 64 &&
              offsetof(TensorMap, box) == 96 && offsetof(TensorMap, interleave) == 116);

// 0 for types that are not known here.
inline uint64_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

// Empty when the arguments are legal, else which rule they break.
inline std::string encode_tiled(TensorMap& made, CUtensorMapDataType type, cuuint32_t rank, const void* address,
                                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill, uintptr_t map_address) {
  const auto at = [](int d) { return "[" + std::to_string(d) + "]"; };
  const uint64_t bytes = element_bytes(type);
  if (map_address % 64) return "tensorMap: expected an address that is a multiple of 64";
  if (bytes == 0) return "tensorDataType: not known here: " + std::to_string(int(type));
  if (rank < 1 || rank > 5) return "tensorRank: expected 1 to 5, got " + std::to_string(rank);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return "interleave: not known here";
  const auto base = reinterpret_cast<uintptr_t>(address);
  if (base == 0 || base % 16) return "globalAddress: expected a multiple of 16, got " + std::to_string(base);
  uint64_t span = 0;
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      break;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      span = 32;
      break;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      span = 64;
      break;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      span = 128;
      break;
    default:
      return "swizzle: not known here: " + std::to_string(int(swizzle));
  }
  for (int d = 0; d < int(rank); ++d) {
    if (extents[d] == 0 || extents[d] > (uint64_t{1} << 32))
      return "globalDim" + at(d) + ": expected 1 to 2^32, got " + std::to_string(extents[d]);
    if (box[d] == 0 || box[d] > 256) return "boxDim" + at(d) + ": expected 1 to 256, got " + std::to_string(box[d]);
    if (element_strides[d] != 1)
      return "elementStrides" + at(d) + ": expected 1, got " + std::to_string(element_strides[d]);
  }
  for (int d = 0; d + 1 < int(rank); ++d) {
    const uint64_t inner = d == 0 ? extents[0] * bytes : extents[d] * strides[d - 1];
    if (strides[d] % 16 || strides[d] >= (uint64_t{1} << 40))
      return "globalStrides" + at(d) + ": expected a multiple of 16 below 2^40, got " + std::to_string(strides[d]);
    if (strides[d] < inner)
      return "globalStrides" + at(d) + ": expected at least " + std::to_string(inner) + ", got " +
             std::to_string(strides[d]);
  }
  if (box[0] * bytes % 16) return "boxDim[0]: expected a multiple of 16 bytes, got " + std::to_string(box[0] * bytes);
  if (span && box[0] * bytes > span)
    return "boxDim[0]: expected at most the swizzle's " + std::to_string(span) + " bytes, got " +
           std::to_string(box[0] * bytes);
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
      type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32)
    return "oobFill: expected none for integers";

  made.data_type = type;
  made.rank = rank;
  made.address = base;
  for (int d = 0; d < int(rank); ++d) {
    made.extents[d] = extents[d];
    made.box[d] = box[d];
    if (d + 1 < int(rank)) made.strides_bytes[d] = strides[d];
  }
  made.interleave = static_cast<uint16_t>(interleave);
  made.swizzle = static_cast<uint16_t>(swizzle);
  made.l2_promotion = static_cast<uint16_t>(promotion);
  made.oob_fill = static_cast<uint16_t>(fill);
  return "";
}

}  // namespace mxfp4_moe
