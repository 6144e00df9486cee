/// @file
/// linear_gradient: the backward pass of the second GEMM of the feed-forward network and of the activation before it,
/// with everything that the sparse GEMMs of the backward pass multiply, in both directions.
///
///     dy = grad @ w           in fp32, rounded to the 16-bit type `hidden_dtype`
///     dh = dy * (2 sqrt(y))   in fp32, at the entries that the forward pass kept of y = relu(h)^2
///
/// Given the same dy all of it is bit-identical to the separate steps: compress_like, the product with the root,
/// decompress, and compress along tokens of both y and dh.
#pragma once

#include "sparse24/linear.h"

namespace sparse24 {

/// One matrix along tokens, as `Operand::of(tokens, features, hidden_dtype, Dim::kTokens)` lays it out.
struct TokenCompressed {
  void* values;
  uint8_t* meta;
};

/// The token in row `row` of an interleaved matrix, `quarter` = tokens / 4: groups of four rows are tokens a quarter
/// apart, and the last tokens % 4 rows stay where they are. With a quarter of 0 all do.
SPARSE24_HD constexpr int64_t interleaved_token(int64_t row, int64_t quarter) {
  return row < 4 * quarter ? row % 4 * quarter + row / 4 : row;
}

/// grad [tokens, in] with rows `ld_grad` apart, w [in, features] row-major and contiguous; y and dh [tokens, features].
struct LinearGradientArgs {
  int64_t tokens, in, features;
  const void* grad;
  int64_t ld_grad;  ///< on the GPU rows are 16-byte aligned
  const void* w;
  DType dtype;         ///< of grad and w
  DType hidden_dtype;  ///< what dy is rounded to, and the type of y and dh: dtype, but for tests on the CPU

  const void* y;        ///< values of `Operand::of(tokens, features, hidden_dtype, Dim::kFeatures)`
  const uint8_t* meta;  ///< theirs, and those of dh, as `Operand::of(tokens, features, meta_dtype, Dim::kFeatures)`
  DType meta_dtype;     ///< hidden_dtype; or kFloat8E4M3: of values that were fp8 in the forward pass
  void* dh;             ///< values
  TokenCompressed y_tokens, dh_tokens;  ///< all null, counts too: not wanted
  int32_t* counts;                      ///< [features], zero before the call: tokens where y is not 0, as NaN is not

  bool interleaved = false;  ///< the rows of grad, and those of y_tokens and dh_tokens, are `interleaved_token`s

  int64_t quarter() const { return interleaved ? tokens / 4 : 0; }
};

namespace cpu {
void linear_gradient(const LinearGradientArgs& args);
}  // namespace cpu

namespace cuda {
/// Chooses a configuration for the current device.
void linear_gradient(const LinearGradientArgs& args, cudaStream_t stream);
/// With a configuration of the caller's: for tuning and for tests.
void linear_gradient(const LinearGradientArgs& args, const LinearConfig& config, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
