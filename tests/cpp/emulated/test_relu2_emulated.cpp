/// @file
/// The epilogue of linear_relu2 on the host, for every tile and type, against the CPU reference.
#include <gtest/gtest.h>

#include "emulator/linear.h"
// After it.
#include "gemm/sm90/epilogues/relu2.cuh"

namespace sparse24::emulate {
namespace {

using test::Array;

test::DenseResult reference(const LinearCase& c, const Sums& sums) {
  test::DenseResult all(c);
  for (int t = 0; t < c.tokens; ++t) {
    const test::DenseResult token = cpu_linear_relu2(token_case(c, sums, t));
    std::memcpy(static_cast<char*>(all.y.data()) + t * token.y.bytes(), token.y.data(), token.y.bytes());
    add(all, token);
  }
  return all;
}

template <class Kernel>
class Relu2Emulated : public testing::Test {
 protected:
  using Tile = typename Kernel::Tile;
  using T = typename Kernel::PreActivation;
  static constexpr DType kPreActivation = Kernel::kPreActivation;

  /// The epilogue's y and statistics are the reference's, and nothing beside y is written.
  template <bool kFp8>
  void compare(const EpilogueCase& h, Order order = Order::kForward) {
    SCOPED_TRACE(testing::PrintToString(h));
    const LinearCase c = h.linear();
    const test::DenseResult expected = reference(c, h.sums());
    Guarded y(expected.y.bytes());
    test::LinearStatistics seen;
    const cuda::Relu2Params params{params_of(c, h.statistics ? &seen : nullptr), y.data()};
    using Steps = cuda::Relu2Epilogue<T, kFp8, Tile::kM, Tile::kN>;
    run_epilogue<typename Kernel::template Hosted<Steps>, Tile>(params, h.tokens, h.out, h.sums(), order);
    Array got(c.y_dtype, expected.y.size());
    std::memcpy(got.data(), y.data(), got.bytes());
    const int64_t at = got.first_difference(expected.y);
    ASSERT_EQ(at, -1) << "y[" << at / h.out << ", " << at % h.out << "]";
    ASSERT_TRUE(y.intact());
    if (h.statistics) expect_equal(seen, expected);
  }
};

TYPED_TEST_SUITE(Relu2Emulated, LinearKernels, LinearKernelName);

/// One token, tails of the tiles in tokens and features, whole tiles.
constexpr int kSizes[][2] = {{1, 32}, {127, 64}, {129, 288}, {256, 512}};

TYPED_TEST(Relu2Emulated, EqualsTheReference) {
  for (const auto& [tokens, out] : kSizes) {
    this->template compare<false>({tokens, out, this->kPreActivation});
    for (OutScale scale : {OutScale::kOne, OutScale::kPerToken, OutScale::kUnusual}) {
      this->template compare<true>({tokens, out, this->kPreActivation, scale});
    }
  }
}

TYPED_TEST(Relu2Emulated, TakesScalesBiasAndStatisticsOrNone) {
  for (Scales given : {Scales::kNone, Scales::kOne}) {
    EpilogueCase h{129, 288, this->kPreActivation, OutScale::kNone, given};
    h.statistics = given == Scales::kOne;
    this->template compare<false>(h);
    h.out_scale = OutScale::kOne;
    this->template compare<true>(h);
  }
}

TYPED_TEST(Relu2Emulated, EqualsTheReferenceOnNanAndInfinities) {
  EpilogueCase h{129, 288, this->kPreActivation};
  h.specials = true;
  this->template compare<false>(h);
  h.out_scale = OutScale::kPerToken;
  this->template compare<true>(h);
}

/// Plain relu, with statistics and without; training in float16 stores it.
TYPED_TEST(Relu2Emulated, ReluEqualsTheReference) {
  for (bool specials : {false, true}) {
    EpilogueCase h{129, 288, this->kPreActivation};
    h.specials = specials;
    h.activation = Activation::kRelu;
    h.statistics = specials;
    this->template compare<false>(h);
    h.out_scale = OutScale::kPerToken;
    this->template compare<true>(h);
  }
}

/// On a number of h, between two of them, and beyond all; with scales and bias, and without.
TYPED_TEST(Relu2Emulated, ThresholdEqualsTheReference) {
  for (float threshold : {4.f, 2.3f, 3e38f}) {
    for (Scales given : {Scales::kNone, Scales::kEach}) {
      EpilogueCase h{129, 288, this->kPreActivation, OutScale::kNone, given};
      h.activation = {Activation::kRelu2, threshold};
      h.specials = given == Scales::kEach;
      this->template compare<false>(h);
      h.out_scale = OutScale::kPerToken;
      this->template compare<true>(h);
    }
  }
}

TYPED_TEST(Relu2Emulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) {
    this->template compare<false>({300, 992, this->kPreActivation}, order);
    this->template compare<true>({300, 992, this->kPreActivation, OutScale::kPerToken}, order);
  }
}

}  // namespace
}  // namespace sparse24::emulate
