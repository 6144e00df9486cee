/// @file
/// The epilogue of linear_relu2_gradient_fp8 on the host, against the CPU reference.
#include <gtest/gtest.h>

#include "emulator/epilogue.h"
// After it.
#include "gemm/sm90/epilogues/relu2_gradient_fp8.cuh"
#include "sparse24/linear_relu2_gradient_fp8.h"
#include "support/array.h"

namespace sparse24::emulate {
namespace {

using test::Array;
using Tile = emulate::Tile<128, 192, Schedule::kPingpong>;
constexpr DType kFp8 = DType::kFloat8E4M3;

void expect_equal(Guarded& got, const Array& expected, const std::string& what) {
  const auto* bytes = got.data<const uint8_t>();
  const auto* wanted = static_cast<const uint8_t*>(expected.data());
  EXPECT_EQ(std::mismatch(bytes, bytes + got.bytes(), wanted).first - bytes, got.bytes())
      << "the first byte that differs, of " << what;
  EXPECT_TRUE(got.intact()) << what;
}

/// Every output is the reference's with its padding; nothing else is written, and nothing beside the inputs is read.
void compare(int tokens, int features, bool specials, Order order = Order::kForward) {
  SCOPED_TRACE(testing::Message() << tokens << " x " << features);
  constexpr int kIn = 16;
  Array grad = test::random_integers(kFp8, int64_t{tokens} * kIn, 3, 1);
  const Array w = test::random_integers(kFp8, int64_t{features} * kIn, 3, 2);
  const Array h = test::random_activations(DType::kBFloat16, int64_t{tokens} * features, 3, specials);
  Array y(kFp8, h.size());
  for (int64_t i = 0; i < h.size(); ++i) y.set(i, h[i] < 0 ? 0 : h[i] * h[i]);
  if (specials) grad.set(7 % grad.size(), NAN);
  const float scales[] = {0.75f, 1.25f, 0.3f, 0.02f};
  const int64_t pitch = round_up(tokens, 32);
  Array dh(kFp8, h.size()), y_t(kFp8, features * pitch), dh_t = y_t;
  float amax = 0, got_amax = 0;
  int32_t saturated = 0, got_saturated = 0;
  cpu::linear_relu2_gradient_fp8({tokens, kIn, features, grad.data(), kIn, w.data(), &scales[0], &scales[1], &scales[2],
                                  &scales[3], y.data(), dh.data(), y_t.data(), dh_t.data(), nullptr, &amax,
                                  &saturated});

  Guarded in(y.bytes()), out(dh.bytes()), y_out(y_t.bytes()), dh_out(dh_t.bytes());
  std::memcpy(in.data(), y.data(), static_cast<size_t>(y.bytes()));
  const cuda::Relu2GradientFp8Params params{
      tokens,
      features,
      in.data<uint8_t>(),
      out.data<uint8_t>(),
      y_out.data<uint8_t>(),
      dh_out.data<uint8_t>(),
      {&scales[0], &scales[1], &scales[2], &scales[3], &got_amax, &got_saturated}};
  // Beyond the last row and column there is what must reach nothing.
  const auto dy = [&](int row, int column, int) {
    const int token = cuda::place_of_row(row);
    if (token >= tokens || column >= features) return (row + column) % 3 == 0 ? NAN : 5000.f;
    double sum = 0;
    for (int i = 0; i < kIn; ++i) sum += grad[token * kIn + i] * w[column * kIn + i];
    return static_cast<float>(sum);
  };
  run_epilogue<cuda::Relu2GradientFp8Epilogue<Tile::kM, Tile::kN>, Tile>(params, tokens, features, dy, order);
  expect_equal(out, dh, "dh");
  expect_equal(y_out, y_t, "y transposed");
  expect_equal(dh_out, dh_t, "dh transposed");
  EXPECT_TRUE(in.intact());
  EXPECT_EQ(got_amax, amax);
  EXPECT_EQ(got_saturated, saturated);
}

/// One token; tails of groups, of the padding and of tiles, in tokens and in features; whole tiles.
constexpr int kSizes[][2] = {{1, 16},   {2, 64},   {3, 80},    {31, 192},  {32, 32},
                             {65, 224}, {128, 48}, {129, 288}, {256, 512}, {261, 400}};

TEST(Relu2GradientFp8Emulated, EqualsTheReference) {
  for (bool specials : {false, true}) {
    for (const auto& [tokens, features] : kSizes) compare(tokens, features, specials);
  }
}

TEST(Relu2GradientFp8Emulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) compare(301, 480, /*specials=*/true, order);
}

}  // namespace
}  // namespace sparse24::emulate
