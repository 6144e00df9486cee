/// @file
/// feature_counts: how many tokens use a feature of a 2:4 activation, counted in a sample of the tokens.
#pragma once

#include "sparse24/format.h"

namespace sparse24 {

/// counts[f] = how many sampled tokens t have X[t, f] != 0 (NaN is not 0), X [tokens, features] given by values and
/// meta of dim = -1.
///
/// The sample consists of whole blocks of 16 tokens that are evenly spread. A thousand tokens are enough to order the
/// features, and to look at all tokens would be to read the activation once more.
struct FeatureCountsArgs {
  Operand a;  ///< of dim kFeatures: m tokens, k features
  const void* values;
  const uint8_t* meta;
  DType meta_dtype;  ///< that of a; or kFloat8E4M3 beside wider values: the layout of meta
  int64_t samples;   ///< tokens to look at, at least: 16 or more, or all there are
  int32_t* counts;   ///< [features]

  static constexpr int64_t kBlock = 16;  ///< tokens
  SPARSE24_HD int64_t blocks() const { return ceil_div(a.m, kBlock); }
  SPARSE24_HD int64_t sampled_blocks() const {
    const int64_t wanted = ceil_div(samples, kBlock);
    return wanted < blocks() ? wanted : blocks();
  }
  /// Returns the first token of sampled block i.
  SPARSE24_HD int64_t first_token(int64_t i) const { return i * blocks() / sampled_blocks() * kBlock; }
  Operand pattern() const { return Operand::of(a.m, a.k, meta_dtype, Dim::kFeatures); }
};

namespace cpu {
void feature_counts(const FeatureCountsArgs& args);
}
namespace cuda {
void feature_counts(const FeatureCountsArgs& args, cudaStream_t stream);
}

}  // namespace sparse24
