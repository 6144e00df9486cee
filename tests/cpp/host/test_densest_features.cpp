/// @file
/// The CPU densest_features.
#include <gtest/gtest.h>

#include "sparse24/densest_features.h"
#include "support/densest_cases.h"

namespace sparse24::test {
namespace {

using Features = std::vector<int64_t>;

Features densest(const std::vector<int32_t>& counts, int64_t k) {
  Features out(static_cast<size_t>(k), -1);
  cpu::densest_features({counts.data(), static_cast<int64_t>(counts.size()), k, out.data()});
  return out;
}

TEST(DensestFeatures, AreInAscendingOrder) {
  EXPECT_EQ(densest({1, 9, 0, 4, 12}, 3), (Features{1, 3, 4}));
  EXPECT_EQ(densest({1, 9, 0, 4, 12}, 5), (Features{0, 1, 2, 3, 4}));
  EXPECT_EQ(densest({1, 9, 0, 4, 12}, 0), Features{});
  EXPECT_EQ(densest({}, 0), Features{});
}

TEST(DensestFeatures, AreTheLowerOfEquals) {
  EXPECT_EQ(densest({3, 7, 3, 3, 7, 3}, 4), (Features{0, 1, 2, 4}));
  EXPECT_EQ(densest({0, 0, 0, 0}, 2), (Features{0, 1}));
}

TEST(DensestFeatures, OrderNegativeCountsToo) {
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(densest({kMin, -1, kMax, 0, -2}, 3), (Features{1, 2, 3}));
  EXPECT_EQ(densest({kMin, kMin, -2, kMin}, 2), (Features{0, 2}));
}

TEST(DensestFeatures, AreThoseOfASort) {
  for (Counts kind : kAllCounts) {
    for (int64_t features : {1, 31, 1024, 5000}) {
      const auto counts = make_counts(kind, features);
      for (int64_t k : some_k(features)) {
        EXPECT_EQ(densest(counts, k), densest_by_sorting(counts, k))
            << testing::PrintToString(kind) << " " << features << " " << k;
      }
    }
  }
}

}  // namespace
}  // namespace sparse24::test
