// A CUDA runtime without a GPU: it answers what our host code asks, and writes down what it would have launched.
//
// The loader takes it for libcudart, or its functions before those of the real one (ptx/launch.py), so that the wheel's
// own extensions run their own launch code on it. It refuses what a real one refuses, as far as our code could get it
// wrong, and every attribute that it was not taught. Device memory is never touched: pointers are numbers here.
//
// A machine may have several devices, which differ in their number of SMs: launchers remember what they asked per
// device.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "tensor_map.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Device {
  int major, minor, sms;
  int smem_per_sm, smem_per_block, smem_reserved;  // bytes; per block: the most that a kernel may opt in to
  int threads_per_sm;
};

struct Kernel {
  std::string name;
  int smem_opted_in = 48 * 1024;
};

// What the kernel's PTX says of it.
struct Facts {
  std::vector<size_t> param_bytes;
  int max_threads = 0;
};

struct State {
  std::vector<Device> devices;
  int current = 0;
  cudaError_t last_error = cudaSuccess;
  std::map<const void*, Kernel> kernels;  // by the host's function
  std::map<std::string, Facts> facts;     // by the device's name
  std::string log;                        // a line of JSON per launch
  std::string refusal;                    // why the last refused call was refused
};
State& state() {
  static State it;
  return it;
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  state().refusal = why;
  return state().last_error = error;
}

const Device& device() { return state().devices.at(state().current); }

template <class T>
std::string list(std::initializer_list<T> values) {
  std::string text;
  for (const T v : values) text += (text.empty() ? "[" : ", ") + std::to_string(v);
  return text + "]";
}

std::string hex(const void* bytes, size_t count) {
  std::string text;
  char two[3];
  for (size_t i = 0; i < count; ++i) {
    snprintf(two, sizeof two, "%02x", static_cast<const unsigned char*>(bytes)[i]);
    text += two;
  }
  return text;
}

// What a launch's attributes ask for.
struct Attributes {
  bool programmatic = false;
  dim3 cluster = dim3(1, 1, 1);
};

cudaError_t read_attributes(const cudaLaunchConfig_t& config, Attributes& to) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    switch (a.id) {
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        to.programmatic = a.val.programmaticStreamSerializationAllowed != 0;
        break;
      case cudaLaunchAttributeClusterDimension:
        to.cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
        break;
      case cudaLaunchAttributePreferredSharedMemoryCarveout:
        break;  // changes no result
      default:
        return refuse(cudaErrorNotSupported, "launch attribute " + std::to_string(int(a.id)) + " is not known here");
    }
  }
  return cudaSuccess;
}

}  // namespace

// ---- for ptx/recorder.py
// ----------------------------------------------------------------------------------------------

// Returns the number of the device.
EXPORT int fake_add_device(int major, int minor, int sms, int smem_per_sm, int smem_per_block, int smem_reserved,
                           int threads_per_sm) {
  state().devices.push_back({major, minor, sms, smem_per_sm, smem_per_block, smem_reserved, threads_per_sm});
  return int(state().devices.size()) - 1;
}

EXPORT void fake_set_device(int number) { state().current = number; }

EXPORT void fake_learn(const char* kernel, int params, const size_t* bytes, int max_threads) {
  // All tiles call their kernel by the same name; the one with the most threads counts.
  Facts& facts = state().facts[kernel];
  facts = {std::vector<size_t>(bytes, bytes + params), std::max(facts.max_threads, max_threads)};
}

// The launches since the last call, and forgets them. Valid until the next call.
EXPORT const char* fake_take_log() {
  static std::string taken;
  taken.swap(state().log);
  state().log.clear();
  return taken.c_str();
}

EXPORT const char* fake_refusal() { return state().refusal.c_str(); }

// ---- what the extensions say of themselves when they are loaded
// -------------------------------------------------------

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                   int*) {
  state().kernels[host].name = name;
}

// Of launches with <<<>>>, which our code does not have: nvcc's stubs name them.
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
EXPORT unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return cudaErrorNotSupported; }

// ---- the runtime
// ------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetDevice(int* number) {
  *number = state().current;
  return cudaSuccess;
}

