/// @file
/// What the time of a GEMM depends on, of a device: the choice of configurations is a pure function of it.
#pragma once

#include <cstdint>

namespace sparse24 {

struct DeviceModel {
  const char* name;
  int sm_count;
  double sm_tflops;    ///< of one multiprocessor: dense, 16 bits, at the boost clock
  double memory_tb_s;  ///< what the operands of a GEMM are read at, at most
  double l2_bytes;
};

/// What a runtime knows about a device; 0: not known.
struct DeviceFacts {
  const char* name;
  int sm_count;
  double clock_mhz = 0;
  double memory_tb_s = 0;  ///< clock by width
  double l2_bytes = 0;
};

/// The device of the records, with as many multiprocessors as it has, or with another number.
DeviceModel reference_device();
DeviceModel reference_device(int sm_count);

/// The row of heuristics/devices.inc whose name that of the device begins with, with the multiprocessors of the device;
/// of one that has no row what its facts say, and where they are silent the reference device.
DeviceModel find_device(const DeviceFacts& facts);

}  // namespace sparse24
