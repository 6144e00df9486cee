/// @file
/// Counts for the tests of densest_features, and what must come of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <ostream>
#include <random>
#include <vector>

namespace sparse24::test {

/// What the counts are like.
enum class Counts {
  kTokens,     ///< most features are used by few tokens, some by nearly all
  kFew,        ///< of seven values: equals in every block of features
  kEqual,      ///< all the same
  kAny,        ///< any 32 bits
  kExtremes,   ///< the largest and the smallest numbers and their neighbours, around zero too
  kAscending,  ///< the densest are the last
};
inline constexpr Counts kAllCounts[] = {Counts::kTokens, Counts::kFew,      Counts::kEqual,
                                        Counts::kAny,    Counts::kExtremes, Counts::kAscending};

inline void PrintTo(Counts counts, std::ostream* out) {
  *out << (const char*[]){"tokens", "few", "equal", "any", "extremes", "ascending"}[static_cast<int>(counts)];
}

inline std::vector<int32_t> make_counts(Counts counts, int64_t features) {
  using Limits = std::numeric_limits<int32_t>;
  constexpr int32_t kExtremes[] = {Limits::max(), Limits::max() - 1, Limits::min(), Limits::min() + 1, -1, 0, 1};
  std::mt19937 random(static_cast<unsigned>(features));
  std::vector<int32_t> out(static_cast<size_t>(features));
  for (size_t f = 0; f < out.size(); ++f) {
    const auto bits = static_cast<uint32_t>(random());
    switch (counts) {
      case Counts::kTokens: out[f] = static_cast<int32_t>((bits & 0x3FFF) >> bits % 13 % 12); break;
      case Counts::kFew: out[f] = static_cast<int32_t>(bits % 7) * 0x10001; break;
      case Counts::kEqual: out[f] = 5; break;
      case Counts::kAny: out[f] = static_cast<int32_t>(bits); break;
      case Counts::kExtremes: out[f] = kExtremes[bits % 7]; break;
      case Counts::kAscending: out[f] = static_cast<int32_t>(f); break;
    }
  }
  return out;
}

/// By sorting all of them: not how the reference finds them.
inline std::vector<int64_t> densest_by_sorting(const std::vector<int32_t>& counts, int64_t k) {
  std::vector<int64_t> order(counts.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
  order.resize(static_cast<size_t>(k));
  std::sort(order.begin(), order.end());
  return order;
}

/// None, one, 5 %, all but one, all.
inline std::vector<int64_t> some_k(int64_t features) {
  return {0, std::min<int64_t>(1, features), features / 20, std::max<int64_t>(features - 1, 0), features};
}

}  // namespace sparse24::test
