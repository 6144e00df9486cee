/// @file
/// The epilogue of linear_gradient with a packed weight, whose rows are features, on the host, against the CPU
/// reference.
#include <gtest/gtest.h>

#include "emulator/gradient.h"
// After it.
#include "gemm/sm90/epilogues/gradient_transposed.cuh"

namespace sparse24::emulate {
namespace {

template <class T>
class GradientTransposedEmulated : public testing::Test {
 protected:
  using Tile = emulate::Tile<128, 192, Schedule::kPingpong, /*kSparse=*/true>;

  DyCase problem(int tokens, int features, bool specials = false, bool interleaved = false) const {
    return {tokens, features, DTypeOf<T>::value, /*fp8_meta=*/false, specials, interleaved};
  }
  void compare(const DyCase& d, Order order = Order::kForward, bool tokens = true) {
    using Epilogue = cuda::TransposedGradientEpilogue<T, Tile::kM, Tile::kN>;
    const auto dy = [of_place = d.dy()](int row, int column, int batch) {
      return of_place(cuda::place_of_column(column), cuda::place_of_row(row), batch);
    };
    compare_gradient<T>(d, tokens, /*counted=*/false, [&](const cuda::GradientParams<T>& params) {
      run_epilogue<Epilogue, Tile>(params, d.features, d.tokens, dy, order);
    });
  }
};
using Types = testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(GradientTransposedEmulated, Types);

/// Groups of 16 tokens and of 32 features; tails of metadata atoms and of tiles; whole tiles.
constexpr int kSizes[][2] = {{16, 32}, {32, 64}, {48, 96}, {64, 128}, {80, 288}, {192, 160}, {208, 32}, {384, 512}};

TYPED_TEST(GradientTransposedEmulated, EqualsTheReference) {
  for (const auto& [tokens, features] : kSizes) this->compare(this->problem(tokens, features));
}

TYPED_TEST(GradientTransposedEmulated, EqualsTheReferenceOnNanAndInfinities) {
  for (const auto& [tokens, features] : kSizes) this->compare(this->problem(tokens, features, /*specials=*/true));
}

TYPED_TEST(GradientTransposedEmulated, ReadsAnyMetadataAsTheReferenceDoes) {
  for (const auto& [tokens, features] : kSizes) {
    DyCase d = this->problem(tokens, features, /*specials=*/true, /*interleaved=*/features % 64 == 0);
    d.hostile = true;
    this->compare(d);
  }
}

TYPED_TEST(GradientTransposedEmulated, WritesNothingAlongTokensUnlessItIsWanted) {
  this->compare(this->problem(208, 288, /*specials=*/true, /*interleaved=*/true), Order::kForward, /*tokens=*/false);
}

TYPED_TEST(GradientTransposedEmulated, FindsTheTokensOfInterleavedRows) {
  for (const auto& [tokens, features] : kSizes) {
    this->compare(this->problem(tokens, features, /*specials=*/false, /*interleaved=*/true));
  }
}

TYPED_TEST(GradientTransposedEmulated, RootsEqualTheReference) {
  if constexpr (!cuda::kHasRoots<TypeParam>) GTEST_SKIP() << "this kernel takes squares alone";
  for (bool specials : {false, true}) {
    DyCase c = this->problem(208, 288, specials, /*interleaved=*/specials);
    c.activation = Activation::kRelu;
    for (bool tokens : {true, false}) this->compare(c, Order::kForward, tokens);
  }
}

TYPED_TEST(GradientTransposedEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) this->compare(this->problem(304, 480, /*specials=*/true), order);
}

}  // namespace
}  // namespace sparse24::emulate
