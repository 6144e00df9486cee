/// @file
/// Host twins of the functions of cuda/ that are inline PTX, which only nvcc compiles.
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "emulator/intrinsics.h"

namespace sparse24::cuda {

// ---- common/bits.cuh, common/activation.cuh
// --------------------------------------------------------------------------------------------------

/// prmt.b32. Selectors from 8 on would replicate signs.
inline uint32_t permute_bytes(uint32_t lo, uint32_t hi, uint32_t selector) {
  if (selector & 0x8888u) throw std::runtime_error("expected a byte selector below 8");
  return __byte_perm(lo, hi, selector);
}

/// shf.l.wrap.b32 of zeros and w.
inline uint32_t shift_left(uint32_t w, uint32_t shift) { return w << (shift & 31); }

/// prmt.b32 with selectors that replicate the signs of bytes 1 and 3.
inline uint32_t spread_signs(uint32_t w) { return (w & 0x8000u ? 0xFFFFu : 0u) | (w >> 31 ? 0xFFFF0000u : 0u); }

/// prmt.b32 with selectors that replicate the signs of all bytes.
inline uint32_t spread_signs_of_bytes(uint32_t w) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) out |= w >> (i + 7) & 1 ? 0xFFu << i : 0;
  return out;
}

/// min.NaN.f32, which makes NaN canonical.
inline float min_or_nan(float x, float y) {
  return std::isnan(x) || std::isnan(y) ? __uint_as_float(0x7fffffffu) : std::min(x, y);
}

/// max.NaN.f32 with 0, which makes NaN canonical and of the zeros takes the positive one.
inline float relu(float x) { return std::isnan(x) ? __uint_as_float(0x7fffffffu) : x > 0.f ? x : 0.f; }

template <class Pair>
uint32_t bits_of(const Pair& pair) {
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}
/// cvt.rn.relu.bf16x2.f32 and cvt.rn.relu.f16x2.f32, which make NaN canonical and give no negative zero.
inline uint32_t pack2_relu(__nv_bfloat16, float lo, float hi) {
  return bits_of(__floats2bfloat162_rn(relu(lo), relu(hi)));
}
inline uint32_t pack2_relu(__half, float lo, float hi) { return bits_of(__floats2half2_rn(relu(lo), relu(hi))); }

// ---- common/packed.cuh
// -------------------------------------------------------------------------------------------------------

inline void store4_if(bool condition, void* p, uint32_t w) {
  if (condition) std::memcpy(p, &w, sizeof w);
}
inline void store16_if(bool condition, void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t w[] = {a, b, c, d};
  if (condition) std::memcpy(p, w, sizeof w);
}

// ---- epilogues/derivative.cuh
// --------------------------------------------------------------------------------------------------

/// The best approximation; rsqrt.approx.ftz is another, and what corrects either gives the nearest root.
inline void hold(float&) {}
inline float approximate_inverse_root(float x) { return x < 0x1p-126f ? INFINITY : 1 / std::sqrt(x); }

// ---- epilogues/gradient.cuh
// --------------------------------------------------------------------------------------------------

inline void compiler_fence() {}
inline int lane_of_tile() { return int(threadIdx.x % 32); }

// ---- common/warp.cuh
// --------------------------------------------------------------------------------------------------------

/// movmatrix.m8n8.trans.b16: lane 4 r + q holds columns 2q and 2q + 1 of row r, before and after.
inline uint32_t transpose_8x8(uint32_t fragment) {
  const auto& lanes = emulate::Block::current().exchange("movmatrix.trans", 0, fragment);
  const unsigned r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const auto element = [&](unsigned row, unsigned column) {
    return lanes[4 * row + column / 2] >> 16 * (column % 2) & 0xFFFF;
  };
  return element(2 * q, r) | element(2 * q + 1, r) << 16;
}

}  // namespace sparse24::cuda
