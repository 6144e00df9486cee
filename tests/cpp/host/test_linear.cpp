/// @file
/// The CPU linear_relu2 and linear_compress: products that a person can check, and the separate steps.
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>

#include "support/linear_case.h"

namespace sparse24::test {
namespace {

using Numbers = std::vector<double>;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP16 = DType::kFloat16;
constexpr DType kFP32 = DType::kFloat32;
constexpr DType kFP8 = DType::kFloat8E4M3;

/// One token (1, 2) and w with rows (1, 0), (0, -1), (1, 1), (2, 1) and zeros: h = 1, -2, 3, 4, 0, ...
LinearCase small(DType dtype, int64_t out) {
  Array w(dtype, Numbers(2 * out, 0));
  const Numbers rows{1, 0, 0, -1, 1, 1, 2, 1};
  for (size_t i = 0; i < rows.size(); ++i) w.set(static_cast<int64_t>(i), rows[i]);
  return {1, 2, out, Array(dtype, Numbers{1, 2}), w};
}

class LinearTypes : public testing::TestWithParam<DType> {};

TEST_P(LinearTypes, SmallRelu2) {
  const DenseResult out = cpu_linear_relu2(small(GetParam(), 8));
  EXPECT_EQ(out.y.numbers(), (Numbers{1, 0, 9, 16, 0, 0, 0, 0}));
  EXPECT_EQ(out.amax, 16);
  EXPECT_EQ(out.saturated, 0);
}

TEST_P(LinearTypes, SmallCompress) {
  const DType meta_dtype = GetParam() == kFP8 ? kBF16 : GetParam();
  const CompressedResult out = cpu_linear_compress(small(GetParam(), 16), meta_dtype);
  EXPECT_EQ(out.values.numbers(), (Numbers{9, 16, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(out.meta[0], 0x4E) << "(2, 3), then the zeros' (0, 1)";
  for (size_t i = 1; i < out.meta.size(); ++i) ASSERT_EQ(out.meta[i], kMetaPaddingByte) << i;
  EXPECT_EQ(out.amax, 16);
}

/// As above, but for the square.
TEST_P(LinearTypes, SmallRoots) {
  LinearCase c = small(GetParam(), 16);
  c.activation = Activation::kRelu;
  const DenseResult dense = cpu_linear_relu2(c);
  const Numbers y = dense.y.numbers();
  EXPECT_EQ(Numbers(y.begin(), y.begin() + 5), (Numbers{1, 0, 3, 4, 0}));
  EXPECT_EQ(dense.amax, 4);
  const CompressedResult out = cpu_linear_compress(c, c.y_dtype);
  EXPECT_EQ(out.values.numbers(), (Numbers{3, 4, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(out.meta[0], 0x4E);
  EXPECT_EQ(out.amax, 4);
}

/// h = 1, 0, 3, 4 and zeros.
TEST_P(LinearTypes, SmallThreshold) {
  LinearCase c = small(GetParam(), 16);
  c.activation = {Activation::kRelu2, 3};
  const DenseResult dense = cpu_linear_relu2(c);
  const Numbers y = dense.y.numbers();
  EXPECT_EQ(Numbers(y.begin(), y.begin() + 5), (Numbers{0, 0, 0, 16, 0}));
  EXPECT_EQ(cpu_linear_compress(c, c.y_dtype).values.numbers(), (Numbers{0, 16, 0, 0, 0, 0, 0, 0}));
  c.activation = {Activation::kRelu2, 4};
  EXPECT_EQ(cpu_linear_relu2(c).amax, 0);
}

TEST_P(LinearTypes, ScalesAndBias) {
  LinearCase c = small(GetParam(), 8);
  c.scale_x = {2};
  c.scale_w = {1, 1, 1, 0.5f, 1, 1, 1, 1};
  c.bias = Array(c.hidden_dtype, Numbers{1, 5, 0, -1, 0.5, 0, -3, 0});
  // h = 2 + 1, -4 + 5, 6, 4 - 1, 0.5, 0, -3, 0
  EXPECT_EQ(cpu_linear_relu2(c).y.numbers(), (Numbers{9, 1, 36, 9, 0.25, 0, 0, 0}));
}

TEST_P(LinearTypes, SaturationCountsKeptValues) {
  LinearCase c = small(GetParam(), 32);
  c.y_dtype = kFP8;
  c.scale_y = {1.0f / 512};
  // Times 512: 512, 4608 and 8192 are beyond 448. The first is not kept.
  const DenseResult dense = cpu_linear_relu2(c);
  EXPECT_EQ(dense.saturated, 3);
  EXPECT_EQ((Numbers{dense.y[0], dense.y[1], dense.y[2], dense.y[3]}), (Numbers{448, 0, 448, 448}));
  const CompressedResult compressed = cpu_linear_compress(c, kFP8);
  EXPECT_EQ(compressed.saturated, 2);
  EXPECT_EQ(compressed.amax, 16) << "before scaling";
  // 16 / (1 / 28) = 448 is not beyond.
  c.scale_y = {1.0f / 28};
  EXPECT_EQ(cpu_linear_compress(c, kFP8).saturated, 0);
  // Neither is 9 / (9 / 448), which is 448 to the last bit; 16 / (9 / 448) is.
  c.scale_y = {9.0f / 448};
  ASSERT_EQ(9 * (1.0f / c.scale_y[0]), 448.0f);
  EXPECT_EQ(cpu_linear_compress(c, kFP8).saturated, 1);
  EXPECT_EQ(cpu_linear_relu2(c).saturated, 1);
}

TEST_P(LinearTypes, WithoutReductionThereIsTheBias) {
  LinearCase c(2, 0, 8, Array(GetParam(), 0), Array(GetParam(), 0));
  EXPECT_EQ(cpu_linear_relu2(c).y.numbers(), Numbers(16, 0));
  c.bias = Array(c.hidden_dtype, Numbers{1, -1, 2, 0, 3, 0, 0, 4});
  EXPECT_EQ(cpu_linear_relu2(c).y.numbers(), (Numbers{1, 0, 4, 0, 9, 0, 0, 16, 1, 0, 4, 0, 9, 0, 0, 16}));
}

TEST_P(LinearTypes, StatisticsAddToWhatIsThere) {
  LinearCase c = small(GetParam(), 32);
  c.y_dtype = kFP8;
  c.scale_y = {1.0f / 512};
  CompressedResult out(c, kFP8);
  out.amax = 100;
  out.saturated = 5;
  LinearCompressArgs args{c.args(), out.values.data(), out.meta.data(), kFP8};
  args.linear.amax = &out.amax;
  args.linear.saturated = &out.saturated;
  cpu::linear_compress(args);
  EXPECT_EQ(out.amax, 100);
  EXPECT_EQ(out.saturated, 7);
  args.linear.amax = nullptr;  // not wanted
  args.linear.saturated = nullptr;
  cpu::linear_compress(args);
}

TEST_P(LinearTypes, MetadataOfFp8BesideOtherValues) {
  LinearCase c = LinearCase::integers(GetParam(), 37, 48, 160, 5);
  const CompressedResult out = cpu_linear_compress(c, kFP8);
  EXPECT_EQ(out.values.first_difference(cpu_linear_compress(c, c.y_dtype).values), -1);
  c.y_dtype = kFP8;
  c.scale_y = {1};
  EXPECT_EQ(out.meta, cpu_linear_compress(c, kFP8).meta);
}

INSTANTIATE_TEST_SUITE_P(All, LinearTypes, testing::Values(kBF16, kFP16, kFP32, kFP8),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(Linear, PreActivationIsRoundedBeforeTheSquare) {
  // h = 257 lies between the bf16 numbers 256 and 258: 256^2, not 257^2, whatever y is stored as.
  LinearCase c(1, 2, 8, Array(kBF16, Numbers{1, 1}), Array(kBF16, Numbers(16, 0)));
  c.w.set(0, 256);
  c.w.set(1, 1);
  const DenseResult out = cpu_linear_relu2(c);
  EXPECT_EQ(out.y[0], 65536);
  EXPECT_EQ(out.amax, 65536);
}

/// Of float16 numbers whose squares are all zero, the largest are kept, as of their squares.
TEST(Linear, RootsAndSquaresHaveOnePattern) {
  LinearCase c(1, 1, 16, Array(kFP16, Numbers{1}), Array(kFP16, Numbers(16, 0)));
  for (int i = 0; i < 4; ++i) c.w.set(i, std::ldexp(1 + i, -16));
  const CompressedResult squares = cpu_linear_compress(c, kFP16);
  c.activation = Activation::kRelu;
  const CompressedResult roots = cpu_linear_compress(c, kFP16);
  EXPECT_EQ(roots.meta, squares.meta);
  EXPECT_EQ(roots.meta[0] & 0xF, 2 | 3 << 2);
  EXPECT_EQ(squares.values.numbers(), Numbers(8, 0));
  EXPECT_EQ((Numbers{roots.values[0], roots.values[1]}), (Numbers{std::ldexp(3, -16), std::ldexp(4, -16)}));
}

TEST(Linear, NanIsKeptAndDoesNotCount) {
  LinearCase c = small(kBF16, 32);
  c.w.set(2, NAN);  // h = 1, NaN, 3, 4
  c.y_dtype = kFP8;
  c.scale_y = {1.0f / 512};
  const CompressedResult out = cpu_linear_compress(c, kFP8);
  EXPECT_EQ(out.values.code(0), 0x7Fu);
  EXPECT_EQ(out.values[1], 448);
  EXPECT_EQ(out.meta[0] & 0xF, 1 | 3 << 2);
  EXPECT_EQ(out.amax, 16);
  EXPECT_EQ(out.saturated, 1);
  c.y_dtype = kBF16;
  c.scale_y.clear();
  EXPECT_EQ(cpu_linear_relu2(c).y.code(1), 0x7FFFu);
}

TEST(Linear, NothingIsCountedOfSixteenBits) {
  LinearCase c(1, 1, 8, Array(kFP16, Numbers{300}), Array(kFP16, Numbers(8, 1)));
  const DenseResult out = cpu_linear_relu2(c);
  EXPECT_EQ(out.y.code(0), 0x7C00u) << "90000 is no float16";
  EXPECT_EQ(out.amax, 90000);
  EXPECT_EQ(out.saturated, 0);
}

using StepsCase = std::tuple<DType, OutScale>;
class LinearSteps : public testing::TestWithParam<StepsCase> {};

/// h by loops in double precision, which are exact here, then the separate steps.
TEST_P(LinearSteps, EqualProductAndCompress) {
  const auto [dtype, kind] = GetParam();
  LinearCase c = LinearCase::integers(dtype, 130, 136, 96, 1);
  c.add_scales_and_bias(3);
  c.scale_output(kind);
  Array h(c.hidden_dtype, c.tokens * c.out);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t f = 0; f < c.out; ++f) {
      double sum = 0;
      for (int64_t k = 0; k < c.in; ++k) sum += c.x[t * c.in + k] * c.w[f * c.in + k];
      h.set(t * c.out + f, sum * c.scale_x[t] * c.scale_w[f] + (*c.bias)[f]);
    }
  }
  const How how{Dim::kFeatures, Activation::kRelu2, kind == OutScale::kOne ? Scaling::kTensor : Scaling::kRow,
                c.scale_y};
  const Compressed expected = cpu_compress(h, c.tokens, c.out, c.y_dtype, how);
  const CompressedResult out = cpu_linear_compress(c, c.y_dtype);
  EXPECT_EQ(out.values.first_difference(expected.values), -1);
  EXPECT_EQ(out.meta, expected.meta);

  const DenseResult dense = cpu_linear_relu2(c);
  double amax = 0;
  int32_t saturated = 0;
  for (int64_t i = 0; i < h.size(); ++i) {
    const float root = static_cast<float>(std::max(h[i], 0.0)), y = root * root;
    float scale = kind == OutScale::kNone ? 1.0f : c.scale_y[kind == OutScale::kOne ? 0 : i / c.out];
    if (std::fabs(scale) < FLT_MIN) scale = FLT_MIN;
    amax = std::max<double>(amax, y);
    saturated += std::fabs(y * (1.0f / scale)) > 448.0f;
    ASSERT_EQ(dense.y.code(i), encode(c.y_dtype, y * (1.0f / scale))) << i;
  }
  EXPECT_EQ(dense.amax, amax);
  EXPECT_EQ(out.amax, amax);
  EXPECT_EQ(dense.saturated, kind == OutScale::kNone ? 0 : saturated);
  if (kind != OutScale::kNone) {
    EXPECT_GT(out.saturated, 0);
    EXPECT_LE(out.saturated, saturated);
  }
}

INSTANTIATE_TEST_SUITE_P(All, LinearSteps,
                         testing::Combine(testing::Values(kBF16, kFP16, kFP32, kFP8),
                                          testing::Values(OutScale::kNone, OutScale::kOne, OutScale::kPerToken,
                                                          OutScale::kUnusual)));

}  // namespace
}  // namespace sparse24::test
