// Activations of bfloat16 as float16, for products with float8 weights, which become float16 in one instruction a pair.
//
// Eight significant bits fit float16, the exponents do not: a token is scaled by a power of two that brings its
// greatest value to [2^15, 2^16). What is then below 2^-17 may lose bits: those are a rest, 2^40 times as fine, whose
// products are added apart. It is rare, so rests cost a branch.
#pragma once

#include "few_tokens/mma.cuh"
#include "few_tokens/weights.cuh"

namespace sparse24::cuda {

// Whether activations of T have to be scaled for weights of W; and the type of the products.
template <class T, class W>
inline constexpr bool kScaled = sizeof(W) == 1 && std::is_same_v<T, __nv_bfloat16>;
template <class T, class W>
using ProductOf = std::conditional_t<sizeof(W) == 1, __half, T>;

inline constexpr float kRestScale = 0x1p40f, kRestUnit = 0x1p-40f;

// The greater of `most` and the finite magnitudes of a pair, as bits of bfloat16.
__device__ __forceinline__ uint32_t most_of(uint32_t most, uint32_t pair) {
  const uint32_t low = pair & 0x7fffu, high = pair >> 16 & 0x7fffu;
  if (low < 0x7f80u) most = max(most, low);
  if (high < 0x7f80u) most = max(most, high);
  return most;
}
// Powers of two whose product is one: for a token whose greatest value has these bits.
__device__ __forceinline__ float scale_of(uint32_t most) {
  return __uint_as_float(uint32_t(min(269 - int(most >> 7), 253)) << 23);
}
__device__ __forceinline__ float unscale_of(uint32_t most) {
  return __uint_as_float(uint32_t(max(int(most >> 7) - 15, 1)) << 23);
}

// The float16 of v, or of its rest number `rest`; says whether there is a further rest.
__device__ __forceinline__ float half_of(float v, int rest, bool& more) {
  float half = __half2float(__float2half_rn(v));
  for (int i = 0;; ++i) {
    const float left = v - half;  // exact; NaN where v is not finite
    const bool some = left == left && left != 0.f;
    if (i == rest) {
      more |= some;
      return half;
    }
    v = some ? left * kRestScale : 0.f;
    half = __half2float(__float2half_rn(v));
  }
}
// Of a pair of bfloat16.
__device__ __forceinline__ uint32_t halves_of(uint32_t pair, float scale, int rest, bool& more) {
  const float2 v = widen2(__nv_bfloat16{}, pair);
  const float low = half_of(v.x * scale, rest, more), high = half_of(v.y * scale, rest, more);
  return pack2(__half{}, low, high);
}

// The products with all rests of two pairs of activations.
inline __device__ __noinline__ float4 rest_products(uint4 a, uint32_t pair0, uint32_t pair1, float scale) {
  const uint32_t fragment[4] = {a.x, a.y, a.z, a.w};
  float4 sum{0.f, 0.f, 0.f, 0.f};
  bool more = true;
  float unit = kRestUnit;
  for (int rest = 1; __any_sync(0xffffffffu, more); ++rest, unit *= kRestUnit) {
    more = false;
    const uint32_t b0 = halves_of(pair0, scale, rest, more), b1 = halves_of(pair1, scale, rest, more);
    float c[4] = {};
    multiply(__half{}, c, fragment, b0, b1);
    sum.x = __fmaf_rn(c[0], unit, sum.x);
    sum.y = __fmaf_rn(c[1], unit, sum.y);
    sum.z = __fmaf_rn(c[2], unit, sum.z);
    sum.w = __fmaf_rn(c[3], unit, sum.w);
  }
  return sum;
}
__device__ __forceinline__ void add_rests(float (&c)[4], const uint32_t (&a)[4], uint32_t pair0, uint32_t pair1,
                                          float scale) {
  const float4 sum = rest_products({a[0], a[1], a[2], a[3]}, pair0, pair1, scale);
  c[0] += sum.x;
  c[1] += sum.y;
  c[2] += sum.z;
  c[3] += sum.w;
}

}  // namespace sparse24::cuda
