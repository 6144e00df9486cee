/// @file
/// 2:4 weights as the sparse operand: how they are packed, and linear_compress and linear_gradient with one.
///
/// wgmma's sparse operand is A, so that the product is h.T = w @ x.T. Its accumulators have features for rows, and two
/// lanes of a warp hold four of them together that the epilogue selects two of. So a weight is packed as compress packs
/// it, but with the features of each 16 rows in that order. docs/design/sparse_weights.md draws it.
#pragma once

#include "sparse24/format.h"
#include "sparse24/gemm.h"
#include "sparse24/linear.h"
#include "sparse24/linear_gradient.h"

namespace sparse24 {

/// Features are a multiple of this: those of one warp.
inline constexpr int64_t kPackedFeatures = 16;
/// Tiles of one warpgroup have features in this multiple, so that no copy has a row that does not exist, and tokens
/// that are in groups in this one.
inline constexpr int64_t kGroupedFeatures = 32, kGroupedTokens = 16;
/// The feature that row m of the sparse operand is, and the row of a feature.
SPARSE24_HD constexpr int64_t packed_feature(int64_t m) { return m / 16 * 16 + m % 8 * 2 + m % 16 / 8; }
SPARSE24_HD constexpr int64_t packed_row(int64_t feature) {
  return feature / 16 * 16 + feature % 2 * 8 + feature % 16 / 2;
}

/// linear_compress whose w is packed: `linear.w` has its values [out, in / 2], of the dtype of x.
struct LinearCompressPackedArgs {
  LinearCompressArgs compress;
  const uint8_t* w_meta;
};

/// linear_gradient whose w.T is 2:4 along `in`: `gradient.w` has its values [features, in / 2] with the features in
/// their own order.
struct LinearGradientPackedArgs {
  LinearGradientArgs gradient;
  const uint8_t* w_meta;
  void* dy;  ///< on the GPU, where no kernel does all of it: room for dy [tokens, features]
};
/// Tells whether one kernel for the GPU does all of it. It reads rows in groups of four features and of four tokens,
/// which a copy must not leave; and counts are for benches.
constexpr bool linear_gradient_packed_is_fused(const LinearGradientArgs& args) {
  return args.features % kGroupedFeatures == 0 && args.tokens % kGroupedTokens == 0 && args.meta_dtype == args.dtype &&
         !args.counts;
}

/// The tiles of linear_compress_packed, in the first of all orders: 128 features x 256 tokens, for y of 16 bits; and
/// where y has the dtype of x, and features come in groups, as they do in float8, those of one warpgroup, x 192.
std::vector<GemmConfig> linear_packed_configs(const LinearArgs& args);
/// Its configuration: a tile in one order. It refuses what no kernel is compiled for.
GemmConfig linear_packed_config(const LinearCompressArgs& args);

namespace cpu {
void linear_compress_packed(const LinearCompressPackedArgs& args);
void linear_gradient_packed(const LinearGradientPackedArgs& args);
}  // namespace cpu

namespace cuda {
void linear_compress_packed(const LinearCompressPackedArgs& args, cudaStream_t stream);
void linear_compress_packed(const LinearCompressPackedArgs& args, const GemmConfig& config, cudaStream_t stream);
void linear_gradient_packed(const LinearGradientPackedArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
