/// @file
/// put_features: rows or columns of a weight gradient, from the parts of a product over tokens.
#pragma once

#include <cstdint>

#include "sparse24/types.h"

namespace sparse24 {

/// out[features[h], :] = sum over p of parts[p, h, :], or out[:, features[h]] = sum over p of parts[p, :, h].
///
/// Sums are taken in fp32, in order, and rounded once. An index that is no feature is left out, because nothing can
/// refuse it on a device; of equal indices either may win.
struct PutFeaturesArgs {
  int64_t rows, columns;  ///< of out, row-major and contiguous
  void* out;
  DType dtype;  ///< of out and parts
  bool by_columns;
  const void* parts;  ///< [part_count, count, columns], or by columns [part_count, rows, count]; contiguous
  int64_t part_count;
  const int64_t* features;  ///< [count]
  int64_t count;

  SPARSE24_HD int64_t limit() const { return by_columns ? columns : rows; }     ///< of features
  SPARSE24_HD int64_t parts_rows() const { return by_columns ? rows : count; }  ///< of one part
  SPARSE24_HD int64_t parts_columns() const { return by_columns ? count : columns; }
};

namespace cpu {
void put_features(const PutFeaturesArgs& args);
}
namespace cuda {
void put_features(const PutFeaturesArgs& args, cudaStream_t stream);
}

}  // namespace sparse24
