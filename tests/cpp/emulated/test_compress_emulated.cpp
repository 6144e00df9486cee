/// @file
/// The epilogue of linear_compress on the host, for every tile and type, against the CPU reference.
#include <gtest/gtest.h>

#include "emulator/linear.h"
// After it.
#include "gemm/sm90/epilogues/compress.cuh"

namespace sparse24::emulate {
namespace {

using test::Array;

template <class Kernel>
class CompressEmulated : public testing::Test {
 protected:
  using Tile = typename Kernel::Tile;
  using T = typename Kernel::PreActivation;
  static constexpr DType kPreActivation = Kernel::kPreActivation;

  /// The epilogue's values, metadata with its padding and statistics are the reference's; nothing else is written.
  template <bool kFp8Values, bool kFp8Meta>
  void compare(const EpilogueCase& h, Order order, Beyond beyond = Beyond::kTiles) {
    SCOPED_TRACE(testing::PrintToString(h) + (kFp8Meta ? ", fp8 metadata" : ""));
    const LinearCase c = h.linear();
    const auto expected = compressed_reference(c, kFp8Meta ? DType::kFloat8E4M3 : kPreActivation, h.sums());
    Guarded values(expected.values.bytes()), meta(expected.a.meta_bytes());
    test::LinearStatistics seen;
    const cuda::CompressParams params{params_of(c, h.statistics ? &seen : nullptr), expected.a, values.data(),
                                      meta.data<uint8_t>()};
    using Steps = cuda::CompressEpilogue<T, kFp8Values, kFp8Meta, Tile::kM, Tile::kN>;
    run_epilogue<typename Kernel::template Hosted<Steps>, Tile>(params, h.tokens, h.out, h.sums(), order, 1, beyond);
    Array got(c.y_dtype, expected.values.size());
    std::memcpy(got.data(), values.data(), got.bytes());
    const int64_t at = got.first_difference(expected.values), row = h.out / 2;
    ASSERT_EQ(at, -1) << "values[" << at / row << ", " << at % row << "]";
    const auto different = std::mismatch(expected.meta.begin(), expected.meta.end(), meta.data<uint8_t>()).first;
    ASSERT_EQ(different - expected.meta.begin(), meta.bytes()) << "the first byte of the metadata that differs";
    ASSERT_TRUE(values.intact() && meta.intact());
    if (h.statistics) expect_equal(seen, expected);
  }
  /// 16-bit values with both layouts of the metadata, or fp8 values.
  void compare(const EpilogueCase& h, Order order = Order::kForward) {
    if (h.out_scale != OutScale::kNone) return compare<true, true>(h, order);
    compare<false, false>(h, order);
    compare<false, true>(h, order);
  }
};
TYPED_TEST_SUITE(CompressEmulated, LinearKernels, LinearKernelName);

/// One token, tails of the tiles and of the metadata's atoms in tokens and features, whole tiles.
constexpr int kSizes[][2] = {{1, 32}, {127, 64}, {5, 192}, {129, 288}, {130, 576}, {256, 512}};

TYPED_TEST(CompressEmulated, EqualsTheReference) {
  for (const auto& [tokens, out] : kSizes) {
    for (OutScale scale : {OutScale::kNone, OutScale::kOne, OutScale::kPerToken, OutScale::kUnusual}) {
      this->compare({tokens, out, this->kPreActivation, scale});
    }
  }
}

/// Features that suit the 16-bit format only.
TYPED_TEST(CompressEmulated, TakesMultiplesOf16) {
  this->template compare<false, false>({5, 16, this->kPreActivation}, Order::kForward);
  this->template compare<false, false>({129, 272, this->kPreActivation}, Order::kForward);
}

/// The last 128 columns of fp8 metadata end behind the last tile: it pads them, whether others follow or not.
TYPED_TEST(CompressEmulated, PadsWhatNoTileCovers) {
  for (const auto& [tokens, out] : kSizes) {
    this->template compare<true, true>({tokens, out, this->kPreActivation, OutScale::kOne}, Order::kForward,
                                       Beyond::kNone);
    this->template compare<false, true>({tokens, out, this->kPreActivation}, Order::kForward, Beyond::kNone);
  }
}

TYPED_TEST(CompressEmulated, TakesScalesBiasAndStatisticsOrNone) {
  for (Scales given : {Scales::kNone, Scales::kOne}) {
    EpilogueCase h{129, 288, this->kPreActivation, OutScale::kNone, given};
    h.statistics = given == Scales::kOne;
    this->compare(h);
    h.out_scale = OutScale::kOne;
    this->compare(h);
  }
}

TYPED_TEST(CompressEmulated, EqualsTheReferenceOnNanAndInfinities) {
  EpilogueCase h{129, 288, this->kPreActivation};
  h.specials = true;
  this->compare(h);
  h.out_scale = OutScale::kPerToken;
  this->compare(h);
}

/// Plain relu, with statistics and without; training in float16 stores it.
TYPED_TEST(CompressEmulated, ReluEqualsTheReference) {
  for (bool specials : {false, true}) {
    EpilogueCase h{129, 288, this->kPreActivation};
    h.specials = specials;
    h.activation = Activation::kRelu;
    h.statistics = specials;
    this->compare(h);
    h.out_scale = OutScale::kPerToken;
    this->compare(h);
  }
}

/// On a number of h, between two of them, and beyond all; with scales and bias, and without.
TYPED_TEST(CompressEmulated, ThresholdEqualsTheReference) {
  for (float threshold : {4.f, 2.3f, 3e38f}) {
    for (Scales given : {Scales::kNone, Scales::kEach}) {
      EpilogueCase h{129, 288, this->kPreActivation, OutScale::kNone, given};
      h.activation = {Activation::kRelu2, threshold};
      h.specials = given == Scales::kEach;
      this->compare(h);
      h.out_scale = OutScale::kPerToken;
      this->compare(h);
    }
  }
}

TYPED_TEST(CompressEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) {
    this->compare({300, 992, this->kPreActivation}, order);
    this->compare({300, 992, this->kPreActivation, OutScale::kPerToken}, order);
  }
}

}  // namespace
}  // namespace sparse24::emulate
