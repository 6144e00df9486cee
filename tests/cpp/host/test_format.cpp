/// @file
/// format.h: sizes, and the places of values and nibbles, by small literals and by counting.
#include <gtest/gtest.h>

#include <set>
#include <tuple>
#include <vector>

#include "sparse24/format.h"

namespace sparse24 {
namespace {

constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP8 = DType::kFloat8E4M3;

TEST(Format, SizesAlongFeatures) {
  const Operand a = Operand::of(5, 80, kBF16, Dim::kFeatures);
  EXPECT_EQ(a.m, 5);
  EXPECT_EQ(a.k, 80);
  EXPECT_EQ(a.values_rows(), 5);
  EXPECT_EQ(a.values_cols(), 40);
  EXPECT_EQ(a.meta_bytes(), 128 * 128 / 8);  // 80 features in two atoms of 64
  EXPECT_EQ(Operand::of(5, 96, kFP8, Dim::kFeatures).values_cols(), 48);
  EXPECT_EQ(Operand::of(129, 160, kFP8, Dim::kFeatures).meta_bytes(), 256 * 256 / 8);
}

TEST(Format, SizesAlongTokens) {
  const Operand a = Operand::of(5, 24, kBF16, Dim::kTokens);
  EXPECT_EQ(a.m, 24);
  EXPECT_EQ(a.k, 5);
  EXPECT_EQ(a.values_rows(), 4);  // five tokens padded to eight
  EXPECT_EQ(a.values_cols(), 24);
  EXPECT_EQ(a.meta_bytes(), 128 * 64 / 8);
  const Operand b = Operand::of(33, 24, kFP8, Dim::kTokens);
  EXPECT_EQ(b.values_rows(), 24);
  EXPECT_EQ(b.values_cols(), 32);  // 33 tokens padded to 64
  EXPECT_EQ(b.meta_bytes(), 128 * 128 / 8);
}

TEST(Format, SizesOfTheEmpty) {
  EXPECT_EQ(Operand::of(0, 64, kBF16, Dim::kFeatures).meta_bytes(), 0);
  EXPECT_EQ(Operand::of(64, 0, kFP8, Dim::kFeatures).meta_bytes(), 0);
  EXPECT_EQ(Operand::of(0, 64, kFP8, Dim::kTokens).meta_bytes(), 0);
  EXPECT_EQ(Operand::of(0, 64, kBF16, Dim::kTokens).values_rows(), 0);
}

TEST(Format, SizesBeyondThirtyTwoBits) {
  const Operand a = Operand::of(65536, 32768, kBF16, Dim::kFeatures);
  EXPECT_EQ(a.meta_bytes(), int64_t{1} << 28);
  EXPECT_EQ(a.value_index(65535, 16383), (int64_t{1} << 30) - 1);
  EXPECT_EQ(a.meta_byte(65535, 8191), (int64_t{1} << 28) - 1);
  const Operand t = Operand::of(262144, 32768, kBF16, Dim::kTokens);
  EXPECT_EQ(t.value_index(32767, 131071), (int64_t{1} << 32) - 1);
}

TEST(Format, Alignment) {
  EXPECT_EQ(feature_alignment(kBF16, Dim::kFeatures), 16);
  EXPECT_EQ(feature_alignment(kFP8, Dim::kFeatures), 32);
  EXPECT_EQ(feature_alignment(kBF16, Dim::kTokens), 8);
  EXPECT_EQ(feature_alignment(kFP8, Dim::kTokens), 8);
}

TEST(Format, ValuesOfASmallMatrix) {
  // X [4, 8] along tokens: one group per column, kept value j of column c at j * 8 + c.
  const Operand tokens = Operand::of(4, 8, kBF16, Dim::kTokens);
  EXPECT_EQ(tokens.value_index(3, 0), 3);
  EXPECT_EQ(tokens.value_index(3, 1), 11);
  // fp8: every column of X is a row of values, 32 tokens long, so 16 values.
  const Operand fp8 = Operand::of(4, 8, kFP8, Dim::kTokens);
  EXPECT_EQ(fp8.value_index(3, 0), 48);
  EXPECT_EQ(fp8.value_index(3, 1), 49);
  // X [4, 16] along features: eight values per row.
  const Operand features = Operand::of(4, 16, kBF16, Dim::kFeatures);
  EXPECT_EQ(features.value_index(3, 0), 24);
  EXPECT_EQ(features.value_index(3, 7), 31);
}

/// (row, group, byte)
using Place = std::tuple<int64_t, int64_t, int64_t>;

TEST(Format, MetaOf16Bit) {
  const Operand a = Operand::of(128, 128, kBF16, Dim::kFeatures);
  for (const auto& [row, g, byte] : std::vector<Place>{{0, 0, 0},
                                                       {0, 1, 0},
                                                       {0, 2, 1},
                                                       {0, 3, 1},  // columns 0 .. 15 of row 0: two bytes
                                                       {8, 0, 2},
                                                       {8, 3, 3},  // the row eight below comes next
                                                       {0, 8, 4},
                                                       {8, 8, 6},  // columns 32 .. 47
                                                       {1, 0, 8},
                                                       {7, 0, 56},  //
                                                       {0, 4, 64},
                                                       {0, 12, 68},
                                                       {8, 15, 71},  // columns 16 .. 31 and 48 .. 63
                                                       {16, 0, 128},
                                                       {64, 0, 512},
                                                       {127, 15, 1023},  //
                                                       {0, 16, 1024},
                                                       {127, 31, 2047}}) {  // next 64 columns
    EXPECT_EQ(a.meta_byte(row, g), byte) << "row " << row << " group " << g;
  }
}

TEST(Format, MetaOfFp8) {
  const Operand a = Operand::of(128, 256, kFP8, Dim::kFeatures);
  for (const auto& [row, g, byte] :
       std::vector<Place>{{0, 0, 0}, {0, 1, 0}, {0, 2, 1}, {0, 31, 15}, {1, 0, 16}, {127, 31, 2047}, {0, 32, 2048}}) {
    EXPECT_EQ(a.meta_byte(row, g), byte) << "row " << row << " group " << g;
  }
}

TEST(Format, EvenGroupsTakeTheLowNibble) {
  EXPECT_EQ(Operand::meta_shift(0), 0);
  EXPECT_EQ(Operand::meta_shift(1), 4);
  EXPECT_EQ(Operand::meta_shift(2), 0);
}

class Everywhere : public testing::TestWithParam<std::tuple<DType, Dim, int64_t, int64_t>> {};

TEST_P(Everywhere, EachGroupHasItsOwnNibble) {
  const auto [dtype, dim, rows, cols] = GetParam();
  const Operand a = Operand::of(rows, cols, dtype, dim);
  std::vector<int> used(2 * a.meta_bytes(), 0);
  for (int64_t row = 0; row < a.m_meta; ++row) {
    for (int64_t g = 0; g < a.k_meta / 4; ++g) {
      const int64_t byte = a.meta_byte(row, g);
      ASSERT_GE(byte, 0);
      ASSERT_LT(byte, a.meta_bytes());
      ++used[2 * byte + Operand::meta_shift(g) / 4];
    }
  }
  for (size_t i = 0; i < used.size(); ++i) ASSERT_EQ(used[i], 1) << "nibble " << i;
}

TEST_P(Everywhere, EachValueHasItsOwnPlace) {
  const auto [dtype, dim, rows, cols] = GetParam();
  const Operand a = Operand::of(rows, cols, dtype, dim);
  std::vector<int> used(a.values_rows() * a.values_cols(), 0);
  for (int64_t row = 0; row < a.m; ++row) {
    for (int64_t j = 0; j < a.k_values / 2; ++j) {
      const int64_t index = a.value_index(row, j);
      ASSERT_GE(index, 0);
      ASSERT_LT(index, static_cast<int64_t>(used.size()));
      ++used[index];
    }
  }
  for (size_t i = 0; i < used.size(); ++i) ASSERT_EQ(used[i], 1) << "value " << i;
}

INSTANTIATE_TEST_SUITE_P(Format, Everywhere,
                         testing::Combine(testing::Values(kBF16, kFP8), testing::Values(Dim::kFeatures, Dim::kTokens),
                                          testing::Values(0, 1, 5, 127, 130), testing::Values(32, 96, 160, 256)));

}  // namespace
}  // namespace sparse24
