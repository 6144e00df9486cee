/// @file
/// The epilogue of linear_gradient on the host, for both types and both layouts of the metadata, against the CPU
/// reference.
#include <gtest/gtest.h>

#include "emulator/gradient.h"

namespace sparse24::emulate {
namespace {

template <class T_, bool kFp8Meta_>
struct Kind {
  using T = T_;
  static constexpr bool kFp8Meta = kFp8Meta_;
};

template <class Kind>
class GradientEmulated : public testing::Test {
 protected:
  using T = typename Kind::T;
  using Tile = emulate::Tile<128, 192, Schedule::kPingpong>;

  /// With as many features as the metadata allows.
  DyCase problem(int tokens, int features, bool specials = false, bool interleaved = false) const {
    const int multiple = Kind::kFp8Meta ? 32 : 16;
    return {tokens, int(round_up(features, multiple)), DTypeOf<T>::value, Kind::kFp8Meta, specials, interleaved};
  }

  void compare(const DyCase& d, Order order = Order::kForward, bool tokens = true) {
    using Epilogue = cuda::GradientEpilogue<T, Kind::kFp8Meta, true, Tile::kM, Tile::kN>;
    const auto dy = [of_place = d.dy()](int row, int column, int batch) {
      return of_place(cuda::place_of_row(row), column, batch);
    };
    compare_gradient<T>(d, tokens, /*counted=*/true, [&](const cuda::GradientParams<T>& params) {
      run_epilogue<Epilogue, Tile>(params, d.tokens, d.features, dy, order);
    });
  }
};

using Kinds =
    testing::Types<Kind<__nv_bfloat16, false>, Kind<__half, false>, Kind<__nv_bfloat16, true>, Kind<__half, true>>;
struct KindName {
  template <class Kind>
  static std::string GetName(int) {
    return std::string(name_of(DTypeOf<typename Kind::T>::value)) + (Kind::kFp8Meta ? "_fp8_meta" : "");
  }
};
TYPED_TEST_SUITE(GradientEmulated, Kinds, KindName);

/// One token; tails of groups, of metadata atoms and of tiles, in tokens and in features; whole tiles.
constexpr int kSizes[][2] = {{1, 16},  {2, 32},   {3, 64},    {4, 80},   {5, 128},  {15, 144},  {16, 112}, {63, 256},
                             {65, 48}, {127, 64}, {129, 288}, {130, 16}, {192, 96}, {256, 512}, {261, 272}};

TYPED_TEST(GradientEmulated, EqualsTheReference) {
  for (const auto& [tokens, features] : kSizes) this->compare(this->problem(tokens, features));
}

TYPED_TEST(GradientEmulated, EqualsTheReferenceOnNanAndInfinities) {
  for (const auto& [tokens, features] : kSizes) this->compare(this->problem(tokens, features, /*specials=*/true));
}

TYPED_TEST(GradientEmulated, ReadsAnyMetadataAsTheReferenceDoes) {
  for (const auto& [tokens, features] : kSizes) {
    DyCase d = this->problem(tokens, features, /*specials=*/true, /*interleaved=*/tokens % 2 == 0);
    d.hostile = true;
    this->compare(d);
  }
}

TYPED_TEST(GradientEmulated, WritesNothingAlongTokensUnlessItIsWanted) {
  this->compare(this->problem(129, 288, /*specials=*/true, /*interleaved=*/true), Order::kForward, /*tokens=*/false);
}

TYPED_TEST(GradientEmulated, FindsTheTokensOfInterleavedRows) {
  for (const auto& [tokens, features] : kSizes) {
    this->compare(this->problem(tokens, features, /*specials=*/false, /*interleaved=*/true));
  }
}

TYPED_TEST(GradientEmulated, RootsEqualTheReference) {
  if constexpr (!cuda::kHasRoots<typename TypeParam::T>) GTEST_SKIP() << "this kernel takes squares alone";
  for (bool specials : {false, true}) {
    DyCase c = this->problem(261, 272, specials, /*interleaved=*/specials);
    c.activation = Activation::kRelu;
    for (bool tokens : {true, false}) this->compare(c, Order::kForward, tokens);
  }
}

TYPED_TEST(GradientEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) this->compare(this->problem(301, 480, /*specials=*/true), order);
}

}  // namespace
}  // namespace sparse24::emulate
