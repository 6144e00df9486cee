// What every launcher needs: checked CUDA calls and grid arithmetic.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "sparse24/error.h"
#include "sparse24/types.h"

namespace sparse24::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail("sparse24: ", what, " failed: ", cudaGetErrorString(status));
}

// A kernel launch reports bad configurations here; errors inside the kernel surface at the next synchronisation.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Raises the dynamic shared memory limit of a kernel, once per device.
template <auto Kernel>
void allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> done{0};
  const int device = current_device();
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (done.load(std::memory_order_acquire) & bit) return;
  check_cuda(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  done.fetch_or(bit, std::memory_order_release);
}

}  // namespace sparse24::cuda
