// What is asked of the driver once per device, and then known.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace mxfp4_moe {

// A positive number of each device. Threads that ask at once write the same value.
class PerDevice {
 public:
  // The device's number, on first use that which ask() returns; 0, for none, is not kept.
  template <class Ask>
  int get(int device, const Ask& ask) {
    if (device < 0 || device >= kMaxDevices) return ask();
    int number = known_[device].load(std::memory_order_relaxed);
    if (number == 0) {
      number = ask();
      known_[device].store(number, std::memory_order_relaxed);
    }
    return number;
  }

 private:
  static constexpr int kMaxDevices = 64;  // beyond, the driver is asked every time
  std::atomic<int> known_[kMaxDevices] = {};
};

// 9 for SM90, 12 for SM120 and SM121; 0 when the driver does not say.
inline int compute_capability_major(int device) {
  static PerDevice known;
  return known.get(device, [device] {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess) return major;
    cudaGetLastError();
    return 0;
  });
}

}  // namespace mxfp4_moe
