// float8_e4m3fn: conversion, and the scale that brings data into its range.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>

#include "sparse24/types.h"

namespace sparse24::cuda {

// Two values to e4m3, rounded to nearest even, saturating; the first in the low byte.
__device__ __forceinline__ uint16_t to_e4m3x2(float lo, float hi) {
  return __nv_cvt_float2_to_fp8x2(make_float2(lo, hi), __NV_SATFINITE, __NV_E4M3);
}

// The dequantising scale of data whose largest finite magnitude is amax; compress.h has the rules.
__device__ __forceinline__ float scale_of(float amax) {
  return amax == 0.f ? 1.f : fmaxf(__fdiv_rn(amax, kLargestE4M3), FLT_MIN);
}

}  // namespace sparse24::cuda
