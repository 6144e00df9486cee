/// @file
/// linear_relu2_gradient_fp8: linear_gradient_fp8 of an activation that is dense, in the natural order of tokens.
#pragma once

#include "sparse24/linear_gradient.h"
#include "sparse24/quantize.h"

namespace sparse24 {

/// grad [tokens, in] with rows `ld_grad` apart, w [features, in] row-major and contiguous; y and dh [tokens, features],
/// all e4m3. Formulas, scales and statistics are those of LinearGradientFp8Args.
struct LinearRelu2GradientFp8Args {
  int64_t tokens, in, features;  ///< on the GPU features are a multiple of 16
  const void* grad;
  int64_t ld_grad;  ///< on the GPU rows are 16-byte aligned
  const void* w;
  const float *scale_grad, *scale_w, *scale_y, *scale_dh;
  const void* y;
  void* dh;
  void *y_transposed, *dh_transposed;  ///< [features, ld_transposed()], zeros from `tokens` on
  const void* grad_tail;               ///< as LinearGradientArgs::grad_tail, in the natural order
  float* amax;
  int32_t* saturated;

  static constexpr bool interleaved = false;
  int64_t ld_transposed() const { return round_up(tokens, token_padding(DType::kFloat8E4M3)); }
};

namespace cpu {
void linear_relu2_gradient_fp8(const LinearRelu2GradientFp8Args& args);
}  // namespace cpu

namespace cuda {
/// Chooses a configuration for the current device.
void linear_relu2_gradient_fp8(const LinearRelu2GradientFp8Args& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
