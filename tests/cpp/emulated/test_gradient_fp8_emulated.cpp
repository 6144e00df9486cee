/// @file
/// The epilogue of linear_gradient_fp8 on the host, of accumulators and of a dy in memory, against the CPU reference.
#include <gtest/gtest.h>

#include "emulator/epilogue.h"
// After it.
#include "gemm/sm90/epilogues/gradient_fp8.cuh"
#include "gemm/sm90/epilogues/gradient_transposed_fp8.cuh"
#include "support/gradient_fp8_case.h"

namespace sparse24::emulate {
namespace {

using test::Array;
using test::Compressed;
using test::GradientFp8Case;
using test::GradientFp8Result;
using Tile = emulate::Tile<128, 192, Schedule::kPingpong>;

/// Guarded memory with the bytes of a host array.
Guarded guarded(const void* bytes, int64_t count) {
  Guarded out(count);
  std::memcpy(out.data(), bytes, static_cast<size_t>(count));
  return out;
}

/// The first byte that differs, and whether the guards are as they were.
void expect_equal(Guarded& got, const void* expected, const std::string& what) {
  const auto* bytes = got.data<const uint8_t>();
  const auto different = std::mismatch(bytes, bytes + got.bytes(), static_cast<const uint8_t*>(expected)).first;
  EXPECT_EQ(different - bytes, got.bytes()) << "the first byte that differs, of " << what;
  EXPECT_TRUE(got.intact()) << what;
}

struct Output {
  explicit Output(const Compressed& like) : values(like.values.bytes()), meta(static_cast<int64_t>(like.meta.size())) {}
  cuda::TokenParams params() { return {values.data(), meta.data<uint8_t>()}; }
  void compare(const Compressed& expected, const std::string& what) {
    expect_equal(values, expected.values.data(), "the values of " + what + " along tokens");
    expect_equal(meta, expected.meta.data(), "the metadata of " + what + " along tokens");
  }
  Guarded values, meta;
};

/// Runs the epilogue on accumulators. Beyond the last row and column there is what must reach nothing.
void run_on_accumulators(const GradientFp8Case& c, const cuda::GradientFp8Params& params, Order order) {
  const auto dy = [&](int row, int column, int) {
    const int place = cuda::place_of_row(row);
    if (place >= c.tokens || column >= c.features) return (row + column) % 3 == 0 ? NAN : 5000.f;
    return c.dy(interleaved_token(place, c.interleaved ? c.tokens / 4 : 0), column);
  };
  run_epilogue<cuda::GradientFp8Epilogue<Tile::kM, Tile::kN>, Tile>(params, int(c.tokens), int(c.features), dy, order);
}

/// Runs it on the CTAs of linear_gradient_fp8_packed, which has dy in memory.
void run_on_memory(const GradientFp8Case& c, const cuda::GradientFp8Params& params, Order order) {
  constexpr int kTileN = cuda::TradedPart::kColumns;
  Array rounded(DType::kBFloat16, c.tokens * c.features);
  for (int64_t i = 0; i < rounded.size(); ++i) rounded.set(i, c.dy(i / c.features, i % c.features));
  Guarded dy = guarded(rounded.data(), rounded.bytes());
  for (int m = 0; m < ceil_div(c.tokens, Tile::kM); ++m) {
    for (int n = 0; n < round_up(c.features, kMetaRowPadding) / kTileN; ++n) {
      Block(0, 128, order).run([&] {
        const cuda::GradientFp8Epilogue<Tile::kM, kTileN> epilogue(params);
        epilogue.visit_stored(dy.data<const __nv_bfloat16>(), m, n, int(threadIdx.x));
      });
    }
  }
  EXPECT_TRUE(dy.intact());
}

/// Runs the epilogue whose rows are features. Tiles cover the metadata's padding of tokens.
void run_transposed(const GradientFp8Case& c, const cuda::GradientFp8Params& params, Order order) {
  using Transposed = emulate::Tile<128, 192, Schedule::kPingpong, /*kSparse=*/true>;
  const auto dy = [&](int row, int column, int) {
    const int feature = cuda::place_of_row(row), place = cuda::place_of_column(column);
    if (place >= c.tokens || feature >= c.features) return (row + column) % 3 == 0 ? NAN : 5000.f;
    return c.dy(interleaved_token(place, c.interleaved ? c.tokens / 4 : 0), feature);
  };
  run_epilogue<cuda::TransposedGradientFp8Epilogue<Transposed::kM, Transposed::kN>, Transposed>(
      params, int(c.features), int(round_up(c.tokens, kMetaRowPadding)), dy, order);
}

/// Every output is the reference's with its padding; nothing else is written, and nothing beside the inputs is read.
template <class Run>
void compare_run(GradientFp8Case c, Order order, const Run& run) {
  SCOPED_TRACE(testing::Message() << c.tokens << " x " << c.features << (c.interleaved ? ", interleaved" : ""));
  c.hot = {0, c.features / 2 + 1, c.features - 1};
  const GradientFp8Result expected = test::cpu_linear_gradient_fp8(c);
  Guarded y = guarded(c.y.values.data(), c.y.values.bytes());
  Guarded meta = guarded(c.y.meta.data(), static_cast<int64_t>(c.y.meta.size()));
  Guarded dh(expected.dh.bytes());
  Output y_tokens(expected.y_tokens), dh_tokens(expected.dh_tokens);
  std::vector<int32_t> slots(c.features, -1);
  for (size_t i = 0; i < c.hot.size(); ++i) slots[c.hot[i]] = static_cast<int32_t>(i);
  Guarded slot_of = guarded(slots.data(), 4 * c.features);
  // What lies behind the last token is zero before.
  const std::vector<uint8_t> zeros(expected.y_hot.bytes(), 0);
  Guarded y_hot = guarded(zeros.data(), expected.y_hot.bytes()),
          dh_hot = guarded(zeros.data(), expected.dh_hot.bytes());
  float amax = 0;
  int32_t saturated = 0;

  const cuda::GradientFp8Params params{int(c.tokens),
                                       int(c.features),
                                       y.data<uint8_t>(),
                                       meta.data<uint8_t>(),
                                       dh.data<uint8_t>(),
                                       {y_tokens.params(), dh_tokens.params()},
                                       c.interleaved ? int(c.tokens / 4) : 0,
                                       {&c.scales[0], &c.scales[1], &c.scales[2], &c.scales[3], &amax, &saturated},
                                       slot_of.data<int32_t>(),
                                       {y_hot.data<uint8_t>(), dh_hot.data<uint8_t>()}};
  run(c, params, order);

  expect_equal(dh, expected.dh.data(), "dh");
  EXPECT_TRUE(y.intact() && meta.intact());
  y_tokens.compare(expected.y_tokens, "y");
  dh_tokens.compare(expected.dh_tokens, "dh");
  expect_equal(y_hot, expected.y_hot.data(), "rows of y");
  expect_equal(dh_hot, expected.dh_hot.data(), "rows of dh");
  EXPECT_EQ(amax, expected.amax);
  EXPECT_EQ(saturated, expected.saturated);
}
void compare(const GradientFp8Case& c, Order order = Order::kForward) {
  compare_run(c, order, run_on_accumulators);
  compare_run(c, order, run_on_memory);
  if (c.tokens % 32 == 0) compare_run(c, order, run_transposed);
}

/// One token; tails of groups, of metadata atoms and of tiles, in tokens and in features; whole tiles.
constexpr int kSizes[][2] = {{1, 32},   {2, 64},    {3, 96},   {4, 128},   {15, 160},  {31, 192}, {65, 224},
                             {128, 32}, {129, 288}, {160, 64}, {256, 512}, {261, 416}, {32, 96},  {448, 288}};

TEST(GradientFp8Emulated, EqualsTheReference) {
  for (const auto& [tokens, features] : kSizes) compare(GradientFp8Case(tokens, 16, features, 1));
}

TEST(GradientFp8Emulated, EqualsTheReferenceOnNan) {
  for (const auto& [tokens, features] : kSizes) compare(GradientFp8Case(tokens, 16, features, 2, /*specials=*/true));
}

TEST(GradientFp8Emulated, FindsTheTokensOfInterleavedRows) {
  for (const auto& [tokens, features] : kSizes) {
    GradientFp8Case c(tokens, 16, features, 3);
    c.interleaved = true;
    compare(c);
  }
}

TEST(GradientFp8Emulated, ReadsAnyMetadataAsTheReferenceDoes) {
  for (const auto& [tokens, features] : kSizes) {
    GradientFp8Case c(tokens, 16, features, 4, /*specials=*/true);
    c.y.keep_any(9);
    compare(c);
  }
}

TEST(GradientFp8Emulated, CountsWhatSaturatesAndFindsTheLargest) {
  GradientFp8Case c(33, 16, 64, 5);
  const float unsaturated = test::cpu_linear_gradient_fp8(c).amax / 448;
  EXPECT_GT(test::cpu_linear_gradient_fp8(c).saturated, 0);
  c.scales[3] = unsaturated * 1.01f;
  EXPECT_EQ(test::cpu_linear_gradient_fp8(c).saturated, 0);
  compare(c);
}

TEST(GradientFp8Emulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) {
    compare(GradientFp8Case(301, 16, 480, 6, /*specials=*/true), order);
    compare(GradientFp8Case(320, 16, 480, 6, /*specials=*/true), order);
  }
}

}  // namespace
}  // namespace sparse24::emulate
