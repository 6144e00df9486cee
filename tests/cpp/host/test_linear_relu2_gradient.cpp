/// @file
/// The CPU linear_relu2_gradient: products that a person can check, and the separate steps.
#include <gtest/gtest.h>

#include "support/relu2_gradient_case.h"

namespace sparse24::test {
namespace {

using Numbers = std::vector<double>;

class Relu2GradientTypes : public testing::TestWithParam<DType> {};

/// Two tokens: dy = (1, 2, 3, 4) times 1 and times -1, y = 0, 1, 4, 9 and 16, 0, 0, 25.
Relu2GradientCase small(DType dtype) {
  return {2,
          1,
          4,
          Array(dtype, Numbers{1, -1}),
          Array(dtype, Numbers{1, 2, 3, 4}),
          Array(dtype, Numbers{0, 1, 4, 9, 16, 0, 0, 25})};
}

TEST_P(Relu2GradientTypes, Small) {
  const Array dh = cpu_linear_relu2_gradient(small(GetParam()));
  EXPECT_EQ(dh.numbers(), (Numbers{0, 4, 12, 24, -8, 0, 0, -40}));
}

TEST_P(Relu2GradientTypes, SmallRoots) {
  Relu2GradientCase c = small(GetParam());
  for (int64_t i = 0; i < c.y.size(); ++i) c.y.set(i, std::sqrt(c.y[i]));
  c.roots = true;
  EXPECT_EQ(cpu_linear_relu2_gradient(c).numbers(), (Numbers{0, 4, 12, 24, -8, 0, 0, -40}));
}

TEST_P(Relu2GradientTypes, WithoutReductionThereIsNoGradient) {
  Relu2GradientCase c = small(GetParam());
  c.in = 0;
  EXPECT_EQ(cpu_linear_relu2_gradient(c).numbers(), Numbers(8, 0));
}

TEST_P(Relu2GradientTypes, RowsOfTheGradientMayBeApart) {
  const Relu2GradientCase c = small(GetParam());
  Array dh(GetParam(), c.y.size());
  LinearRelu2GradientArgs args = relu2_gradient_args(c, dh);
  const Array apart(GetParam(), Numbers{1, NAN, NAN, -1});
  args.grad = apart.data();
  args.ld_grad = 3;
  cpu::linear_relu2_gradient(args);
  EXPECT_EQ(dh.first_difference(cpu_linear_relu2_gradient(c)), -1);
}

TEST_P(Relu2GradientTypes, NanOfYReachesItsOwnPlaceOnly) {
  Relu2GradientCase c = small(GetParam());
  c.y.set(2, NAN);
  const Numbers dh = cpu_linear_relu2_gradient(c).numbers();
  for (size_t i = 0; i < dh.size(); ++i) EXPECT_EQ(std::isnan(dh[i]), i == 2) << i;
}

/// dy by loops in double precision, which are exact here, then the root.
TEST_P(Relu2GradientTypes, EqualsTheSeparateSteps) {
  const DType dtype = GetParam();
  const Relu2GradientCase c = Relu2GradientCase::integers(dtype, 131, 70, 200, 1, /*specials=*/true);
  Array expected(dtype, c.y.size());
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t f = 0; f < c.features; ++f) {
      double dy = 0;
      for (int64_t k = 0; k < c.in; ++k) dy += c.grad[t * c.in + k] * c.w[k * c.features + f];
      const int64_t at = t * c.features + f;
      const bool infinite = c.y.code(at) == format_of(dtype).first_special;
      const float y = infinite ? INFINITY : static_cast<float>(c.y[at]);
      const float product = static_cast<float>(dy) * (2 * std::sqrt(y));
      expected.set_code(at, std::isnan(product) && dtype != DType::kFloat32 ? 0x7FFFu : encode(dtype, product));
    }
  }
  EXPECT_EQ(cpu_linear_relu2_gradient(c).first_difference(expected), -1);
}

INSTANTIATE_TEST_SUITE_P(All, Relu2GradientTypes, testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat32),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(LinearRelu2Gradient, RoundsDyBeforeTheRoot) {
  // dy = 257 lies between the bf16 numbers 256 and 258: 256 * 2 * 3.
  const DType dtype = DType::kBFloat16;
  const Relu2GradientCase c{
      1, 2, 1, Array(dtype, Numbers{1, 1}), Array(dtype, Numbers{256, 1}), Array(dtype, Numbers{9})};
  EXPECT_EQ(cpu_linear_relu2_gradient(c)[0], 1536);
}

TEST(LinearRelu2Gradient, RootsHaveADerivativeWhereSquaresUnderflow) {
  const DType dtype = DType::kFloat16;
  const Relu2GradientCase c{
      1, 1, 1, Array(dtype, Numbers{1}), Array(dtype, Numbers{5}), Array(dtype, Numbers{std::ldexp(3, -16)}), true};
  EXPECT_EQ(cpu_linear_relu2_gradient(c)[0], std::ldexp(30, -16));
}

TEST(LinearRelu2Gradient, InfinityTimesTheRootOfZeroIsNan) {
  const DType dtype = DType::kFloat16;
  const Relu2GradientCase c{
      1, 1, 2, Array(dtype, Numbers{256}), Array(dtype, Numbers{256, 256}), Array(dtype, Numbers{0, 1})};
  const Array dh = cpu_linear_relu2_gradient(c);
  EXPECT_EQ(dh.code(0), 0x7FFFu);
  EXPECT_EQ(dh.code(1), 0x7C00u);
}

}  // namespace
}  // namespace sparse24::test
