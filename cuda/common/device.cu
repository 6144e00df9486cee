// Facts about the current device.
#include <array>
#include <mutex>

#include "common/launch.cuh"
#include "sparse24/device.h"

namespace sparse24::cuda {

DeviceInfo device_info() {
  static std::mutex mutex;
  static std::array<DeviceInfo, 64> known{};
  const int device = current_device();
  check(device < int(known.size()), "sparse24: expected a device index below ", known.size(), ", got ", device);
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceInfo& info = known[device];
  if (info.sm_count == 0) {
    int major = 0, minor = 0, sms = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    info = {sms, 10 * major + minor};
  }
  return info;
}

int64_t free_memory() {
  size_t unused = 0, total = 0;
  check_cuda(cudaMemGetInfo(&unused, &total), "cudaMemGetInfo");
  return int64_t(unused);
}

void check_architecture(const char* op) {
  const int capability = device_info().capability;
  check(capability == 90, op, ": built for sm_", build_info().cuda_archs, ", this device is sm_", capability);
}

}  // namespace sparse24::cuda
