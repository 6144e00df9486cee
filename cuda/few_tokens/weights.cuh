// Weights as they lie in registers: to float32, and to the 16-bit type of the activations.
#pragma once

#include <cuda_fp8.h>

#include "common/packed.cuh"

namespace sparse24::cuda {

__device__ __forceinline__ float2 widen2(__nv_bfloat16, uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ __forceinline__ float2 widen2(__half, uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Two e4m3 values, the first in the low byte, to a pair of float16: exact, NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3x2_to_half2(uint16_t codes) {
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
  return pair;
}
// The same to a pair of T.
__device__ __forceinline__ uint32_t e4m3x2_to_pair(__half, uint16_t codes) { return e4m3x2_to_half2(codes); }
__device__ __forceinline__ uint32_t e4m3x2_to_pair(__nv_bfloat16 t, uint16_t codes) {
  const float2 v = widen2(__half{}, e4m3x2_to_half2(codes));
  return pack2(t, v.x, v.y);
}

// kCount consecutive elements of W, in 32-bit words, to float32.
template <class W, int kCount>
__device__ __forceinline__ void widen(const uint32_t* words, float (&out)[kCount]) {
  if constexpr (sizeof(W) == 2) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 v = widen2(W{}, words[i]);
      out[2 * i] = v.x;
      out[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 v = widen2(__half{}, e4m3x2_to_half2(uint16_t(i % 2 ? words[i / 2] >> 16 : words[i / 2])));
      out[2 * i] = v.x;
      out[2 * i + 1] = v.y;
    }
  }
}

}  // namespace sparse24::cuda
