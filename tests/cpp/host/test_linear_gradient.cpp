/// @file
/// The CPU linear_gradient: products that a person can check, and the separate steps.
#include <gtest/gtest.h>

#include <limits>

#include "support/gradient_case.h"

namespace sparse24::test {
namespace {

using Numbers = std::vector<double>;

/// Two tokens and 16 features; h = 3, 1, 2, 0, ... and 0, 2, 1, 4, 0, ..., so y keeps (9, -, 4, -) and (-, 4, -, 16).
/// dy = grad @ w with w = (1, 2, 3, 4, 5, 0, ...) is the same times 1 and times -1.
GradientCase small(DType dtype) {
  Array h(dtype, Numbers(32, 0)), w(dtype, Numbers(16, 0));
  const Numbers first{3, 1, 2}, second{0, 2, 1, 4};
  for (size_t i = 0; i < first.size(); ++i) h.set(static_cast<int64_t>(i), first[i]);
  for (size_t i = 0; i < second.size(); ++i) h.set(static_cast<int64_t>(16 + i), second[i]);
  for (int i = 0; i < 5; ++i) w.set(i, i + 1);
  return {2, 1, 16, Array(dtype, Numbers{1, -1}), w, h};
}

class GradientTypes : public testing::TestWithParam<DType> {};

TEST_P(GradientTypes, Small) {
  const GradientResult out = cpu_linear_gradient(small(GetParam()));
  // dy 2 sqrt(y) = (1 * 6, -, 3 * 4, -) and (-, -2 * 4, -, -4 * 8); what is kept of zeros is zero.
  const Numbers dh = out.dh.numbers();
  EXPECT_EQ(Numbers(dh.begin(), dh.begin() + 2), (Numbers{6, 12}));
  EXPECT_EQ(Numbers(dh.begin() + 8, dh.begin() + 10), (Numbers{-8, -32}));
  EXPECT_EQ(std::count(dh.begin(), dh.end(), 0), 12);
  EXPECT_EQ(out.counts, (std::vector<int32_t>{1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

/// Roots of the same activation: the same bits, as long as squares are exact.
TEST_P(GradientTypes, RootsGiveWhatTheirSquaresGive) {
  constexpr int64_t kTokens = 131, kFeatures = 208;
  const Array grad = random_integers(GetParam(), kTokens * 24, 2, 1),
              w = random_integers(GetParam(), 24 * kFeatures, 2, 2);
  const Array h = random_integers(GetParam(), kTokens * kFeatures, 9, 3);
  const auto gradient = [&](Activation activation) {
    GradientCase c{kTokens, 24, kFeatures, grad, w, h, activation};
    c.hot = {0, 7, 207};
    return cpu_linear_gradient(c);
  };
  const GradientResult out = gradient(Activation::kRelu), expected = gradient(Activation::kRelu2);
  EXPECT_EQ(out.dh.first_difference(expected.dh), -1);
  EXPECT_EQ(out.y_tokens.values.first_difference(expected.y_tokens.values), -1);
  EXPECT_EQ(out.y_tokens.meta, expected.y_tokens.meta);
  EXPECT_EQ(out.dh_tokens.values.first_difference(expected.dh_tokens.values), -1);
  EXPECT_EQ(out.dh_tokens.meta, expected.dh_tokens.meta);
  EXPECT_EQ(out.counts, expected.counts);
  EXPECT_EQ(out.y_hot.first_difference(expected.y_hot), -1);
  EXPECT_EQ(out.dh_hot.first_difference(expected.dh_hot), -1);
}

/// Both tokens are in one group, the other two of it are padding: nothing is lost, and all groups keep (0, 1).
TEST_P(GradientTypes, SmallAlongTokens) {
  const GradientResult out = cpu_linear_gradient(small(GetParam()));
  Numbers y(32, 0), dh(32, 0);
  y[0] = 9, y[2] = 4, y[16 + 1] = 4, y[16 + 3] = 16;
  dh[0] = 6, dh[2] = 12, dh[16 + 1] = -8, dh[16 + 3] = -32;
  EXPECT_EQ(out.y_tokens.values.numbers(), y);
  EXPECT_EQ(out.dh_tokens.values.numbers(), dh);
  EXPECT_EQ(out.y_tokens.meta, std::vector<uint8_t>(1024, kMetaPaddingByte));
  EXPECT_EQ(out.dh_tokens.meta, std::vector<uint8_t>(1024, kMetaPaddingByte));
}

/// Four tokens with y = 1, 4, 9, 16 of one feature and dy = 8, 4, 1, 1: y keeps the last two, dh = 16, 16, 6, 8 the
/// first two.
TEST_P(GradientTypes, EachMatrixHasItsOwnPatternAlongTokens) {
  Array h(GetParam(), Numbers(64, 0)), w(GetParam(), Numbers(16, 0));
  for (int t = 0; t < 4; ++t) h.set(16 * t, t + 1);
  w.set(0, 1);
  const GradientCase c{4, 1, 16, Array(GetParam(), Numbers{8, 4, 1, 1}), w, h};
  const GradientResult out = cpu_linear_gradient(c);
  EXPECT_EQ(out.y_tokens.kept(0, 0), std::make_pair(2, 3));
  EXPECT_EQ((Numbers{out.y_tokens.values[0], out.y_tokens.values[16]}), (Numbers{9, 16}));
  EXPECT_EQ(out.dh_tokens.kept(0, 0), std::make_pair(0, 1));
  EXPECT_EQ((Numbers{out.dh_tokens.values[0], out.dh_tokens.values[16]}), (Numbers{16, 16}));
  EXPECT_EQ(out.counts[0], 4);
}

TEST(Interleaved, GroupsAreAQuarterApart) {
  std::vector<int64_t> tokens;
  for (int64_t row = 0; row < 10; ++row) tokens.push_back(interleaved_token(row, 10 / 4));
  EXPECT_EQ(tokens, (std::vector<int64_t>{0, 2, 4, 6, 1, 3, 5, 7, 8, 9}));
}

/// The groups of tokens are 0, 2, 4, 6 and 1, 3, 5, 7; everything else is in the order of tokens.
TEST_P(GradientTypes, InterleavedGroupsFindTheirTokens) {
  Array h(GetParam(), Numbers(8 * 16, 0)), w(GetParam(), Numbers(16, 0));
  for (int t = 0; t < 8; ++t) h.set(16 * t, t + 1);
  w.set(0, 1);
  GradientCase c{8, 1, 16, Array(GetParam(), Numbers{1, 2, 3, 4, 5, 6, 7, 8}), w, h};
  c.interleaved = true;
  const GradientResult out = cpu_linear_gradient(c);
  for (int t = 0; t < 8; ++t) EXPECT_EQ(out.dh[8 * t], 2 * (t + 1) * (t + 1)) << t;
  EXPECT_EQ((Numbers{out.y_tokens.values[0], out.y_tokens.values[16]}), (Numbers{25, 49}));  // tokens 4 and 6
  EXPECT_EQ((Numbers{out.y_tokens.values[32], out.y_tokens.values[48]}), (Numbers{36, 64}));
  EXPECT_EQ((Numbers{out.dh_tokens.values[0], out.dh_tokens.values[16]}), (Numbers{50, 98}));
}

/// One token of 160 features, h = 3 at feature 70 and 2 at feature 134, third of their groups. In the metadata of
/// float8 the token has 16 bytes, of two groups each, for the first 128 features, and 128 tokens later those of the
/// others.
TEST_P(GradientTypes, MetadataOfFloat8) {
  Array h(GetParam(), Numbers(160, 0)), w(GetParam(), Numbers(160, 1));
  h.set(70, 3);
  h.set(134, 2);
  const GradientCase plain{1, 1, 160, Array(GetParam(), Numbers{5}), w, h};
  const GradientCase c = GradientCase(plain).with_fp8_meta();
  std::vector<uint8_t> meta(2 * 128 * 16, kMetaPaddingByte);
  meta[70 / 8] = 0x84;                      // groups 16 and 17: the first keeps (0, 1), the second (0, 2)
  meta[128 * 16 + (134 - 128) / 8] = 0x84;  // groups 32 and 33 likewise
  EXPECT_EQ(c.meta, meta);
  const GradientResult out = cpu_linear_gradient(c);
  Numbers dh(80, 0);
  dh[70 / 4 * 2 + 1] = 30, dh[134 / 4 * 2 + 1] = 20;  // 5 * 2 * 3, 5 * 2 * 2
  EXPECT_EQ(out.dh.numbers(), dh);
  EXPECT_EQ(out.dh_tokens.meta, cpu_linear_gradient(plain).dh_tokens.meta);
  EXPECT_EQ(out.counts[70] + out.counts[134], 2);
}

/// Everything that is written is in the layout of its own type.
TEST_P(GradientTypes, MetadataOfFloat8ChangesNothingElse) {
  GradientCase c = GradientCase::integers(GetParam(), 131, 70, 224, 1, /*specials=*/true);
  for (bool interleaved : {false, true}) {
    c.interleaved = interleaved;
    const GradientResult expected = cpu_linear_gradient(c);
    const GradientResult out = cpu_linear_gradient(GradientCase(c).with_fp8_meta());
    EXPECT_EQ(out.dh.first_difference(expected.dh), -1);
    EXPECT_EQ(out.y_tokens.values.first_difference(expected.y_tokens.values), -1);
    EXPECT_EQ(out.dh_tokens.values.first_difference(expected.dh_tokens.values), -1);
    EXPECT_EQ(out.y_tokens.meta, expected.y_tokens.meta);
    EXPECT_EQ(out.dh_tokens.meta, expected.dh_tokens.meta);
    EXPECT_EQ(out.counts, expected.counts);
  }
}

/// Of features 0, 3 and 15: their tokens, in their own order also where the groups have another.
TEST_P(GradientTypes, HotFeaturesAreKeptWhole) {
  GradientCase c = small(GetParam());
  c.hot = {0, 3, 15};
  const GradientResult out = cpu_linear_gradient(c);
  EXPECT_EQ(out.y_hot.numbers(), (Numbers{9, 0, 0, 16, 0, 0}));
  EXPECT_EQ(out.dh_hot.numbers(), (Numbers{6, 0, 0, -32, 0, 0}));

  GradientCase many = GradientCase::integers(GetParam(), 131, 24, 208, 1, /*specials=*/true);
  for (int64_t f = 0; f < 208; f += 1 + f % 7) many.hot.push_back(f);
  for (bool interleaved : {false, true}) {
    many.interleaved = interleaved;
    const GradientResult natural = cpu_linear_gradient(many);
    for (size_t i = 0; i < many.hot.size(); ++i) {
      for (int64_t t = 0; t < 131; ++t) {
        const int64_t f = many.hot[i], at = static_cast<int64_t>(i) * 131 + t;
        const auto [i0, i1] = many.y.kept(t, f / 4);
        const bool kept = f % 4 == i0 || f % 4 == i1;
        const int64_t from = many.y.a.value_index(t, f / 4 * 2 + (f % 4 == i1));
        ASSERT_EQ(natural.y_hot.code(at), kept ? many.y.values.code(from) : 0u) << f << ", token " << t;
        ASSERT_EQ(natural.dh_hot.code(at), kept ? natural.dh.code(from) : 0u) << f << ", token " << t;
      }
    }
  }
}

/// Which rows are NaN: those whose index is none, or not above all before it.
TEST_P(GradientTypes, WrongHotFeaturesAreNan) {
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  const uint32_t nan = GetParam() == DType::kFloat32 ? 0x7FC00000 : 0x7FFF;
  const std::pair<std::vector<int64_t>, std::vector<bool>> cases[] = {
      {{-1, 0, 2, 2, 1, 3, 16}, {true, false, false, true, true, false, true}},
      {{kMin, -5, 0, kMax, 3}, {true, true, false, true, true}},
      {{2, 16, 3, 15}, {false, true, true, true}},
      {{0, 1, 2, 3, 15}, {false, false, false, false, false}},
  };
  for (const auto& [hot, bad] : cases) {
    GradientCase c = small(GetParam());
    c.hot = hot;
    const GradientResult out = cpu_linear_gradient(c);
    for (size_t i = 0; i < 2 * hot.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      EXPECT_EQ(out.y_hot.code(at) == nan, bad[i / 2]) << testing::PrintToString(hot) << " " << i;
      EXPECT_EQ(out.dh_hot.code(at) == nan, bad[i / 2]) << testing::PrintToString(hot) << " " << i;
    }
  }
}

/// What is along tokens does not depend on whether counts are, and neither is written where it is not wanted.
TEST_P(GradientTypes, NotAllIsWanted) {
  GradientCase c = GradientCase::integers(GetParam(), 37, 24, 48, 1);
  c.hot = {5, 6, 47};
  const GradientResult expected = cpu_linear_gradient(c);
  GradientResult without_counts(c), without_tokens(c);
  const GradientResult untouched(c);
  LinearGradientArgs args = gradient_args(c, without_counts);
  args.counts = nullptr;
  cpu::linear_gradient(args);
  EXPECT_EQ(without_counts.dh_tokens.values.first_difference(expected.dh_tokens.values), -1);
  EXPECT_EQ(without_counts.y_tokens.meta, expected.y_tokens.meta);
  EXPECT_EQ(without_counts.y_hot.first_difference(expected.y_hot), -1);
  EXPECT_EQ(without_counts.counts, untouched.counts);

  c.hot.clear();
  args = gradient_args(c, without_tokens);
  args.y_tokens = args.dh_tokens = {};
  args.counts = nullptr;
  cpu::linear_gradient(args);
  EXPECT_EQ(without_tokens.dh.first_difference(expected.dh), -1);
  EXPECT_EQ(without_tokens.dh_tokens.values.first_difference(untouched.dh_tokens.values), -1);
  EXPECT_EQ(without_tokens.y_tokens.meta, untouched.y_tokens.meta);
}

TEST_P(GradientTypes, WithoutReductionThereIsNoGradient) {
  GradientCase c = small(GetParam());
  c.in = 0;
  const GradientResult out = cpu_linear_gradient(c);
  EXPECT_EQ(out.dh.numbers(), Numbers(16, 0));
  EXPECT_EQ(out.y_tokens.values[0], 9);
}

TEST_P(GradientTypes, CountsAddToWhatIsThere) {
  const GradientCase c = small(GetParam());
  GradientResult out(c);
  out.counts.assign(16, 5);
  cpu::linear_gradient(gradient_args(c, out));
  EXPECT_EQ(out.counts[0], 6);
  EXPECT_EQ(out.counts[4], 5);
}

TEST_P(GradientTypes, RowsOfTheGradientMayBeApart) {
  GradientCase c = small(GetParam());
  GradientResult out(c);
  LinearGradientArgs args = gradient_args(c, out);
  const Array apart(GetParam(), Numbers{1, NAN, NAN, -1});
  args.grad = apart.data();
  args.ld_grad = 3;
  cpu::linear_gradient(args);
  EXPECT_EQ(out.dh.first_difference(cpu_linear_gradient(c).dh), -1);
}

INSTANTIATE_TEST_SUITE_P(All, GradientTypes, testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat32),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(LinearGradient, RoundsDyBeforeTheRoot) {
  // dy = 257 lies between the bf16 numbers 256 and 258: 256 * 2 * 3.
  Array h(DType::kBFloat16, Numbers(16, 0)), w(DType::kBFloat16, Numbers(32, 0));
  h.set(0, 3);
  w.set(0, 256);
  w.set(16, 1);
  const GradientCase c{1, 2, 16, Array(DType::kBFloat16, Numbers{1, 1}), w, h};
  EXPECT_EQ(cpu_linear_gradient(c).dh[0], 1536);
}

TEST(LinearGradient, RootsHaveADerivativeWhereSquaresUnderflow) {
  const DType dtype = DType::kFloat16;
  Array h(dtype, Numbers(16, 0)), w(dtype, Numbers(16, 0));
  h.set(0, std::ldexp(3, -16));
  w.set(0, 5);
  GradientCase c{1, 1, 16, Array(dtype, Numbers{1}), w, h, Activation::kRelu};
  c.hot = {0};
  const GradientResult out = cpu_linear_gradient(c);
  EXPECT_EQ(out.dh[0], std::ldexp(30, -16));
  EXPECT_EQ(out.dh_tokens.values[0], std::ldexp(30, -16));
  EXPECT_EQ(out.dh_hot[0], std::ldexp(30, -16));
  EXPECT_EQ(out.y_tokens.values[0], 0) << "the rounded square";
  EXPECT_EQ(out.y_hot[0], 0);
  EXPECT_EQ(out.counts[0], 0);
}

TEST(LinearGradient, NanCounts) {
  GradientCase c = small(DType::kBFloat16);
  c.y.values.set(0, NAN);
  const GradientResult out = cpu_linear_gradient(c);
  EXPECT_EQ(out.dh.code(0), 0x7FFFu);
  EXPECT_EQ(out.counts[0], 1);
}

/// dy by loops in double precision, which are exact here, then the separate steps.
void expect_the_separate_steps(const GradientCase& c) {
  const DType dtype = c.grad.dtype();
  Array dh(dtype, c.y.values.size()), dense[2] = {Array(dtype, Numbers(131 * 208)), Array(dtype, Numbers(131 * 208))};
  std::vector<int32_t> counts(c.features, 0);
  for (int64_t row = 0; row < c.tokens; ++row) {
    const int64_t t = interleaved_token(row, c.interleaved ? c.tokens / 4 : 0);
    for (int64_t f = 0; f < c.features; ++f) {
      const auto [i0, i1] = c.y.kept(t, f / 4);
      if (f % 4 != i0 && f % 4 != i1) continue;
      double dy = 0;
      for (int64_t k = 0; k < c.in; ++k) dy += c.grad[t * c.in + k] * c.w[k * c.features + f];
      const int64_t from = c.y.a.value_index(t, f / 4 * 2 + (f % 4 == i1)), to = row * c.features + f;
      const bool infinite = c.y.values.code(from) == format_of(dtype).first_special;
      const float y = infinite ? INFINITY : static_cast<float>(c.y.values[from]);
      const float product = static_cast<float>(dy) * (2 * std::sqrt(y));
      dh.set_code(from, std::isnan(product) && dtype != DType::kFloat32 ? 0x7FFFu : encode(dtype, product));
      dense[0].set_code(to, c.y.values.code(from));
      dense[1].set_code(to, dh.code(from));
      counts[static_cast<size_t>(f)] += y != 0;
    }
  }
  const GradientResult out = cpu_linear_gradient(c);
  EXPECT_EQ(out.dh.first_difference(dh), -1);
  EXPECT_EQ(out.counts, counts);
  const Compressed* got[2] = {&out.y_tokens, &out.dh_tokens};
  for (int i = 0; i < 2; ++i) {
    const Compressed expected = cpu_compress(dense[i], c.tokens, c.features, dtype, {Dim::kTokens});
    EXPECT_EQ(got[i]->values.first_difference(expected.values), -1);
    EXPECT_EQ(got[i]->meta, expected.meta);
  }
}

TEST_P(GradientTypes, EqualsTheSeparateSteps) {
  GradientCase c = GradientCase::integers(GetParam(), 131, 70, 208, 1, /*specials=*/true);
  expect_the_separate_steps(c);
  c.interleaved = true;
  expect_the_separate_steps(c);
}

}  // namespace
}  // namespace sparse24::test
