// What every torch operator here does with its arguments: check them before anything is launched, and say argument,
// expected and actual. torch's stable ABI only.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "old_systems.h"

namespace mxfp4_moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kVectorAlignment = 16;  // of a tensor that is read in 16-byte vectors or by TMA
constexpr int64_t kElementAlignment = 1;  // of one that is read element by element: what torch guarantees

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    default:
      return "another dtype";
  }
}

template <typename Sizes>
std::string describe(const char* type, const Sizes& sizes) {
  std::string text = std::string(type) + " [";
  const char* separator = "";
  for (const int64_t size : sizes) {
    text += separator + std::to_string(size);
    separator = ", ";
  }
  return text + "]";
}

inline std::string describe(const Tensor& tensor) { return describe(type_name(tensor.scalar_type()), tensor.sizes()); }

inline int32_t device_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": expected a CUDA tensor, got one on another device");
  return tensor.get_device_index();
}

inline void check_placed(const char* name, const Tensor& tensor, int32_t device, int64_t alignment = kVectorAlignment) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, ": expected a tensor on cuda:", device,
                  ", got one on ", tensor.is_cuda() ? "cuda:" : "device type not cuda, index ",
                  tensor.get_device_index());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got a strided one of shape ",
                  describe(tensor));
  const auto misalignment = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment;
  STD_TORCH_CHECK(misalignment == 0, name, ": expected data aligned to ", alignment, " bytes, got ", misalignment,
                  " bytes past that");
}

inline void check_tensor(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> shape,
                         int32_t device, int64_t alignment = kVectorAlignment) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(tensor.scalar_type() == type && sizes.size() == shape.size() &&
                      std::equal(shape.begin(), shape.end(), sizes.begin()),
                  name, ": expected ", describe(type_name(type), shape), ", got ", describe(tensor));
  check_placed(name, tensor, device, alignment);
}

// torch's current stream through the stable C shim. The symbol lives in libtorch_cuda, which a CPU build of torch does
// not have; an extension that links to it would not load there. So it is looked up, once, in the libtorch_cuda that
// this process has loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t device_index, void** stream);  // 0 is success
  static const Function function = []() -> Function {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch was built without CUDA: no current CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "torch gave no current CUDA stream for cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace mxfp4_moe
