/// @file
/// The CPU quantize_fp8 on small rows.
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>

#include "reference/numeric.h"
#include "sparse24/quantize.h"
#include "support/array.h"

namespace sparse24::test {
namespace {

using Numbers = std::vector<double>;
constexpr DType kFP8 = DType::kFloat8E4M3;

class Quantize : public testing::TestWithParam<DType> {};

TEST_P(Quantize, OneScalePerRow) {
  Numbers x(3 * 16, 0);
  x[0] = -896;
  x[1] = 6;
  x[16] = 28;
  x[31] = 1;
  const Array in(GetParam(), x);
  Array q(kFP8, 48);
  std::vector<float> scale(3, NAN);
  cpu::quantize_fp8({in.data(), GetParam(), 3, 16, q.data(), Scaling::kRow, nullptr, scale.data()});
  EXPECT_EQ(scale, (std::vector<float>{2, 0.0625, 1}));
  EXPECT_EQ(q[0], -448);
  EXPECT_EQ(q[1], 3);
  EXPECT_EQ(q[16], 448);
  EXPECT_EQ(q[31], 16);
  for (int i = 32; i < 48; ++i) EXPECT_EQ(q.code(i), 0u);
}

TEST_P(Quantize, OneScaleForTheTensor) {
  Numbers x(2 * 16, 1);
  x[20] = -224;
  const Array in(GetParam(), x);
  Array q(kFP8, 32);
  float scale = NAN;
  cpu::quantize_fp8({in.data(), GetParam(), 2, 16, q.data(), Scaling::kTensor, nullptr, &scale});
  EXPECT_EQ(scale, 0.5f);
  EXPECT_EQ(q[0], 2);
  EXPECT_EQ(q[20], -448);
}

TEST_P(Quantize, GivenScale) {
  // 17 and 19 lie between 16 and 18 and between 18 and 20: ties go to the even code. 1000 saturates.
  const Array in(GetParam(), Numbers{17, 19, 1000, -1000, -0.0, 0.001953125, 0.0009765625, 18});
  Array q(kFP8, 8);
  const float scale = 1;
  cpu::quantize_fp8({in.data(), GetParam(), 1, 8, q.data(), Scaling::kRow, &scale, nullptr});
  EXPECT_EQ(q.numbers(), (Numbers{16, 20, 448, -448, 0, 0.001953125, 0, 18}));
  EXPECT_EQ(q.code(4), 0x80u) << "-0 keeps its sign";
}

TEST_P(Quantize, SpecialNumbers) {
  Array in(GetParam(), Numbers{0, INFINITY, -INFINITY, 1});
  in.set(0, NAN);
  Array q(kFP8, 4);
  const float scale = 0.25f;
  cpu::quantize_fp8({in.data(), GetParam(), 1, 4, q.data(), Scaling::kTensor, &scale, nullptr});
  EXPECT_EQ(q.codes(), (std::vector<uint32_t>{0x7F, 0x7E, 0xFE, encode(kFP8, 4)}));
}

TEST_P(Quantize, PredictsFromTheSquares) {
  Numbers x(3 * 16, 0);
  x[0] = -448;
  x[1] = 3;
  x[20] = 28;  // scale 1 / 16: the code of 448
  const Array in(GetParam(), x);
  Array q(kFP8, 48);
  std::vector<float> scale(3, NAN), predicted(3, NAN);
  const float factor = 0.5f;
  cpu::quantize_fp8(
      {in.data(), GetParam(), 3, 16, q.data(), Scaling::kRow, nullptr, scale.data(), &factor, predicted.data()});
  EXPECT_EQ(predicted, (std::vector<float>{0.5f * (448 * 448 + 9), 0.5f * 28 * 28, 1}));
}

TEST_P(Quantize, GivenScalesHaveFiniteInverses) {
  // Zeros, subnormal numbers and the smallest that counts as itself; then what counts as it is.
  const std::vector<float> scale{0.0f, -0.0f, 1e-39f, -1e-39f, FLT_MIN / 2, FLT_MIN, -0.5f, INFINITY, NAN};
  const auto rows = static_cast<int64_t>(scale.size());
  Numbers x(rows * 16, 0);
  for (int64_t r = 0; r < rows; ++r) x[r * 16] = 3;
  const Array in(GetParam(), x);
  Array q(kFP8, rows * 16);
  cpu::quantize_fp8({in.data(), GetParam(), rows, 16, q.data(), Scaling::kRow, scale.data(), nullptr});
  for (int64_t r = 0; r < 6; ++r) {
    EXPECT_EQ(q[r * 16], 448) << r;
    EXPECT_EQ(q.code(r * 16 + 1), 0u) << r;
  }
  EXPECT_EQ(q[6 * 16], -6);
  EXPECT_EQ(q.code(7 * 16), 0u);
  EXPECT_EQ(q.code(8 * 16), 0x7Fu);
  EXPECT_EQ(q.code(8 * 16 + 1), 0x7Fu);

  std::vector<float> used(scale.size(), -1);
  cpu::usable_scales({scale.data(), rows, used.data()});
  EXPECT_EQ(std::vector<float>(used.begin(), used.end() - 1),
            (std::vector<float>{FLT_MIN, FLT_MIN, FLT_MIN, FLT_MIN, FLT_MIN, FLT_MIN, -0.5f, INFINITY}));
  EXPECT_TRUE(std::isnan(used.back()));
}

TEST(QuantizeUnits, AreWhatTheCodesMean) {
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7F) == 0x7F) continue;
    Array one(kFP8, 1);
    one.set_code(0, code);
    EXPECT_EQ(e4m3_units(static_cast<uint8_t>(code)), std::fabs(one[0]) * 512) << code;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Quantize, testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(QuantizePrediction, HasOneCodeForNaN) {
  const auto code = [](float scale, float factor) { return bits_of(predicted_scale(1, scale, factor)); };
  EXPECT_EQ(code(INFINITY, 0), kNanFloat32);
  EXPECT_EQ(code(1, float_of(0xFF812345)), kNanFloat32);
  EXPECT_EQ(code(0, INFINITY), kNanFloat32);
  EXPECT_EQ(predicted_scale(1, INFINITY, 1), INFINITY);
  EXPECT_EQ(predicted_scale(1, INFINITY, -1), FLT_MIN);
}

TEST(QuantizeFloat, MultipliesByTheRoundedInverse) {
  // i * 61 / 16 divided by 61 is often a tie between two codes; the product with the rounded 1 / 61 can lie beside it.
  const float scale = 61, inverse = 1.0f / scale;
  std::vector<double> x;
  for (int i = 1; i < 3000; ++i) x.push_back(i * 61 / 16.0);
  const Array in(DType::kFloat32, x);
  Array q(kFP8, in.size());
  cpu::quantize_fp8({in.data(), DType::kFloat32, 1, in.size(), q.data(), Scaling::kTensor, &scale, nullptr});
  int differences = 0;
  for (int64_t i = 0; i < in.size(); ++i) {
    const float number = static_cast<float>(in[i]);
    ASSERT_EQ(q.code(i), encode(kFP8, number * inverse)) << number;
    differences += q.code(i) != encode(kFP8, number / scale);
  }
  EXPECT_GT(differences, 0) << "the data do not tell the product from the quotient";
}

TEST(QuantizeFloat, TinyRowsUseTheSmallestNormalScale) {
  const Array in(DType::kFloat32, Numbers{1e-42, 0, 0, 0});
  Array q(kFP8, 4);
  float scale = NAN;
  cpu::quantize_fp8({in.data(), DType::kFloat32, 1, 4, q.data(), Scaling::kRow, nullptr, &scale});
  EXPECT_EQ(scale, FLT_MIN);
}

}  // namespace
}  // namespace sparse24::test
