/// @file
/// The reference of densest_features.
#include "sparse24/densest_features.h"

#include <algorithm>
#include <numeric>

#include "core/buffer.h"

namespace sparse24::cpu {

void densest_features(const DensestFeaturesArgs& args) {
  auto features = make_buffer<int32_t>(args.features);
  std::iota(features.begin(), features.end(), 0);
  // No two features are equal in this order: the first k of them are the same set, however they are found.
  const auto denser = [&](int32_t a, int32_t b) {
    return args.counts[a] != args.counts[b] ? args.counts[a] > args.counts[b] : a < b;
  };
  const auto end = features.begin() + args.k;
  std::nth_element(features.begin(), end, features.end(), denser);
  std::sort(features.begin(), end);
  std::copy(features.begin(), end, args.out);
}

}  // namespace sparse24::cpu
