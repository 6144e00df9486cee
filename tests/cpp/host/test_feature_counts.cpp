/// @file
/// The CPU feature_counts.
#include <gtest/gtest.h>

#include <algorithm>

#include "support/feature_counts_case.h"

namespace sparse24::test {
namespace {

std::vector<int64_t> first_tokens(int64_t tokens, int64_t samples) {
  FeatureCountsArgs args{};
  args.a = Operand::of(tokens, 32, DType::kBFloat16, Dim::kFeatures);
  args.samples = samples;
  std::vector<int64_t> out;
  for (int64_t i = 0; i < args.sampled_blocks(); ++i) out.push_back(args.first_token(i));
  return out;
}

TEST(FeatureCounts, SampleBlocksThatAreEvenlySpread) {
  using Tokens = std::vector<int64_t>;
  EXPECT_EQ(first_tokens(160, 1), (Tokens{0}));
  EXPECT_EQ(first_tokens(160, 48), (Tokens{0, 48, 96}));
  EXPECT_EQ(first_tokens(160, 49), (Tokens{0, 32, 80, 112}));
  EXPECT_EQ(first_tokens(40, 33), (Tokens{0, 16, 32}));
  EXPECT_EQ(first_tokens(3, 1024), (Tokens{0}));
  EXPECT_EQ(first_tokens(0, 1024), (Tokens{}));
}

/// h = 1, -0, NaN, 0, 0, 0, 0, 2 and zeros, in both tokens: NaN counts, a zero that is kept does not.
TEST(FeatureCounts, OfASmallActivation) {
  Array h(DType::kBFloat16, std::vector<double>(64, 0));
  for (int64_t t = 0; t < 2; ++t) {
    h.set(32 * t, 1);
    h.set(32 * t + 1, -0.0);
    h.set(32 * t + 2, NAN);
    h.set(32 * t + 7, 2);
  }
  const Compressed x = cpu_compress(h, 2, 32, DType::kBFloat16);
  std::vector<int32_t> counts(32, -1), expected(32, 0);
  expected[0] = expected[2] = expected[7] = 2;
  cpu::feature_counts({x.a, x.values.data(), x.meta.data(), DType::kBFloat16, 1024, counts.data()});
  EXPECT_EQ(counts, expected);
}

TEST(FeatureCounts, OfTwoValuesAtOnePlaceTheFirstCounts) {
  Compressed x(1, 16, DType::kBFloat16, Dim::kFeatures);
  std::fill(x.meta.begin(), x.meta.end(), 0xAA);  // i0 == i1 = 2
  x.values = Array(DType::kBFloat16, std::vector<double>{1, 1, 0, 1, 1, 0, 0, 0});
  std::vector<int32_t> counts(16, -1), expected(16, 0);
  expected[2] = expected[10] = 1;
  cpu::feature_counts({x.a, x.values.data(), x.meta.data(), DType::kBFloat16, 1024, counts.data()});
  EXPECT_EQ(counts, expected);
}

TEST(FeatureCounts, AreThoseOfTheDenseMatrix) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat8E4M3}) {
    for (bool fp8_meta : {false, true}) {
      for (int64_t tokens : {1, 16, 131, 2000}) {
        const CountsCase c(dtype, fp8_meta, tokens, 96);
        // The pattern is that of the metadata; it need not be that of the values for them to be counted.
        const Operand pattern = Operand::of(tokens, 96, c.meta_dtype, Dim::kFeatures);
        for (int64_t samples : {1, 50, 1024, 2000}) {
          std::vector<int32_t> expected(96, 0);
          for (int64_t first : first_tokens(tokens, samples)) {
            for (int64_t t = first; t < std::min(first + 16, tokens); ++t) {
              for (int64_t j = 0; j < 48; ++j) {
                const int nibble = c.meta[pattern.meta_byte(t, j / 2)] >> Operand::meta_shift(j / 2) & 0xF;
                const auto feature = static_cast<size_t>(j / 2 * 4 + (j % 2 ? nibble >> 2 : nibble & 3));
                expected[feature] += c.x.values[c.x.a.value_index(t, j)] != 0;
              }
            }
          }
          EXPECT_EQ(cpu_feature_counts(c, samples), expected)
              << name_of(dtype) << " " << fp8_meta << " " << tokens << " " << samples;
        }
      }
    }
  }
}

}  // namespace
}  // namespace sparse24::test
