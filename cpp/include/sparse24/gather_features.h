/// @file
/// gather_features: some columns of the dense matrix that a 2:4 operand stands for.
#pragma once

#include "sparse24/format.h"

namespace sparse24 {

/// out[r, h] = X[r, features[h]], with X [rows, cols] given by values and meta of dim = -1.
///
/// A feature outside of 0 .. cols - 1 gives NaN: the indices lie on the device, where nothing can refuse them.
struct GatherFeaturesArgs {
  Operand a;  ///< of dim kFeatures: m rows, k columns
  const void* values;
  const uint8_t* meta;
  DType meta_dtype;         ///< that of a; or kFloat8E4M3 beside wider values: the layout of meta
  const int64_t* features;  ///< [count]
  int64_t count;
  void* out;  ///< [rows, count], contiguous, of the values' type

  Operand pattern() const { return Operand::of(a.m, a.k, meta_dtype, Dim::kFeatures); }
};

namespace cpu {
void gather_features(const GatherFeaturesArgs& args);
}
namespace cuda {
void gather_features(const GatherFeaturesArgs& args, cudaStream_t stream);
}

}  // namespace sparse24
