/// @file
/// densest_features: the features that the most tokens use.
#pragma once

#include <cstdint>

#include "sparse24/types.h"

namespace sparse24 {

/// out[0 .. k - 1]: the indices of the k largest counts, of equals the lower index, in ascending order.
struct DensestFeaturesArgs {
  const int32_t* counts;  ///< [features]; numbers of tokens, but any are ordered
  int64_t features;       ///< below 2^31
  int64_t k;              ///< 0 .. features
  int64_t* out;           ///< [k]
};

namespace cpu {
void densest_features(const DensestFeaturesArgs& args);
}
namespace cuda {
void densest_features(const DensestFeaturesArgs& args, cudaStream_t stream);
}

}  // namespace sparse24
