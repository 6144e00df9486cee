/// @file
/// The CPU compress, compress_like and decompress on matrices that a person can check.
#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <tuple>

#include "sparse24/compress.h"
#include "support/compressed.h"

namespace sparse24::test {
namespace {

using Numbers = std::vector<double>;
using Kept = std::pair<int, int>;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP16 = DType::kFloat16;
constexpr DType kFP32 = DType::kFloat32;
constexpr DType kFP8 = DType::kFloat8E4M3;

Numbers row_of(Numbers head, int64_t cols) {
  head.resize(cols, 0);
  return head;
}

class Compress16 : public testing::TestWithParam<DType> {};

TEST_P(Compress16, KeepsTheTwoLargestOfEachFour) {
  const Array x(GetParam(), Numbers{1, 2, 3, 4, -4, 3, -2, 1, 0, 0, 5, 0, 0, 0, 0, 0});
  const Compressed c = cpu_compress(x, 1, 16, GetParam());
  EXPECT_EQ(c.values.numbers(), (Numbers{3, 4, -4, 3, 0, 5, 0, 0}));
  EXPECT_EQ(c.kept(0, 0), Kept(2, 3));
  EXPECT_EQ(c.kept(0, 1), Kept(0, 1));
  EXPECT_EQ(c.kept(0, 2), Kept(0, 2));
  EXPECT_EQ(c.kept(0, 3), Kept(0, 1));
  // (2,3) = 0xE, (0,1) = 0x4, (0,2) = 0x8: two bytes, and padding everywhere else.
  std::vector<uint8_t> meta(128 * 64 / 8, 0x44);
  meta[0] = 0x4E;
  meta[1] = 0x48;
  EXPECT_EQ(c.meta, meta);
}

TEST_P(Compress16, AlongTokens) {
  // clang-format off
  const Array x(GetParam(), Numbers{1, 0, 0, 9, 0, -1, 2, 0,
                                    2, 0, 5, 8, 0, -2, 2, 0,
                                    3, 0, 0, 7, 0, -3, 2, 6,
                                    4, 1, 0, 6, 0, -4, 2, 0});
  const Compressed c = cpu_compress(x, 4, 8, GetParam(), {Dim::kTokens});
  EXPECT_EQ(c.values.numbers(), (Numbers{3, 0, 0, 9, 0, -3, 2, 0,
                                         4, 1, 5, 8, 0, -4, 2, 6}));
  // clang-format on
  const std::vector<Kept> kept{{2, 3}, {0, 3}, {0, 1}, {0, 1}, {0, 1}, {2, 3}, {0, 1}, {0, 2}};
  for (int col = 0; col < 8; ++col) EXPECT_EQ(c.kept(col, 0), kept[col]) << "column " << col;
}

TEST_P(Compress16, OddTokensArePaddedWithZeros) {
  Numbers numbers(5 * 8, 0);
  for (int col = 0; col < 8; ++col) numbers[4 * 8 + col] = col + 1;
  const Compressed c = cpu_compress(Array(GetParam(), numbers), 5, 8, GetParam(), {Dim::kTokens});
  ASSERT_EQ(c.values.size(), 4 * 8);
  for (int col = 0; col < 8; ++col) {
    EXPECT_EQ(c.values[2 * 8 + col], col + 1);
    EXPECT_EQ(c.values.code(3 * 8 + col), 0u);
    EXPECT_EQ(c.kept(col, 1), Kept(0, 1));
  }
}

TEST_P(Compress16, LowerIndexWinsTies) {
  const Array x(GetParam(), Numbers{1, -1, 1, -1, 0, 2, -2, 2, 3, 0, 3, 3, -0.0, 0, 0, 7});
  const Compressed c = cpu_compress(x, 1, 16, GetParam());
  EXPECT_EQ(c.values.numbers(), (Numbers{1, -1, 2, -2, 3, 3, 0, 7}));
  EXPECT_EQ(c.kept(0, 1), Kept(1, 2));
  EXPECT_EQ(c.kept(0, 2), Kept(0, 2));
  EXPECT_EQ(c.kept(0, 3), Kept(0, 3));
  EXPECT_EQ(c.values.code(6), x.code(12)) << "-0 keeps its sign";
}

TEST_P(Compress16, NaNIsLargerThanInfinity) {
  Array x(GetParam(), row_of({INFINITY, 1, 0, 2, 0, INFINITY, 0, -INFINITY}, 16));
  x.set(2, NAN);
  x.set(4, NAN);
  const Compressed c = cpu_compress(x, 1, 16, GetParam());
  EXPECT_EQ(c.kept(0, 0), Kept(0, 2));
  EXPECT_EQ(c.kept(0, 1), Kept(0, 1));
  EXPECT_EQ(c.values.code(0), x.code(0));
  EXPECT_EQ(c.values.code(1), x.code(2));
  EXPECT_EQ(c.values.code(2), x.code(4));
}

TEST_P(Compress16, ReluDropsTheNegative) {
  Array x(GetParam(), row_of({-9, 1, -8, 2, -1, -2, -3, -0.0, 3, 3, 3, -4}, 16));
  const Compressed c = cpu_compress(x, 1, 16, GetParam(), {Dim::kFeatures, Activation::kRelu});
  EXPECT_EQ(c.values.numbers(), (Numbers{1, 2, 0, 0, 3, 3, 0, 0}));
  EXPECT_EQ(c.kept(0, 1), Kept(0, 1));
  EXPECT_EQ(c.values.code(2), 0u) << "zeros are positive";
}

TEST_P(Compress16, Relu2SquaresThenSelects) {
  const Array x(GetParam(), row_of({1.5, -9, 3, 2, -1, -1, -1, -1}, 16));
  const Compressed c = cpu_compress(x, 1, 16, GetParam(), {Dim::kFeatures, Activation::kRelu2});
  EXPECT_EQ(c.values.numbers(), (Numbers{9, 4, 0, 0, 0, 0, 0, 0}));
}

TEST_P(Compress16, WhatDoesNotExceedTheThresholdIsZero) {
  const Array x(GetParam(), row_of({1, 1.5, 0.75, -9, 1, 0.5, 1, 2}, 16));
  const Compressed relu = cpu_compress(x, 1, 16, GetParam(), {Dim::kFeatures, {Activation::kRelu, 1}});
  EXPECT_EQ(relu.values.numbers(), (Numbers{0, 1.5, 0, 2, 0, 0, 0, 0})) << "neither it nor what is left is shifted";
  EXPECT_EQ(relu.kept(0, 0), Kept(0, 1));
  const Compressed relu2 = cpu_compress(x, 1, 16, GetParam(), {Dim::kFeatures, {Activation::kRelu2, 0.99f}});
  EXPECT_EQ(relu2.values.numbers(), (Numbers{1, 2.25, 1, 4, 0, 0, 0, 0}));
}

TEST_P(Compress16, DecompressPutsValuesBack) {
  const Array x(GetParam(), Numbers{1, 2, 3, 4, -4, 3, -2, 1, 0, 0, 5, 0, 0, 0, 0, 0});
  const Compressed c = cpu_compress(x, 1, 16, GetParam());
  Array y(GetParam(), 16);
  cpu::decompress({c.values.data(), c.meta.data(), GetParam(), 1, 16, Dim::kFeatures, y.data()});
  EXPECT_EQ(y.numbers(), (Numbers{0, 0, 3, 4, -4, 3, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0}));
}

TEST_P(Compress16, LikeGathersAtTheGivenPattern) {
  const Array x(GetParam(), Numbers{1, 2, 3, 4, -4, 3, -2, 1, 0, 0, 5, 0, 0, 0, 0, 0});
  const Compressed c = cpu_compress(x, 1, 16, GetParam());
  const Array other(GetParam(), Numbers{10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25});
  Array values(GetParam(), 8);
  cpu::compress_like({other.data(), GetParam(), 1, 16, Dim::kFeatures, c.meta.data(), values.data()});
  EXPECT_EQ(values.numbers(), (Numbers{12, 13, 14, 15, 18, 20, 22, 23}));
}

INSTANTIATE_TEST_SUITE_P(Types, Compress16, testing::Values(kBF16, kFP16, kFP32),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(Compress, Relu2RoundsOnce) {
  // 1 + 2^-7 squared is 1 + 2^-6 + 2^-14; 2^-14 is lost in bf16 and in fp16, kept in float.
  const double x = 1 + std::ldexp(1.0, -7);
  for (DType t : {kBF16, kFP16, kFP32}) {
    const Compressed c = cpu_compress(Array(t, row_of({x}, 16)), 1, 16, t, {Dim::kFeatures, Activation::kRelu2});
    EXPECT_EQ(c.values[0], t == kFP32 ? x * x : 1 + std::ldexp(1.0, -6)) << name_of(t);
  }
}

TEST(Compress, Relu2ComparesBeforeItSquares) {
  // The squares of all four overflow, or underflow, to one number; the last two are the largest.
  const std::tuple<DType, double, uint32_t> cases[] = {
      {kFP16, 300, 0x7C00}, {kBF16, 1e30, 0x7F80}, {kFP32, 1e30, 0x7F800000}, {kBF16, 1e-30, 0}, {kFP32, 1e-30, 0}};
  for (const auto& [t, unit, square] : cases) {
    const Array x(t, row_of({unit, 1.25 * unit, 1.5 * unit, 1.75 * unit}, 16));
    const Compressed c = cpu_compress(x, 1, 16, t, {Dim::kFeatures, Activation::kRelu2});
    EXPECT_EQ(c.kept(0, 0), Kept(2, 3)) << name_of(t) << " " << unit;
    EXPECT_EQ(c.values.code(0), square) << name_of(t) << " " << unit;
    EXPECT_EQ(c.values.code(1), square) << name_of(t) << " " << unit;
  }
}

TEST(Compress, Relu2OfNaNIsCanonical) {
  const std::pair<DType, uint32_t> nan[] = {{kBF16, 0x7FFF}, {kFP16, 0x7FFF}, {kFP32, 0x7FC00000}};
  for (const auto& [t, code] : nan) {
    Array x(t, row_of({0, 1, 2, 3}, 16));
    x.set_code(0, t == kFP32 ? 0xFF800001 : t == kBF16 ? 0xFF81 : 0xFC01);  // negative, signalling
    const Compressed c = cpu_compress(x, 1, 16, t, {Dim::kFeatures, Activation::kRelu2});
    EXPECT_EQ(c.values.code(0), code) << name_of(t);
    const Compressed same = cpu_compress(x, 1, 16, t, {Dim::kFeatures, Activation::kRelu});
    EXPECT_EQ(same.values.code(0), x.code(0)) << name_of(t) << ": relu passes NaN as it is";
  }
}

class CompressFp8 : public testing::TestWithParam<DType> {};

TEST_P(CompressFp8, ComputesOneScalePerRow) {
  Numbers x = row_of({896, 1, -2, 3}, 32);
  const Numbers second = row_of({-7, 0, 0, 14}, 32);
  x.insert(x.end(), second.begin(), second.end());
  x.resize(3 * 32, 0);
  const Compressed c = cpu_compress(Array(GetParam(), x), 3, 32, kFP8);
  EXPECT_EQ(c.scale, (std::vector<float>{2, 14.0f / 448, 1}));
  EXPECT_EQ(c.values[0], 448);
  EXPECT_EQ(c.values[1], 1.5);
  EXPECT_EQ(c.values[16], -224);
  EXPECT_EQ(c.values[17], 448);
  EXPECT_EQ(c.kept(0, 0), Kept(0, 3));
  EXPECT_EQ(c.kept(2, 7), Kept(0, 1));
}

TEST_P(CompressFp8, AlongTokensTheScaleBelongsToAColumn) {
  Numbers x(4 * 8, 0);
  x[2 * 8 + 1] = 896;  // column 1
  x[3 * 8 + 1] = 2;
  x[0 * 8 + 7] = 448;
  const Compressed c = cpu_compress(Array(GetParam(), x), 4, 8, kFP8, {Dim::kTokens});
  EXPECT_EQ(c.scale, (std::vector<float>{1, 2, 1, 1, 1, 1, 1, 1}));
  ASSERT_EQ(c.values.size(), 8 * 16);
  EXPECT_EQ(c.values[1 * 16], 448);
  EXPECT_EQ(c.values[1 * 16 + 1], 1);
  EXPECT_EQ(c.kept(1, 0), Kept(2, 3));
  EXPECT_EQ(c.values[7 * 16], 448);
  const std::vector<uint32_t> codes = c.values.codes();
  EXPECT_EQ(std::count(codes.begin(), codes.end(), 0u), 8 * 16 - 3) << "padding tokens are zero";
}

TEST_P(CompressFp8, OneScaleForTheTensor) {
  Numbers x(2 * 32, 0);
  x[5] = 20;
  x[40] = 30;
  How how{Dim::kFeatures, Activation::kRelu2, Scaling::kTensor};
  const Compressed c = cpu_compress(Array(GetParam(), x), 2, 32, kFP8, how);
  EXPECT_EQ(c.scale, std::vector<float>{900.0f / 448});
  EXPECT_EQ(c.values[16 + 4], 448);
}

TEST_P(CompressFp8, GivenScaleSaturates) {
  How how;
  how.given_scale = {0.5f};
  Array x(GetParam(), row_of({500, -500, 1, 0, 0, 0, 0, 1.5}, 32));
  x.set(2, NAN);
  const Compressed c = cpu_compress(x, 1, 32, kFP8, how);
  EXPECT_EQ(c.kept(0, 0), Kept(0, 2));
  EXPECT_EQ(c.values.code(0), 0x7Eu);
  EXPECT_EQ(c.values.code(1), 0x7Fu);
  EXPECT_EQ(c.values[3], 3);
}

TEST_P(CompressFp8, NaNDoesNotCountForTheScale) {
  Array x(GetParam(), row_of({0, 0, 0, 448}, 64));
  x.set(0, NAN);
  x.set(32, NAN);
  const Compressed c = cpu_compress(x, 2, 32, kFP8);
  EXPECT_EQ(c.scale, (std::vector<float>{1, 1}));
  EXPECT_EQ(c.values.code(0), 0x7Fu);
  EXPECT_EQ(c.values.code(1), 0x7Eu);
}

INSTANTIATE_TEST_SUITE_P(Types, CompressFp8, testing::Values(kBF16, kFP16, kFP32),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(CompressFp8, TheScaleIsAtLeastTheSmallestNormal) {
  const Compressed c = cpu_compress(Array(kFP32, row_of({1e-40, 1e-41}, 32)), 1, 32, kFP8);
  EXPECT_EQ(c.scale, std::vector<float>{FLT_MIN});
  EXPECT_EQ(c.values[0], 0.0078125) << "1e-40 / 2^-126 is 0.0085: 4 * 2^-9 is the nearest";
}

TEST(CompressFp8, AnInfiniteElementMakesTheScaleInfinite) {
  const Compressed c = cpu_compress(Array(kFP32, row_of({INFINITY, 5, 0, 0, 6}, 32)), 1, 32, kFP8);
  EXPECT_EQ(c.scale, std::vector<float>{INFINITY});
  EXPECT_EQ(c.values.code(0), 0x7Fu) << "inf * 0";
  EXPECT_EQ(c.values.code(1), 0u);
  EXPECT_EQ(c.values.code(2), 0u);
}

TEST(Compress, TheEmptyHaveNoBytes) {
  for (Dim dim : {Dim::kFeatures, Dim::kTokens}) {
    const Compressed c = cpu_compress(Array(kBF16, Numbers{}), 0, 32, kBF16, {dim});
    EXPECT_EQ(c.values.size(), 0);
    EXPECT_EQ(c.meta.size(), 0u);
  }
  How how{Dim::kFeatures, Activation::kNone, Scaling::kTensor};
  EXPECT_EQ(cpu_compress(Array(kBF16, Numbers{}), 0, 32, kFP8, how).scale, std::vector<float>{1});
}

TEST(CompressLike, TokensBeyondTheEndAreZero) {
  // One token of a group of four, at a pattern that keeps the second and the fourth.
  const Operand a = Operand::of(1, 8, kBF16, Dim::kTokens);
  std::vector<uint8_t> meta(a.meta_bytes(), 0x44);
  for (int col = 0; col < 8; ++col) meta[a.meta_byte(col, 0)] = 0x4D;
  const Array x(kBF16, Numbers{1, 2, 3, 4, 5, 6, 7, 8});
  Array values(kBF16, 16), back(kBF16, 8);
  cpu::compress_like({x.data(), kBF16, 1, 8, Dim::kTokens, meta.data(), values.data()});
  EXPECT_EQ(values.codes(), std::vector<uint32_t>(16, 0));
  const Array ones(kBF16, Numbers(16, 1));
  cpu::decompress({ones.data(), meta.data(), kBF16, 1, 8, Dim::kTokens, back.data()});
  EXPECT_EQ(back.codes(), std::vector<uint32_t>(8, 0));
}

TEST(CompressLike, OfTwoValuesAtOnePlaceTheFirstCounts) {
  // i0 == i1 = 2, which no compress makes, then i0 = 3 above i1 = 1.
  const Operand a = Operand::of(1, 16, kBF16, Dim::kFeatures);
  std::vector<uint8_t> meta(a.meta_bytes(), 0x44);
  meta[a.meta_byte(0, 0)] = 0x7A;
  const Array values(kBF16, Numbers{5, 6, 7, 8, 0, 0, 0, 0});
  Array x(kBF16, 16), back(kBF16, 8);
  cpu::decompress({values.data(), meta.data(), kBF16, 1, 16, Dim::kFeatures, x.data()});
  EXPECT_EQ(x.numbers(), (Numbers{0, 0, 5, 0, 0, 8, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0}));
  cpu::compress_like({x.data(), kBF16, 1, 16, Dim::kFeatures, meta.data(), back.data()});
  EXPECT_EQ(back.numbers(), (Numbers{5, 5, 7, 8, 0, 0, 0, 0}));
}

TEST(CompressLike, Fp8UsesTheFp8Layout) {
  const Operand a = Operand::of(2, 32, kFP8, Dim::kFeatures);
  std::vector<uint8_t> meta(a.meta_bytes(), 0x44);
  meta[16] = 0x4E;  // row 1: (2, 3), then (0, 1)
  Numbers numbers(64);
  for (int i = 0; i < 64; ++i) numbers[i] = i % 16;
  const Array x(kFP8, numbers);
  Array values(kFP8, 32), back(kFP8, 64);
  cpu::compress_like({x.data(), kFP8, 2, 32, Dim::kFeatures, meta.data(), values.data()});
  EXPECT_EQ(values[0], 0);
  EXPECT_EQ(values[1], 1);
  EXPECT_EQ(values[16], 2);
  EXPECT_EQ(values[17], 3);
  EXPECT_EQ(values[18], 4);
  cpu::decompress({values.data(), meta.data(), kFP8, 2, 32, Dim::kFeatures, back.data()});
  EXPECT_EQ(back[32], 0);
  EXPECT_EQ(back[34], 2);
  EXPECT_EQ(back[35], 3);
  EXPECT_EQ(back[36], 4);
}

}  // namespace
}  // namespace sparse24::test
