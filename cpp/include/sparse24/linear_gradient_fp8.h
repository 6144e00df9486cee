/// @file
/// linear_gradient_fp8: linear_gradient where all that is multiplied before and after it is float8, with one scale a
/// matrix that is known before.
///
///     dy = grad @ w.T             codes of float8, sums in fp32, rounded to bfloat16
///     dh = dy * (2 sqrt(y))       in fp32, at the entries that the forward pass kept; y's codes
///     dh's codes = e4m3(dh * f)   rounded once, saturating; f = scale_grad * scale_w * sqrt(scale_y) / scale_dh
///
/// With one scale a matrix nothing waits for a maximum, and codes pass from the direction of features to that of tokens
/// as they are: given the same dh the rest is bit-identical to decompress and compress of codes.
#pragma once

#include "sparse24/linear_gradient.h"
#include "sparse24/quantize.h"

namespace sparse24 {

/// grad [tokens, in] with rows `ld_grad` apart, w [features, in] row-major and contiguous, both e4m3; y and dh
/// [tokens, features], e4m3.
struct LinearGradientFp8Args {
  int64_t tokens, in, features;
  const void* grad;
  int64_t ld_grad;  ///< on the GPU rows are 16-byte aligned
  const void* w;
  const float *scale_grad, *scale_w, *scale_y;  ///< one element each
  const float* scale_dh;                        ///< counts as `usable_scale`

  const void* y;        ///< values of `Operand::of(tokens, features, kFloat8E4M3, Dim::kFeatures)`
  const uint8_t* meta;  ///< theirs, and those of dh
  void* dh;             ///< values
  TokenCompressed y_tokens, dh_tokens;

  bool interleaved;       ///< the rows of y_tokens and dh_tokens are `interleaved_token`s; of all others tokens
  const void* grad_tail;  ///< as LinearGradientArgs::grad_tail

  /// Features of which all tokens are wanted: y_hot and dh_hot [hot_count, ld_hot()], e4m3, tokens in the order of
  /// y_tokens, zeros behind them. Indices as in LinearGradientArgs.
  const int64_t* hot;
  int64_t hot_count;
  void *y_hot, *dh_hot;
  int32_t* hot_slots;  ///< on the GPU: room for [features]

  float* amax;         ///< one element, zero before the call: max |dh|, unscaled, NaN not counted
  int32_t* saturated;  ///< one element, zero before the call: kept entries with |dh / scale_dh| > 448

  int64_t quarter() const { return interleaved ? tokens / 4 : 0; }
  int64_t ld_hot() const { return round_up(tokens, token_padding(DType::kFloat8E4M3)); }
};

/// linear_gradient_fp8 whose w is 2:4 along `in`: `gradient.w` has its values [features, in / 2] with the features in
/// their own order.
struct LinearGradientFp8PackedArgs {
  LinearGradientFp8Args gradient;
  const uint8_t* w_meta;
  void* dy;  ///< on the GPU, where no kernel does all of it: room for dy [tokens, features], bfloat16
};
/// Tells whether one kernel for the GPU does all of it, whose copies must not leave a group of tokens.
constexpr bool linear_gradient_fp8_packed_is_fused(const LinearGradientFp8Args& args) {
  return args.tokens % kGradTokenMultiple == 0;
}

namespace cpu {
void linear_gradient_fp8(const LinearGradientFp8Args& args);
void linear_gradient_fp8_packed(const LinearGradientFp8PackedArgs& args);
}  // namespace cpu

namespace cuda {
/// Chooses a configuration for the current device.
void linear_gradient_fp8(const LinearGradientFp8Args& args, cudaStream_t stream);
/// Runs a configuration of the caller's, which has the tile of linear_gradient.
void linear_gradient_fp8(const LinearGradientFp8Args& args, const GemmConfig& config, cudaStream_t stream);
void linear_gradient_fp8_packed(const LinearGradientFp8PackedArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
