// What the epilogues of the first GEMM share: the pre-activation h of the accumulators, and statistics of y.
#pragma once

#include "epilogue_base.cuh"
#include "sparse24/linear.h"
#include "vocabulary.cuh"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct HiddenParams {
  int rows, cols;  // of h
  const float* scale_x;
  const float* scale_w;
  const void* bias;  // of the hidden type
  const float* scale_y;
  float* amax;
  int32_t* saturated;
  int scale_x_stride;  // 0: one element, 1: one per row
  int scale_w_stride;
  int scale_y_stride;

  static HiddenParams of(const LinearArgs& args) {
    return {int(args.tokens),    int(args.out), args.scale_x,   args.scale_w,         args.bias,
            args.scale_y,        args.amax,     args.saturated, args.scale_x_per_row, args.scale_w_per_row,
            args.scale_y_per_row};
  }

  // Scales and biases of columns n + 8 b + c; those beyond the last take its own, their accumulators being zero or
  // never stored. The loads of 32 columns come together: only two warps share a scheduler, and hide little.
  template <class T>
  __device__ __forceinline__ void load_columns(int n, float (&scale)[4][2], float (&shift)[4][2]) const {
    const auto each = [&](float (&to)[4][2], auto load) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
#pragma unroll
        for (int c = 0; c < 2; ++c) to[b][c] = load(n + 8 * b + c);
      }
    };
    each(scale, [](int) { return 1.f; });
    each(shift, [](int) { return 0.f; });
    if (scale_w) each(scale, [&](int column) { return scale_w[min(column, cols - 1) * scale_w_stride]; });
    if (bias) {
      each(shift, [&](int column) { return column < cols ? float(static_cast<const T*>(bias)[column]) : 0.f; });
    }
  }
  __device__ __forceinline__ float row_scale_x(int m) const {
    return scale_x && m < rows ? scale_x[m * scale_x_stride] : 1.f;
  }
  __device__ __forceinline__ float row_inverse_scale_y(int m) const {
    return scale_y && m < rows ? __frcp_rn(scale_y[m * scale_y_stride]) : 1.f;
  }
};

// Running statistics of a thread. y is not negative, so its bits order like integers; fmaxf drops NaN.
struct HiddenStatistics {
  float amax = 0.f;
  int saturated = 0;

  // The inverse scale is 0 where y is not scaled, and cannot saturate.
  __device__ __forceinline__ void see(float y, float inverse_scale) {
    amax = fmaxf(amax, y);
    saturated += y * inverse_scale > 448.f;
  }
  __device__ __forceinline__ void collect(const HiddenParams& p) const {
    if (p.amax) {
      const float v = warp_max(amax);
      if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<int*>(p.amax), __float_as_int(v));
    }
    if (p.saturated) {
      const int n = __reduce_add_sync(0xffffffffu, saturated);
      if (threadIdx.x % 32 == 0 && n > 0) atomicAdd(p.saturated, n);
    }
  }
};

}  // namespace sparse24::cuda
