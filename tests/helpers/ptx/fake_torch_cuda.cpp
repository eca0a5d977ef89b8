// What the operators ask of a CUDA torch, answered in a process that has a CPU torch: every tensor is on the current
// device of the fake runtime, and what an operator allocates comes from an arena, whose bytes nobody touches here.
//
// Loaded before torch, these names take precedence over libtorch_cpu's; the library is named libtorch_cuda.so, where
// the operators look for the stream.
#include <cuda_runtime_api.h>
#include <stdint.h>

#include <string>

#include "moe/workspace.h"
#include "tile_abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kCudaDeviceType = 1;
constexpr uint64_t kAlignment = 512;  // torch's allocator's

// aoti_torch_create_tensor_from_blob, of the real libtorch_cpu.
using FromBlob = int32_t (*)(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t offset,
                             int32_t dtype, int32_t device_type, int32_t device_index, void** tensor);
FromBlob from_blob;
uint64_t arena_next, arena_end;
std::string allocations;

int64_t bytes_of(int32_t dtype) {
  switch (dtype) {  // c10::ScalarType
    case 0:         // uint8
      return 1;
    case 3:  // int32
    case 6:  // float32
      return 4;
    case 5:   // float16
    case 15:  // bfloat16
      return 2;
    default:
      return 0;
  }
}

}  // namespace

EXPORT void fake_torch_init(FromBlob function) { from_blob = function; }

// Where allocations come from: addresses alone.
EXPORT void fake_set_arena(uint64_t address, uint64_t bytes) {
  arena_next = address;
  arena_end = address + bytes;
}

// "address bytes" of each allocation since the last call, a line each, and forgets them.
EXPORT const char* fake_take_allocations() {
  static std::string taken;
  taken.swap(allocations);
  allocations.clear();
  return taken.c_str();
}

EXPORT int32_t aoti_torch_get_device_type(void*, int32_t* type) {
  *type = kCudaDeviceType;
  return 0;
}
EXPORT int32_t aoti_torch_get_device_index(void*, int32_t* index) { return cudaGetDevice(index); }

EXPORT int32_t aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t, void** tensor) {
  int64_t bytes = bytes_of(dtype);
  for (int64_t d = 0; d < ndim; ++d) bytes *= sizes[d];
  const uint64_t address = (arena_next + kAlignment - 1) / kAlignment * kAlignment;
  if (bytes_of(dtype) == 0 || device_type != kCudaDeviceType || address + bytes > arena_end) return 1;
  arena_next = address + bytes;
  allocations += std::to_string(address) + " " + std::to_string(bytes) + "\n";
  return from_blob(reinterpret_cast<void*>(address), ndim, sizes, strides, 0, dtype, /*cpu*/ 0, 0, tensor);
}

EXPORT int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  static int it;
  *guard = &it;
  return 0;
}
EXPORT int32_t aoti_torch_delete_device_guard(void*) { return 0; }
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// ---- where a layer's intermediates lie in its workspace
// ---------------------------------------------------------------

// In the order of ptx/workspace.py.
EXPORT void fake_workspace(int64_t slots, int64_t hidden, int64_t intermediate, int64_t max_m_tiles,
                           int64_t gemm1_width, int64_t from_logits, int64_t act_format, int64_t row_value_bytes,
                           int64_t row_factors, int64_t* offsets) {
  const mxfp4_moe::Workspace w({slots, hidden, intermediate, max_m_tiles, gemm1_width, from_logits != 0,
                                static_cast<int32_t>(act_format), row_value_bytes, row_factors != 0});
  for (const int64_t offset :
       {w.slot_row, w.row_expert, w.m_tiles, w.num_m_tiles, w.valid_rows, w.topk_ids, w.topk_weights, w.rows1,
        w.scales1, w.rows2, w.scales2, w.gemm1_out, w.gemm2_out, w.row_factors1, w.row_factors2, w.bytes})
    *offsets++ = offset;
}

// ---- the layout of tile_abi.h, as a C++ compiler has it
// ---------------------------------------------------------------

struct Field {
  const char* name;
  uint64_t offset, bytes;
};

#define FIELD(type, name) {#type "." #name, offsetof(type, name), sizeof(static_cast<type*>(nullptr)->name)}
#define WHOLE(type) {#type, 0, sizeof(type)}
EXPORT const Field fake_tile_abi[] = {
    WHOLE(Mxfp4MoePerExpert),
    FIELD(Mxfp4MoePerExpert, value),
    FIELD(Mxfp4MoePerExpert, values),
    WHOLE(Mxfp4MoeActivate),
    FIELD(Mxfp4MoeActivate, rows),
    FIELD(Mxfp4MoeActivate, scales),
    FIELD(Mxfp4MoeActivate, bias),
    FIELD(Mxfp4MoeActivate, format),
    FIELD(Mxfp4MoeActivate, activation),
    FIELD(Mxfp4MoeActivate, rounding),
    FIELD(Mxfp4MoeActivate, alpha),
    FIELD(Mxfp4MoeActivate, beta),
    FIELD(Mxfp4MoeActivate, limit),
    FIELD(Mxfp4MoeActivate, global_scales),
    WHOLE(Mxfp4MoeFactors),
    FIELD(Mxfp4MoeFactors, of_weights),
    FIELD(Mxfp4MoeFactors, of_rows),
    FIELD(Mxfp4MoeFactors, of_inputs),
    WHOLE(Mxfp4MoeGemmArgs),
    FIELD(Mxfp4MoeGemmArgs, act),
    FIELD(Mxfp4MoeGemmArgs, act_scale),
    FIELD(Mxfp4MoeGemmArgs, weight),
    FIELD(Mxfp4MoeGemmArgs, out),
    FIELD(Mxfp4MoeGemmArgs, m_tiles),
    FIELD(Mxfp4MoeGemmArgs, num_m_tiles),
    FIELD(Mxfp4MoeGemmArgs, max_m_tiles),
    FIELD(Mxfp4MoeGemmArgs, out_type),
    FIELD(Mxfp4MoeGemmArgs, rows),
    FIELD(Mxfp4MoeGemmArgs, n),
    FIELD(Mxfp4MoeGemmArgs, k),
    FIELD(Mxfp4MoeGemmArgs, experts),
    FIELD(Mxfp4MoeGemmArgs, m_tiles_are_ready),
    FIELD(Mxfp4MoeGemmArgs, act_format),
    FIELD(Mxfp4MoeGemmArgs, weight_format),
    FIELD(Mxfp4MoeGemmArgs, factors),
    FIELD(Mxfp4MoeGemmArgs, activate),
    FIELD(Mxfp4MoeGemmArgs, stream),
    WHOLE(Mxfp4MoeTile),
    FIELD(Mxfp4MoeTile, abi_version),
    FIELD(Mxfp4MoeTile, tile_m),
    FIELD(Mxfp4MoeTile, tile_n),
    FIELD(Mxfp4MoeTile, swap_ab),
    FIELD(Mxfp4MoeTile, facts_of),
    FIELD(Mxfp4MoeTile, launch),
    {nullptr, 0, 0},
};