// Where torch is a CUDA build, it asks for these before it says which stream is current.
EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = std::max<int>(1, state().devices.size());
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number < 0 || number >= int(state().devices.size()))
    return refuse(cudaErrorInvalidDevice, "there is no device " + std::to_string(number));
  const Device& d = state().devices[number];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.minor;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = d.sms;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.smem_per_block;
      return cudaSuccess;
    default:
      return refuse(cudaErrorInvalidValue, "device attribute " + std::to_string(int(attribute)) + " is not known here");
  }
}

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = state().kernels.find(function);
  if (found == state().kernels.end()) return refuse(cudaErrorInvalidDeviceFunction, "attribute of no kernel");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return refuse(cudaErrorInvalidValue, "function attribute " + std::to_string(int(attribute)) + " is not known here");
  if (value < 0 || value > device().smem_per_block)
    return refuse(cudaErrorInvalidValue, "a block has at most " + std::to_string(device().smem_per_block) +
                                             " bytes of shared memory, asked for " + std::to_string(value));
  found->second.smem_opted_in = value;
  return cudaSuccess;
}

// By shared memory and threads; registers are not known here, so a real device may hold fewer.
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                          int threads, size_t smem_bytes, unsigned) {
  const auto found = state().kernels.find(function);
  if (found == state().kernels.end()) return refuse(cudaErrorInvalidDeviceFunction, "occupancy of no kernel");
  *blocks = 0;
  if (int(smem_bytes) > found->second.smem_opted_in) return cudaSuccess;
  const int by_smem = device().smem_per_sm / (int(smem_bytes) + device().smem_reserved);
  const int by_threads = device().threads_per_sm / threads;
  *blocks = by_smem < by_threads ? by_smem : by_threads;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                                 size_t smem_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, smem_bytes, 0);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  const auto found = state().kernels.find(function);
  if (found == state().kernels.end()) return refuse(cudaErrorInvalidDeviceFunction, "launch of no kernel");
  const Kernel& kernel = found->second;
  const auto known = state().facts.find(kernel.name);
  if (known == state().facts.end())
    return refuse(cudaErrorInvalidDeviceFunction, "no PTX was learned for " + kernel.name);
  const Facts& facts = known->second;
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + list({grid.x, grid.y, grid.z}));
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!threads || threads > 1024 || int(threads) > facts.max_threads)
    return refuse(cudaErrorInvalidConfiguration, "a block of " + std::to_string(threads) + " threads; " + kernel.name +
                                                     " has at most " + std::to_string(facts.max_threads));
  if (config->dynamicSmemBytes > size_t(kernel.smem_opted_in))
    return refuse(cudaErrorInvalidValue, std::to_string(config->dynamicSmemBytes) +
                                             " bytes of shared memory; opted in to " +
                                             std::to_string(kernel.smem_opted_in));
  Attributes attributes;
  if (const cudaError_t e = read_attributes(*config, attributes)) return e;
  const dim3& cluster = attributes.cluster;
  if (!cluster.x || !cluster.y || !cluster.z || cluster.x * cluster.y * cluster.z > 8 || grid.x % cluster.x ||
      grid.y % cluster.y || grid.z % cluster.z)
    return refuse(cudaErrorInvalidClusterSize, "clusters of " + list({cluster.x, cluster.y, cluster.z}));

  std::string params;
  for (size_t i = 0; i < facts.param_bytes.size(); ++i)
    params += (i ? ", \"" : "\"") + hex(args[i], facts.param_bytes[i]) + "\"";
  state().log += "{\"kernel\": \"" + kernel.name + "\", \"grid\": " + list({grid.x, grid.y, grid.z}) +
                 ", \"block\": " + list({block.x, block.y, block.z}) +
                 ", \"cluster\": " + list({cluster.x, cluster.y, cluster.z}) +
                 ", \"smem_bytes\": " + std::to_string(config->dynamicSmemBytes) +
                 ", \"programmatic\": " + (attributes.programmatic ? "true" : "false") + ", \"params\": [" + params +
                 "]}\n";
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = state().last_error;
  state().last_error = cudaSuccess;
  return error;
}
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : state().refusal.c_str();
}

// ---- the one function of the driver
// -----------------------------------------------------------------------------------

// Also called by itself, by the tests of its checks.
EXPORT CUresult fake_encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                  const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                  const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                  CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                  CUtensorMapFloatOOBfill fill) {
  mxfp4_moe::TensorMap made;
  state().refusal = mxfp4_moe::encode_tiled(made, type, rank, address, extents, strides, box, element_strides,
                                            interleave, swizzle, promotion, fill, reinterpret_cast<uintptr_t>(map));
  if (!state().refusal.empty()) return CUDA_ERROR_INVALID_VALUE;
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

namespace {
cudaError_t entry_point(const char* symbol, void** function, cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&fake_encode_tiled) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}  // namespace

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  return entry_point(symbol, function, found);
}
