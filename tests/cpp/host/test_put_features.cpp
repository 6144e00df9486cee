/// @file
/// The CPU put_features: sums that a person can check, and loops in double precision.
#include <gtest/gtest.h>

#include <limits>

#include "support/put_features_case.h"

namespace sparse24::test {
namespace {

using Numbers = std::vector<double>;

class PutFeatures : public testing::TestWithParam<DType> {};

/// Parts (1 2 | 3 4) and (10 20 | 30 40) into columns 0 and 3, and into rows 2 and 0, of zeros.
TEST_P(PutFeatures, Small) {
  const Array parts(GetParam(), Numbers{1, 2, 3, 4, 10, 20, 30, 40});
  Array columns(GetParam(), Numbers(8, 0)), rows(GetParam(), Numbers(6, 0));
  const std::vector<int64_t> features{0, 3}, descending{2, 0};
  cpu::put_features({2, 4, columns.data(), GetParam(), true, parts.data(), 2, features.data(), 2});
  EXPECT_EQ(columns.numbers(), (Numbers{11, 0, 0, 22, 33, 0, 0, 44}));
  cpu::put_features({3, 2, rows.data(), GetParam(), false, parts.data(), 2, descending.data(), 2});
  EXPECT_EQ(rows.numbers(), (Numbers{33, 44, 0, 0, 11, 22}));
}

TEST_P(PutFeatures, WhatIsNoFeatureIsLeftOut) {
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  const std::vector<int64_t> features{-1, 1, 3, kMin, kMax};
  const Array parts(GetParam(), Numbers(15, 5));
  Array out(GetParam(), Numbers(9, 1));
  cpu::put_features({3, 3, out.data(), GetParam(), true, parts.data(), 1, features.data(), 5});
  EXPECT_EQ(out.numbers(), (Numbers{1, 5, 1, 1, 5, 1, 1, 5, 1}));
}

TEST_P(PutFeatures, EqualsTheLoop) {
  for (const bool by_columns : {false, true}) {
    const PutCase c(GetParam(), 13, 40, by_columns, 5, 3);
    Array expected = c.out;
    const auto count = static_cast<int64_t>(c.features.size());
    for (int64_t i = 0; i < (by_columns ? 13 : 40) * count; ++i) {
      const int64_t h = by_columns ? i % count : i / 40, other = by_columns ? i / count : i % 40;
      double sum = 0;
      for (int64_t p = 0; p < 5; ++p) sum += c.parts[p * (by_columns ? 13 : 40) * count + i];
      expected.set(by_columns ? other * 40 + c.features[h] : c.features[h] * 40 + other, sum);
    }
    EXPECT_EQ(cpu_put_features(c).first_difference(expected), -1) << by_columns;
  }
}

/// 257 and 1 are 258, though 257 is no bf16 number: the sum is rounded, not its terms.
TEST(PutFeaturesRounding, HappensOnce) {
  const Array parts(DType::kBFloat16, Numbers{256, 1, 1});
  Array out(DType::kBFloat16, Numbers{0});
  const int64_t feature = 0;
  cpu::put_features({1, 1, out.data(), DType::kBFloat16, true, parts.data(), 3, &feature, 1});
  EXPECT_EQ(out[0], 258);
}

INSTANTIATE_TEST_SUITE_P(All, PutFeatures, testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat32),
                         [](const auto& info) { return std::string(name_of(info.param)); });

}  // namespace
}  // namespace sparse24::test
