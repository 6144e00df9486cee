/// @file
/// Host memory between two guard zones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sparse24::emulate {

/// Bytes that start as 0xFF, a NaN in every format, and so do the zones on both sides: what reads there poisons its
/// result, what writes there is found by `intact`. Aligned as device memory is.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : bytes_(bytes), all_(bytes + 2 * kGuard + kAlignment, 0xFF) {}

  template <class T = void>
  T* data() {
    return reinterpret_cast<T*>(all_.data() + begin());
  }
  int64_t bytes() const { return bytes_; }
  bool intact() const {
    const auto ff = [](uint8_t byte) { return byte == 0xFF; };
    return std::all_of(all_.begin(), all_.begin() + begin(), ff) &&
           std::all_of(all_.begin() + begin() + bytes_, all_.end(), ff);
  }

 private:
  static constexpr int64_t kGuard = 4096, kAlignment = 256;
  int64_t begin() const {
    const auto start = reinterpret_cast<uintptr_t>(all_.data()) + kGuard;
    return kGuard + static_cast<int64_t>((kAlignment - start % kAlignment) % kAlignment);
  }

  int64_t bytes_;
  std::vector<uint8_t> all_;
};

}  // namespace sparse24::emulate
