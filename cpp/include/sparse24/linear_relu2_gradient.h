/// @file
/// linear_relu2_gradient: the backward pass of the second GEMM of the feed-forward network and of the activation before
/// it, where linear_relu2 stored that dense. The dense counterpart of linear_gradient.
///
///     dy = grad @ w           in fp32, rounded to the 16-bit type `hidden_dtype`
///     dh = dy * (2 sqrt(y))   in fp32, rounded once: y = relu(h)^2 has the derivative 2 relu(h)
///
/// Given the same dy it is bit-identical to the product with the root as a step of its own.
#pragma once

#include "sparse24/linear.h"

namespace sparse24 {

/// grad [tokens, in] with rows `ld_grad` apart, w [in, features], y and dh [tokens, features], all row-major and, but
/// for grad, contiguous.
struct LinearRelu2GradientArgs {
  int64_t tokens, in, features;  ///< on the GPU features are a multiple of 8
  const void* grad;
  int64_t ld_grad;  ///< on the GPU rows are 16-byte aligned
  const void* w;
  DType dtype;         ///< of grad and w
  DType hidden_dtype;  ///< what dy is rounded to, and the type of y and dh: dtype, but for tests on the CPU

  const void* y;
  void* dh;
  bool roots = false;  ///< `y` holds relu(h), its own root; on the GPU in float16 alone
};

namespace cpu {
void linear_relu2_gradient(const LinearRelu2GradientArgs& args);
}  // namespace cpu

namespace cuda {
/// Chooses a configuration for the current device.
void linear_relu2_gradient(const LinearRelu2GradientArgs& args, cudaStream_t stream);
/// Runs a configuration of the caller's, for tuning and for tests.
void linear_relu2_gradient(const LinearRelu2GradientArgs& args, const GemmConfig& config, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
