/// @file
/// prune_pack24: a weight to its 2:4 form, dense and as the sparse operand of a product whose rows are its features.
#pragma once

#include "sparse24/packed.h"

namespace sparse24 {

/// w [rows, cols], row-major and contiguous, to `pruned`, of its shape with zeros where nothing is kept, and to the
/// values and metadata of the operand [features, depth] of `Operand::of(features, depth, dtype, Dim::kFeatures)`.
///
/// Groups of four lie along `dim`, and keep what `compress` keeps of w's own numbers. With kFeatures w is [features,
/// depth], and its features have the order of `packed_feature`. With kTokens it is [depth, features], and they have
/// their own; not in fp8.
struct PrunePackArgs {
  const void* w;
  DType w_dtype;
  int64_t rows, cols;
  Dim dim;
  DType dtype;  ///< what the kept values are rounded to: w's, whose own bits they have; of fp32 any of 16 bits
  void* pruned;
  void* values;
  uint8_t* meta;

  Operand operand() const {
    const bool features = dim == Dim::kFeatures;
    return Operand::of(features ? rows : cols, features ? cols : rows, dtype, Dim::kFeatures);
  }
};

namespace cpu {
void prune_pack24(const PrunePackArgs& args);
}  // namespace cpu

namespace cuda {
void prune_pack24(const PrunePackArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
