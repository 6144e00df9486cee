/// @file
/// linear_gradient_fp8 and linear_relu2_gradient_fp8 on the CPU: small literals that a person can check.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "sparse24/linear_relu2_gradient_fp8.h"
#include "support/gradient_fp8_case.h"

namespace sparse24 {
namespace {

using test::Array;
using test::GradientFp8Case;
constexpr DType kFp8 = DType::kFloat8E4M3;

/// One number of grad a token, and w of ones: dy is grad, and scales are powers of two.
GradientFp8Case small() {
  GradientFp8Case c(8, 1, 32, 1);
  c.grad = Array(kFp8, std::vector<double>{1, 2, 3, -4, 5, -6, 7, 8});
  c.w = Array(kFp8, std::vector<double>(32, 1));
  c.y = test::Compressed(8, 32, kFp8, Dim::kFeatures);
  c.y.meta.assign(c.y.meta.size(), kMetaPaddingByte);
  for (int64_t i = 0; i < c.y.values.size(); ++i) c.y.values.set(i, i % 2 ? 0 : 4);  // of each group the first is 4
  c.scales = {0.5f, 2, 4, 8};  // dh = dy * 2 * sqrt(4 * 4) = 8 dy, and its code is dy
  return c;
}

TEST(LinearGradientFp8, SmallExample) {
  GradientFp8Case c = small();
  c.hot = {0, 1, 4};
  const auto out = test::cpu_linear_gradient_fp8(c);
  for (int64_t i = 0; i < out.dh.size(); ++i) EXPECT_EQ(out.dh[i], i % 2 ? 0 : c.grad[i / 16]) << i;
  EXPECT_EQ(out.amax, 64);
  EXPECT_EQ(out.saturated, 0);
  // Of tokens 0 .. 3 the gradients of 3 and -4 stay, of 4 .. 7 those of 7 and 8; of y, which are all alike, the first
  // two.
  for (int64_t feature : {0, 4}) {
    EXPECT_EQ(out.dh_tokens.kept(feature, 0), std::make_pair(2, 3));
    EXPECT_EQ(out.dh_tokens.values[feature * 16], 3);
    EXPECT_EQ(out.dh_tokens.values[feature * 16 + 1], -4);
    EXPECT_EQ(out.dh_tokens.kept(feature, 1), std::make_pair(2, 3));
    EXPECT_EQ(out.y_tokens.kept(feature, 1), std::make_pair(0, 1));
    EXPECT_EQ(out.y_tokens.values[feature * 16 + 3], 4);
  }
  for (int64_t t = 0; t < 32; ++t) {
    EXPECT_EQ(out.y_hot[t], t < 8 ? 4 : 0);
    EXPECT_EQ(out.dh_hot[t], t < 8 ? c.grad[t] : 0);
    EXPECT_EQ(out.y_hot[32 + t], 0);
    EXPECT_EQ(out.dh_hot[64 + t], out.dh_hot[t]);
  }
}

TEST(LinearGradientFp8, InterleavedRowsAreTokensAQuarterApart) {
  GradientFp8Case c = small();
  c.interleaved = true;  // groups: tokens 0, 2, 4, 6 and 1, 3, 5, 7
  const auto out = test::cpu_linear_gradient_fp8(c);
  EXPECT_EQ(out.dh_tokens.values[0], 5);
  EXPECT_EQ(out.dh_tokens.values[1], 7);
  EXPECT_EQ(out.dh_tokens.values[2], -6);
  EXPECT_EQ(out.dh_tokens.values[3], 8);
}

TEST(LinearGradientFp8, CountsWhatExceedsTheLargestCode) {
  GradientFp8Case c = small();
  c.scales[3] = 8.0f * 8 / 448;  // the code of the largest is 448, which is no more than that
  EXPECT_EQ(test::cpu_linear_gradient_fp8(c).saturated, 0);
  c.scales[3] /= 2;  // 5, -6, 7 and 8 of eight features each
  const auto out = test::cpu_linear_gradient_fp8(c);
  EXPECT_EQ(out.saturated, 32);
  EXPECT_EQ(out.amax, 64);
}

/// The same as with the dense weight, whose codes are pruned; NaN of grad reaches what it is multiplied with.
TEST(LinearGradientFp8Packed, EqualsTheDenseWeight) {
  for (bool specials : {false, true}) {
    GradientFp8Case c(37, 64, 96, 3);
    Array wide(DType::kBFloat16, c.w.size());
    for (int64_t i = 0; i < c.w.size(); ++i) wide.set(i, c.w[i]);
    const test::Compressed packed =
        test::cpu_compress(wide, c.features, c.in, kFp8, {Dim::kFeatures, Activation::kNone, Scaling::kTensor, {1.0f}});
    for (int64_t i = 0; i < c.w.size(); ++i) {
      const auto [i0, i1] = packed.kept(i / c.in, i % c.in / 4);
      if (i % 4 != i0 && i % 4 != i1) c.w.set_code(i, 0);
    }
    if (specials) c.grad.set(5 * c.in + 6, NAN);
    test::GradientFp8Result got(c);
    LinearGradientFp8PackedArgs args{test::gradient_fp8_args(c, got), packed.meta.data(), nullptr};
    args.gradient.w = packed.values.data();
    cpu::linear_gradient_fp8_packed(args);
    const auto expected = test::cpu_linear_gradient_fp8(c);
    if (!specials) {
      EXPECT_EQ(got.dh.first_difference(expected.dh), -1);
      EXPECT_EQ(got.dh_tokens.values.first_difference(expected.dh_tokens.values), -1);
      EXPECT_EQ(got.dh_tokens.meta, expected.dh_tokens.meta);
      EXPECT_EQ(got.amax, expected.amax);
      EXPECT_EQ(got.saturated, expected.saturated);
      continue;
    }
    int nan = 0;
    for (int64_t i = 0; i < got.dh.size(); ++i) {
      const int64_t token = i / (c.features / 2), group = i % (c.features / 2) / 2;
      const auto [first, second] = c.y.kept(token, group);
      const auto [i0, i1] = packed.kept(4 * group + (i % 2 ? second : first), 1);
      const bool reached = token == 5 && (i0 == 2 || i1 == 2);
      EXPECT_EQ(std::isnan(got.dh[i]), reached) << i;
      nan += reached;
    }
    EXPECT_GT(nan, 0);
  }
}

TEST(LinearRelu2GradientFp8, SmallExample) {
  const Array grad(kFp8, std::vector<double>{1, -2, 3}), w(kFp8, std::vector<double>{1, 2});
  const Array y(kFp8, std::vector<double>{4, 0, 1, 4, 0, 16});
  const float scales[] = {1, 1, 1, 2};
  Array dh(kFp8, 6), y_t(kFp8, 64), dh_t(kFp8, 64);
  float amax = 0;
  int32_t saturated = 0;
  cpu::linear_relu2_gradient_fp8({3, 1, 2, grad.data(), 1, w.data(), &scales[0], &scales[1], &scales[2], &scales[3],
                                  y.data(), dh.data(), y_t.data(), dh_t.data(), nullptr, &amax, &saturated});
  // dy * 2 sqrt(y) / 2, dy = 1, 2; -2, -4; 3, 6
  EXPECT_EQ(dh.numbers(), (std::vector<double>{2, 0, -2, -8, 0, 24}));
  EXPECT_EQ(amax, 48);
  for (int64_t i = 0; i < 64; ++i) {
    EXPECT_EQ(y_t[i], i % 32 < 3 ? y[i % 32 * 2 + i / 32] : 0) << i;
    EXPECT_EQ(dh_t[i], i % 32 < 3 ? dh[i % 32 * 2 + i / 32] : 0) << i;
  }
}

}  // namespace
}  // namespace sparse24
