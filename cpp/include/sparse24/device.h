/// @file
/// What was built, and what the current device is.
#pragma once

#include <cstdint>
#include <string>

#include "sparse24/device_model.h"

namespace sparse24 {

/// Facts fixed at compile time.
struct BuildInfo {
  const char* version;
  bool cuda;                 ///< kernels were compiled
  const char* cuda_archs;    ///< "90a", or "" without kernels
  const char* cuda_version;  ///< of nvcc, or ""
  const char* cutlass;       ///< version of the headers, or ""
  const char* compiler;      ///< of the host code
  const char* torch_target;  ///< oldest torch that loads the op library, "2.10"
};
BuildInfo build_info();

namespace cuda {

struct DeviceInfo {
  int sm_count;
  int capability;  ///< 90 for compute capability 9.0
};
/// Returns what is known of the current device; it is asked once for each device.
DeviceInfo device_info();
DeviceModel device_model();

/// Returns the bytes of the current device that no process uses. It throws after an error from which the device does
/// not recover.
int64_t free_memory();

/// Throws unless the current device can run the kernels of this build: "op: built for sm_90a, this device is sm_86".
void check_architecture(const char* op);

}  // namespace cuda
}  // namespace sparse24
