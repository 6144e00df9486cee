/// @file
/// The CPU mm: a product that a person can check, and all layouts against a loop over the decompressed operand.
#include <gtest/gtest.h>

#include "sparse24/mm.h"
#include "support/compressed.h"

namespace sparse24::test {
namespace {

using Numbers = std::vector<double>;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP8 = DType::kFloat8E4M3;
constexpr DType kFP16 = DType::kFloat16;
constexpr DType kFP32 = DType::kFloat32;

/// A [2, 16] keeps (3, 4) of the first group of row 0 and (5) of the last group of row 1.
Compressed small_a() {
  Numbers x(32, 0);
  x[0] = 1;
  x[1] = 3;
  x[3] = 4;
  x[31] = 5;
  return cpu_compress(Array(kBF16, x), 2, 16, kBF16);
}

/// B [16, 2] = row k holds (k, 1).
Array small_b() {
  Numbers b(32, 1);
  for (int k = 0; k < 16; ++k) b[2 * k] = k;
  return Array(kBF16, b);
}

TEST(Mm, SmallProduct) {
  EXPECT_EQ(cpu_mm(small_a(), small_b(), Product(2)).numbers(), (Numbers{3 * 1 + 4 * 3, 7, 5 * 15, 5}));
}

TEST(Mm, TransposedOutput) {
  Product p(2);
  p.d_major = Major::kColumn;
  EXPECT_EQ(cpu_mm(small_a(), small_b(), p).numbers(), (Numbers{15, 75, 7, 5}));
}

TEST(Mm, ScalesAndBias) {
  Product p(2);
  p.scale_a = {2, 3};
  p.scale_b = {1, 10};
  p.bias = Array(kFP32, Numbers{0.5, -0.5});
  EXPECT_EQ(cpu_mm(small_a(), small_b(), p).numbers(), (Numbers{30.5, 139.5, 225.5, 149.5}));
  p.scale_a = {2};
  p.scale_b = {0.5};
  EXPECT_EQ(cpu_mm(small_a(), small_b(), p).numbers(), (Numbers{15.5, 6.5, 75.5, 4.5}));
}

TEST(Mm, RoundsOnceAfterTheBias) {
  // 257 is no bf16 number (256 and 258 are): rounding before the bias would give 256 - 255 = 1.
  Numbers x(16, 0), b(16, 0);
  x[0] = 1;
  b[0] = 1;
  x[1] = 256;
  b[1] = 1;
  Product p(1);
  p.d_dtype = kBF16;
  p.bias = Array(kBF16, Numbers{-255});
  const Compressed a = cpu_compress(Array(kBF16, x), 1, 16, kBF16);
  EXPECT_EQ(cpu_mm(a, Array(kBF16, b), p)[0], 2);
}

TEST(Mm, WithoutReductionThereIsTheBias) {
  const Compressed a = cpu_compress(Array(kBF16, Numbers{}), 2, 0, kBF16);
  Product p(3);
  EXPECT_EQ(cpu_mm(a, Array(kBF16, Numbers{}), p).numbers(), Numbers(6, 0));
  p.bias = Array(kFP32, Numbers{1, 2, 3});
  EXPECT_EQ(cpu_mm(a, Array(kBF16, Numbers{}), p).numbers(), (Numbers{1, 2, 3, 1, 2, 3}));
}

TEST(Mm, WithoutRowsOrColumnsThereIsNothing) {
  const Compressed none = cpu_compress(Array(kBF16, Numbers{}), 0, 16, kBF16);
  EXPECT_EQ(cpu_mm(none, Array(kBF16, Numbers(16, 1)), Product(1)).size(), 0);
  EXPECT_EQ(cpu_mm(small_a(), Array(kBF16, Numbers{}), Product(0)).size(), 0);
}

TEST(Mm, PaddingTokensOfBAreNotRead) {
  // Five tokens in groups of four: A has eight columns, B has five rows.
  Numbers x(5 * 8, 1);
  Compressed a = cpu_compress(Array(kBF16, x), 5, 8, kBF16, {Dim::kTokens});
  Array b(kBF16, 8);  // NaN behind the five rows
  for (int k = 0; k < 5; ++k) b.set(k, 1 + k);
  EXPECT_EQ(cpu_mm(a, b, Product(1)).numbers(), Numbers(8, 1 + 2 + 5));
  // Nor are their values in A: of the second group the first is the fifth token's.
  for (int row = 0; row < 8; ++row) a.values.set(a.a.value_index(row, 3), INFINITY);
  EXPECT_EQ(cpu_mm(a, b, Product(1)).numbers(), Numbers(8, 1 + 2 + 5));
}

TEST(Mm, WhatIsKeptBeyondTheLastTokenMultipliesZero) {
  Compressed a = cpu_compress(Array(kBF16, Numbers(6 * 8, 1)), 6, 8, kBF16, {Dim::kTokens});
  const Array b(kBF16, Numbers{1, 2, 3, 4, 5, 6});
  for (int row = 0; row < 8; ++row) {
    a.keep(row, 1, {1, 3});  // the sixth token, and the eighth of six
    a.values.set(a.a.value_index(row, 3), row == 7 ? INFINITY : 9);
  }
  Numbers expected(8, 1 + 2 + 6);
  expected[7] = NAN;
  const Numbers got = cpu_mm(a, b, Product(1)).numbers();
  for (int row = 0; row < 8; ++row) {
    EXPECT_TRUE(std::isnan(expected[row]) ? std::isnan(got[row]) : got[row] == expected[row]) << row;
  }
}

/// Ten tokens in the order 0, 2, 4, 6 | 1, 3, 5, 7 | 8, 9, of which A keeps the first two of each group.
TEST(Mm, InterleavedTokensFindTheirRowsOfB) {
  Numbers x(10 * 8, 0), b(10);
  for (int row : {0, 1, 4, 5, 8, 9}) x[row * 8] = 1;
  for (int token = 0; token < 10; ++token) b[token] = 1 << token;
  const Compressed a = cpu_compress(Array(kFP32, x), 10, 8, kFP32, {Dim::kTokens});
  Product p(1);
  p.interleaved = true;
  EXPECT_EQ(cpu_mm(a, Array(kFP32, b), p)[0], (1 << 0) + (1 << 2) + (1 << 1) + (1 << 3) + (1 << 8) + (1 << 9));
}

TEST(Mm, FewerTokensThanAGroupStayWhereTheyAre) {
  for (int64_t tokens : {1, 2, 3}) {
    const Compressed a = cpu_compress(random_integers(kFP32, tokens * 8, 3, 1), tokens, 8, kFP32, {Dim::kTokens});
    const Array b = random_integers(kFP32, tokens * 5, 3, 2);
    Product p(5);
    const Array expected = cpu_mm(a, b, p);
    p.interleaved = true;
    EXPECT_EQ(cpu_mm(a, b, p).first_difference(expected), -1) << tokens;
  }
}

class MmLayouts : public testing::TestWithParam<std::tuple<DType, Dim, Major, Major, DType>> {};

TEST_P(MmLayouts, EqualTheLoopOverTheDecompressed) {
  const auto [dtype, dim, b_major, d_major, d_dtype] = GetParam();
  const int64_t rows = dim == Dim::kFeatures ? 9 : 37, cols = dim == Dim::kFeatures ? 160 : 24, n = 11;
  const DType x_dtype = dtype == kFP8 ? kBF16 : dtype;
  const Compressed a = cpu_compress(random_integers(x_dtype, rows * cols, 3, 1), rows, cols, dtype,
                                    {dim, Activation::kNone, Scaling::kTensor, {1}});
  const int64_t m = a.a.m, k = a.a.k;
  Product p(n);
  p.b_major = b_major;
  p.ldb = (b_major == Major::kRow ? n : k) + 5;
  p.d_dtype = d_dtype;
  p.d_major = d_major;
  Array b(dtype, p.ldb * (b_major == Major::kRow ? k : n));  // NaN between rows
  const Array integers = random_integers(dtype, k * n, 3, 2);
  const auto at = [&](int64_t row, int64_t col) {
    return b_major == Major::kRow ? row * p.ldb + col : col * p.ldb + row;
  };
  for (int64_t i = 0; i < k * n; ++i) b.set_code(at(i / n, i % n), integers.code(i));
  for (int64_t row = 0; row < m; ++row) p.scale_a.push_back(static_cast<float>(1 + row % 3));
  p.scale_b = {0.5f};
  p.bias = random_integers(d_dtype, n, 9, 4);

  const Numbers dense = a.dense();
  for (bool interleaved : {false, true}) {
    if (interleaved && dim == Dim::kFeatures) continue;
    p.interleaved = interleaved;
    const Array d = cpu_mm(a, b, p);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t col = 0; col < n; ++col) {
        double sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          sum += dense[row * a.a.k_values + i] * b[at(interleaved_token(i, interleaved ? k / 4 : 0), col)];
        }
        const double expected = p.scale_a[row] * p.scale_b[0] * sum + (*p.bias)[col];
        const int64_t index = d_major == Major::kRow ? row * n + col : col * m + row;
        ASSERT_EQ(d.code(index), encode(d_dtype, expected)) << "row " << row << " column " << col;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(SixteenBit, MmLayouts,
                         testing::Combine(testing::Values(kBF16, kFP16, kFP32),
                                          testing::Values(Dim::kFeatures, Dim::kTokens),
                                          testing::Values(Major::kRow, Major::kColumn),
                                          testing::Values(Major::kRow, Major::kColumn),
                                          testing::Values(kBF16, kFP16, kFP32)));
INSTANTIATE_TEST_SUITE_P(Fp8, MmLayouts,
                         testing::Combine(testing::Values(kFP8), testing::Values(Dim::kFeatures, Dim::kTokens),
                                          testing::Values(Major::kColumn), testing::Values(Major::kRow, Major::kColumn),
                                          testing::Values(kBF16, kFP16, kFP32)));

}  // namespace
}  // namespace sparse24::test
