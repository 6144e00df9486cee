/// @file
/// A typed host array whose numbers are decoded from the definition of each format, not with the core's conversions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "sparse24/types.h"

namespace sparse24::test {

/// The fields of a floating-point format.
struct Format {
  int exponent_bits, mantissa_bits;
  uint32_t first_special;  ///< first positive code that is not finite
};

inline Format format_of(DType t) {
  switch (t) {
    case DType::kFloat32: return {8, 23, 0x7F800000};
    case DType::kFloat16: return {5, 10, 0x7C00};
    case DType::kBFloat16: return {8, 7, 0x7F80};
    case DType::kFloat8E4M3: return {4, 3, 0x7F};
  }
  return {};
}

/// Number with the given code. Infinity decodes as the power of two above the largest finite number.
inline double decode(DType t, uint32_t code) {
  const Format f = format_of(t);
  const uint32_t sign_bit = 1u << (f.exponent_bits + f.mantissa_bits);
  const uint32_t magnitude = code & (sign_bit - 1);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(magnitude >> f.mantissa_bits);
  const double fraction = std::ldexp(magnitude & ((1u << f.mantissa_bits) - 1), -f.mantissa_bits);
  const bool nan = t == DType::kFloat8E4M3 ? magnitude == f.first_special : magnitude > f.first_special;
  double v = exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
  if (nan) v = std::nan("");
  return code & sign_bit ? -v : v;
}

/// Code of the nearest number, ties to the even code; e4m3 saturates, the others overflow to infinity.
inline uint32_t encode(DType t, double v) {
  const Format f = format_of(t);
  const uint32_t sign = std::signbit(v) ? 1u << (f.exponent_bits + f.mantissa_bits) : 0;
  const double magnitude = std::fabs(v);
  if (std::isnan(v)) return t == DType::kFloat8E4M3 ? 0x7F : f.first_special | f.first_special >> 1;
  // Positive codes increase with their numbers: search for the last one that is not above v.
  const bool saturates = t == DType::kFloat8E4M3;
  uint32_t low = 0, high = saturates ? f.first_special - 1 : f.first_special;
  while (low < high) {
    const uint32_t middle = low + (high - low + 1) / 2;
    if (decode(t, middle) <= magnitude) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low == (saturates ? f.first_special - 1 : f.first_special)) return sign | low;
  const double below = magnitude - decode(t, low), above = decode(t, low + 1) - magnitude;
  return sign | (below < above || (below == above && low % 2 == 0) ? low : low + 1);
}

/// n numbers of one dtype. Fresh ones hold 0xFF, a NaN in every format.
class Array {
 public:
  Array(DType dtype, int64_t n) : dtype_(dtype), size_(n), bytes_(n * size_of(dtype), 0xFF) {}
  Array(DType dtype, const std::vector<double>& numbers) : Array(dtype, static_cast<int64_t>(numbers.size())) {
    for (int64_t i = 0; i < size_; ++i) set(i, numbers[i]);
  }

  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return static_cast<int64_t>(bytes_.size()); }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }

  uint32_t code(int64_t i) const {
    uint32_t c = 0;
    std::memcpy(&c, bytes_.data() + i * size_of(dtype_), size_of(dtype_));  // little endian
    return c;
  }
  void set_code(int64_t i, uint32_t c) { std::memcpy(bytes_.data() + i * size_of(dtype_), &c, size_of(dtype_)); }
  double operator[](int64_t i) const { return decode(dtype_, code(i)); }
  void set(int64_t i, double v) { set_code(i, encode(dtype_, v)); }

  std::vector<double> numbers() const {
    std::vector<double> out(size_);
    for (int64_t i = 0; i < size_; ++i) out[i] = (*this)[i];
    return out;
  }
  std::vector<uint32_t> codes() const {
    std::vector<uint32_t> out(size_);
    for (int64_t i = 0; i < size_; ++i) out[i] = code(i);
    return out;
  }
  /// Index of the first element whose bits differ in `other`, -1 if there is none.
  int64_t first_difference(const Array& other) const {
    if (dtype_ != other.dtype_ || size_ != other.size_) return 0;
    const auto at = std::mismatch(bytes_.begin(), bytes_.end(), other.bytes_.begin()).first;
    return at == bytes_.end() ? -1 : (at - bytes_.begin()) / size_of(dtype_);
  }

 private:
  DType dtype_;
  int64_t size_;
  std::vector<uint8_t> bytes_;
};

/// Random numbers that make every rule of the selection matter: zeros of both signs, ties, a few NaN and infinities.
inline Array random_activations(DType dtype, int64_t n, uint64_t seed, bool specials = true) {
  constexpr int64_t kPeriod = 65537;  // prime, so that no two rows are alike; long inputs repeat
  std::mt19937_64 random(seed);
  Array x(dtype, n);
  for (int64_t i = 0; i < n; ++i) {
    if (i >= kPeriod) {
      x.set_code(i, x.code(i - kPeriod));
      continue;
    }
    const uint64_t r = random();
    const double wide =
        (static_cast<double>(r >> 40) / (1 << 24) - 0.5) * std::ldexp(1.0, static_cast<int>(r % 11) - 5);
    switch ((r >> 8) % 16) {
      case 0: x.set(i, -0.0); break;
      case 1:
      case 2:
      case 3: x.set(i, 0); break;
      case 4: x.set(i, 1); break;
      case 5: x.set(i, -1); break;
      default: x.set(i, wide);
    }
    if (specials && (r >> 16) % 256 == 0) x.set(i, std::nan(""));
    if (specials && (r >> 16) % 256 == 1) x.set(i, r % 2 ? INFINITY : -INFINITY);
  }
  return x;
}

/// Integers from -limit to limit: products and sums of them are exact, so every summation order gives the same bits.
inline Array random_integers(DType dtype, int64_t n, int limit, uint64_t seed) {
  std::mt19937_64 random(seed);
  Array x(dtype, n);
  for (int64_t i = 0; i < n; ++i) x.set(i, static_cast<double>(random() % (2 * limit + 1)) - limit);
  return x;
}

}  // namespace sparse24::test
