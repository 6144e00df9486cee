/// @file
/// linear_gradient: the backward pass of the second GEMM of the feed-forward network and of the activation before it,
/// with everything that the sparse GEMMs of the backward pass multiply, in both directions.
///
///     dy = grad @ w           in fp32, rounded to the 16-bit type `hidden_dtype`
///     dh = dy * (2 sqrt(y))   in fp32, at the entries that the forward pass kept of y = relu(h)^2
///
/// Given the same dy all of it is bit-identical to the separate steps: compress_like, the product with the root,
/// decompress, and compress along tokens of both y and dh. Where roots are given instead of y, they are what dy is
/// multiplied with, and y is their squares, rounded.
#pragma once

#include "sparse24/linear.h"
#include "sparse24/token_order.h"

namespace sparse24 {

/// One matrix along tokens. `Operand::of(tokens, features, hidden_dtype, Dim::kTokens)` says how it is laid out.
struct TokenCompressed {
  void* values;
  uint8_t* meta;
};

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
  TokenCompressed y_tokens, dh_tokens;  ///< all null: not wanted, nor is anything below
  int32_t* counts;  ///< [features], zero before the call: tokens where y is not 0, as NaN is not; null: not wanted

  bool interleaved = false;  ///< the rows of y_tokens and dh_tokens are `interleaved_token`s; of all others tokens
  /// On the GPU, for tokens % kGradTokenMultiple != 0: the rows of grad from `first_of_tail(tokens, kGradTailTile)` on,
  /// in the order of y_tokens, `ld_grad` apart and padded with zero rows to that multiple.
  const void* grad_tail = nullptr;

  /// Features of which all tokens are wanted: y_hot and dh_hot [hot_count, tokens], tokens in their own order. Indices
  /// ascend; one that does not, or is no feature, gives a row of NaN, because nothing can refuse it on the device.
  const int64_t* hot = nullptr;
  int64_t hot_count = 0;
  void *y_hot = nullptr, *dh_hot = nullptr;  ///< of hidden_dtype
  int32_t* hot_slots = nullptr;              ///< on the GPU: room for [features]

  bool roots = false;  ///< `y` holds relu(h); on the GPU in float16 alone

  int64_t quarter() const { return interleaved ? tokens / 4 : 0; }
};

/// The kernels find the rows of grad by themselves where tokens come in this multiple. Elsewhere they need a
/// `grad_tail` with the rows of the last tile, which has so many.
inline constexpr int64_t kGradTokenMultiple = 32, kGradTailTile = 128;

/// The tile of linear_gradient. A tile of 128x128 would read more from L2 than there is time for, and a wider one would
/// have no registers left.
inline constexpr GemmTile kLinearGradientTile = GemmTile::k128x192;
/// Returns its configuration, a pure function of sizes and of the device; with a number of multiprocessors, of the
/// reference device.
GemmConfig select_linear_gradient_config(DType dtype, int64_t tokens, int64_t features, const DeviceModel& device);
GemmConfig select_linear_gradient_config(DType dtype, int64_t tokens, int64_t features, int sm_count);

namespace cpu {
void linear_gradient(const LinearGradientArgs& args);
}  // namespace cpu

namespace cuda {
/// Chooses a configuration for the current device.
void linear_gradient(const LinearGradientArgs& args, cudaStream_t stream);
/// Runs a configuration of the caller's, which has that tile, for tuning and for tests.
void linear_gradient(const LinearGradientArgs& args, const GemmConfig& config, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
