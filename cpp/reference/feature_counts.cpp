/// @file
/// The reference of feature_counts.
#include "sparse24/feature_counts.h"

#include <algorithm>

#include "reference/groups.h"
#include "reference/numeric.h"

namespace sparse24::cpu {
namespace {

template <class T>
void count(const FeatureCountsArgs& args) {
  const auto* values = static_cast<const typename T::Storage*>(args.values);
  const Operand pattern = args.pattern();
  std::fill_n(args.counts, args.a.k, 0);
  for (int64_t i = 0; i < args.sampled_blocks(); ++i) {
    const int64_t first = args.first_token(i), end = std::min(first + FeatureCountsArgs::kBlock, args.a.m);
    for (int64_t m = first; m < end; ++m) {
      for (int64_t g = 0; g < args.a.k / 4; ++g) {
        const Pair pair = read_pair(args.meta, pattern, m, g);
        args.counts[4 * g + pair.first] += T::load(values[args.a.value_index(m, 2 * g)]) != 0.0f;
        if (pair.second == pair.first) continue;
        args.counts[4 * g + pair.second] += T::load(values[args.a.value_index(m, 2 * g + 1)]) != 0.0f;
      }
    }
  }
}

}  // namespace

void feature_counts(const FeatureCountsArgs& args) {
  visit_dtype(args.a.dtype, [&](auto type) { count<decltype(type)>(args); });
}

}  // namespace sparse24::cpu
