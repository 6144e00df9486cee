/// @file
/// bfloat16, float16 and float8_e4m3fn to and from fp32, bit for bit what the hardware's conversions give.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse24/types.h"

namespace sparse24 {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline constexpr uint32_t kSignBit = 0x80000000u;
inline constexpr uint32_t kInfinityBits = 0x7F800000u;
/// NaN has the largest code, so that it also compares as the largest magnitude.
inline constexpr uint32_t kNanKey = 0x7FFFFFFFu;

inline bool is_nan_bits(uint32_t bits) { return (bits & ~kSignBit) > kInfinityBits; }

/// What stands for NaN in each type: the result of the hardware's narrowing conversions and of its fp32 multiply.
inline constexpr uint32_t kNanFloat32 = 0x7FC00000u;
inline constexpr uint16_t kNan16 = 0x7FFF;
inline constexpr uint8_t kNanE4M3 = 0x7F;

/// Rounds the finite magnitude `bits` (fp32, sign cleared) to a narrower format, to nearest even.
///
/// A number that overflows carries into the codes above the largest finite one, in order; the caller clamps it.
template <int kMantissaBits, int kBias>
uint32_t round_magnitude(uint32_t bits) {
  constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
  constexpr uint32_t kSmallestNormal = kRebias + (1u << 23);
  if (bits < kSmallestNormal) {
    // A number whose last mantissa bit weighs as much as the last bit of the narrow subnormals: adding it rounds there.
    constexpr uint32_t kAligner = static_cast<uint32_t>(127 + 23 + 1 - kBias - kMantissaBits) << 23;
    return bits_of(float_of(bits) + float_of(kAligner)) - kAligner;
  }
  constexpr int kDropped = 23 - kMantissaBits;
  const uint32_t rebased = bits - kRebias;
  const uint32_t odd = (rebased >> kDropped) & 1;
  return (rebased + (1u << (kDropped - 1)) - 1 + odd) >> kDropped;
}

/// Returns the float of a magnitude code that is neither NaN nor infinite.
template <int kMantissaBits, int kBias>
float widen_magnitude(uint32_t code) {
  if (code < (1u << kMantissaBits)) {
    constexpr uint32_t kSubnormalUnit = static_cast<uint32_t>(127 + 1 - kBias - kMantissaBits) << 23;
    return static_cast<float>(code) * float_of(kSubnormalUnit);
  }
  return float_of((code << (23 - kMantissaBits)) + (static_cast<uint32_t>(127 - kBias) << 23));
}

inline float bfloat16_to_float(uint16_t code) { return float_of(static_cast<uint32_t>(code) << 16); }

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (is_nan_bits(bits)) return kNan16;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float float16_to_float(uint16_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x8000) << 16;
  const uint32_t magnitude = code & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of(sign | kInfinityBits | (magnitude & 0x3FF) << 13);
  return float_of(sign | bits_of(widen_magnitude<10, 15>(magnitude)));
}

inline uint16_t float_to_float16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & ~kSignBit;
  if (magnitude > kInfinityBits) return kNan16;
  const uint32_t code = magnitude >= kInfinityBits ? 0x7C00 : round_magnitude<10, 15>(magnitude);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (code < 0x7C00 ? code : 0x7C00));
}

inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t magnitude = code & 0x7F;
  if (magnitude == kNanE4M3) return float_of(sign | kNanFloat32);
  return float_of(sign | bits_of(widen_magnitude<3, 7>(magnitude)));
}

/// Saturates: every magnitude beyond 448, infinity included, becomes 448 with its sign.
inline uint8_t float_to_e4m3(float x) {
  constexpr uint32_t kLargest = 0x7E;
  const uint32_t bits = bits_of(x), magnitude = bits & ~kSignBit;
  if (magnitude > kInfinityBits) return kNanE4M3;
  const uint32_t code = magnitude >= kInfinityBits ? kLargest : round_magnitude<3, 7>(magnitude);
  return static_cast<uint8_t>((bits >> 24 & 0x80) | (code < kLargest ? code : kLargest));
}

/// One element type: what is stored, and how it widens and rounds.
struct Float32 {
  using Storage = float;
  static float load(float x) { return x; }
  static float round(float x) { return is_nan_bits(bits_of(x)) ? float_of(kNanFloat32) : x; }
};
struct Float16 {
  using Storage = uint16_t;
  static float load(uint16_t code) { return float16_to_float(code); }
  static uint16_t round(float x) { return float_to_float16(x); }
};
struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t code) { return bfloat16_to_float(code); }
  static uint16_t round(float x) { return float_to_bfloat16(x); }
};
struct E4M3 {
  using Storage = uint8_t;
  static float load(uint8_t code) { return e4m3_to_float(code); }
  static uint8_t round(float x) { return float_to_e4m3(x); }
};

/// Calls `function` with the element type that `dtype` names.
template <class Function>
decltype(auto) visit_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32: return function(Float32{});
    case DType::kFloat16: return function(Float16{});
    case DType::kBFloat16: return function(BFloat16{});
    case DType::kFloat8E4M3: break;
  }
  return function(E4M3{});
}

}  // namespace sparse24
