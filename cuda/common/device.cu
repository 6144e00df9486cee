// Facts about the current device.
#include <array>
#include <cstdlib>
#include <mutex>

#include "common/launch.cuh"
#include "sparse24/device.h"

namespace sparse24::cuda {
namespace {

struct Known {
  DeviceInfo info;
  DeviceModel model;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// The multiprocessors that kernels leave to others, which sm_count lacks. A persistent kernel has one CTA on each of
// its own from its first tile to its last: where collectives hold some, its last CTAs would begin when the others are
// done.
int margin(int multiprocessors) {
  const char* text = std::getenv("SPARSE24_SM_MARGIN");
  if (text == nullptr || *text == 0) return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  check(*end == 0 && value >= 0 && value <= multiprocessors - 2,
        "sparse24: expected SPARSE24_SM_MARGIN to be from 0 to ", multiprocessors - 2, ", got ", text);
  return int(value);
}

Known read(int device) {
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  const int multiprocessors = properties.multiProcessorCount;
  // An even number: clusters have two CTAs, and CUTLASS's scheduler would make a grid that they do not divide.
  DeviceFacts facts{properties.name, (multiprocessors - margin(multiprocessors)) / 2 * 2};
  facts.clock_mhz = attribute(cudaDevAttrClockRate, device) / 1e3;
  // Both edges of the clock, in kHz; width in bits.
  facts.memory_tb_s = 2.0 * attribute(cudaDevAttrMemoryClockRate, device) * properties.memoryBusWidth / 8 * 1e-9;
  facts.l2_bytes = properties.l2CacheSize;
  return {{facts.sm_count, 10 * properties.major + properties.minor}, find_device(facts)};
}

// Makes the device's context current in this thread. A thread that has not called the runtime yet, such as one of
// autograd's whose memory all came from the allocator's cache, has none, and then the driver refuses to encode a tensor
// map. Every op asks for facts of the device before it does.
void use_context(int device) {
  thread_local int used = -1;
  if (used == device) return;
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  used = device;
}

// Of the current device, read once.
Known known_device() {
  static std::mutex mutex;
  static std::array<Known, 64> known{};
  const int device = current_device();
  use_context(device);
  check(device < int(known.size()), "sparse24: expected a device index below ", known.size(), ", got ", device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[device].info.sm_count == 0) known[device] = read(device);
  return known[device];
}

}  // namespace

DeviceInfo device_info() { return known_device().info; }
DeviceModel device_model() { return known_device().model; }

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
