/// @file
/// Device memory between two guard zones, and the fixture of tests that need a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "support/array.h"

namespace sparse24::test {

inline void cuda_check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

/// Bytes on the device. They start as 0xFF, a NaN in every format, and so do the zones on both sides: what reads there
/// poisons its result, what writes there is found by `guards_intact`.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t bytes) : bytes_(bytes) {
    cuda_check(cudaMalloc(reinterpret_cast<void**>(&base_), bytes + 2 * kGuard));
    cuda_check(cudaMemset(base_, 0xFF, bytes + 2 * kGuard));
  }
  DeviceBuffer(const void* host, int64_t bytes) : DeviceBuffer(bytes) {
    if (bytes) cuda_check(cudaMemcpy(base_ + kGuard, host, bytes, cudaMemcpyHostToDevice));
  }
  explicit DeviceBuffer(const Array& array) : DeviceBuffer(array.data(), array.bytes()) {}
  template <class T>
  explicit DeviceBuffer(const std::vector<T>& v) : DeviceBuffer(v.data(), static_cast<int64_t>(v.size() * sizeof(T))) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(base_); }

  template <class T = void>
  T* data() {
    return reinterpret_cast<T*>(base_ + kGuard);
  }

  template <class T = uint8_t>
  std::vector<T> to_host() const {
    std::vector<T> out(bytes_ / sizeof(T));
    if (bytes_) cuda_check(cudaMemcpy(out.data(), base_ + kGuard, bytes_, cudaMemcpyDeviceToHost));
    return out;
  }
  void to_host(Array& array) const {
    if (bytes_) cuda_check(cudaMemcpy(array.data(), base_ + kGuard, bytes_, cudaMemcpyDeviceToHost));
  }

  bool guards_intact() const {
    std::vector<uint8_t> zones(2 * kGuard);
    cuda_check(cudaMemcpy(zones.data(), base_, kGuard, cudaMemcpyDeviceToHost));
    cuda_check(cudaMemcpy(zones.data() + kGuard, base_ + kGuard + bytes_, kGuard, cudaMemcpyDeviceToHost));
    return std::all_of(zones.begin(), zones.end(), [](uint8_t byte) { return byte == 0xFF; });
  }

 private:
  static constexpr int64_t kGuard = 4096;
  int64_t bytes_;
  uint8_t* base_ = nullptr;
};

/// Skips, visibly, without a device; otherwise gives a stream that does not wait for the default one.
class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device";
    cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_) cuda_check(cudaStreamDestroy(stream_));
  }
  void synchronize() { cuda_check(cudaStreamSynchronize(stream_)); }
  /// Makes what was written on the default stream visible to `stream_`.
  void uploads_done() { cuda_check(cudaDeviceSynchronize()); }

  cudaStream_t stream_ = nullptr;
};

/// First index where two vectors differ, -1 if they are equal.
template <class T>
int64_t first_difference(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return 0;
  const auto [at, end] = std::mismatch(a.begin(), a.end(), b.begin());
  (void)end;
  return at == a.end() ? -1 : at - a.begin();
}

}  // namespace sparse24::test
