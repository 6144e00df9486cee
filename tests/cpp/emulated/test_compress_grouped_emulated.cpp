/// @file
/// The epilogue of linear_compress with a packed weight in tiles of one warpgroup on the host, against
/// the CPU reference.
#include <gtest/gtest.h>

#include "emulator/linear.h"
// After it.
#include "gemm/sm90/epilogues/compress_grouped.cuh"

namespace sparse24::emulate {
namespace {

using test::Array;

template <class T_, DType kPreActivation_>
struct Of {
  using T = T_;
  static constexpr DType kPreActivation = kPreActivation_;
};
using Types = testing::Types<Of<__nv_bfloat16, DType::kBFloat16>, Of<__half, DType::kFloat16>>;

template <class Types>
class CompressGroupedEmulated : public testing::Test {
 protected:
  using T = typename Types::T;
  using Tile = emulate::Tile<128, 192, Schedule::kPingpong, /*kSparse=*/true>;
  static constexpr DType kPreActivation = Types::kPreActivation;

  /// The epilogue's values, metadata with its padding and statistics are the reference's; nothing else is written.
  template <bool kFp8>
  void compare_values(const EpilogueCase& h, Order order) {
    SCOPED_TRACE(testing::PrintToString(h));
    const LinearCase c = h.linear();
    const Sums sums = h.sums();
    const auto expected = compressed_reference(c, kFp8 ? DType::kFloat8E4M3 : kPreActivation, sums);
    Guarded values(expected.values.bytes()), meta(expected.a.meta_bytes());
    test::LinearStatistics seen;
    const cuda::CompressParams params{params_of(c, h.statistics ? &seen : nullptr), expected.a, values.data(),
                                      meta.data<uint8_t>()};
    using Epilogue = cuda::GroupedCompressEpilogue<T, kFp8, Tile::kM, Tile::kN>;
    const auto accumulator = [&](int row, int token, int batch) { return sums(token, cuda::place_of_row(row), batch); };
    run_epilogue<Epilogue, Tile>(params, h.out, int(expected.a.m_meta), accumulator, order);
    Array got(c.y_dtype, expected.values.size());
    std::memcpy(got.data(), values.data(), got.bytes());
    const int64_t at = got.first_difference(expected.values), row = h.out / 2;
    ASSERT_EQ(at, -1) << "values[" << at / row << ", " << at % row << "]";
    const auto different = std::mismatch(expected.meta.begin(), expected.meta.end(), meta.data<uint8_t>()).first;
    ASSERT_EQ(different - expected.meta.begin(), meta.bytes()) << "the first byte of the metadata that differs";
    ASSERT_TRUE(values.intact() && meta.intact());
    if (h.statistics) expect_equal(seen, expected);
  }
  /// 16-bit values, or fp8 ones.
  void compare(const EpilogueCase& h, Order order = Order::kForward) {
    h.out_scale == OutScale::kNone ? compare_values<false>(h, order) : compare_values<true>(h, order);
  }
};
TYPED_TEST_SUITE(CompressGroupedEmulated, Types);

/// One token, tails of the tiles and of the metadata's atoms in tokens and features, whole tiles.
constexpr int kSizes[][2] = {{1, 32}, {127, 64}, {5, 192}, {257, 288}, {130, 576}, {256, 512}};

TYPED_TEST(CompressGroupedEmulated, EqualsTheReference) {
  for (const auto& [tokens, out] : kSizes) {
    for (OutScale scale : {OutScale::kNone, OutScale::kOne, OutScale::kPerToken, OutScale::kUnusual}) {
      this->compare({tokens, out, this->kPreActivation, scale});
    }
  }
}

TYPED_TEST(CompressGroupedEmulated, TakesScalesBiasAndStatisticsOrNone) {
  for (OutScale scale : {OutScale::kNone, OutScale::kOne}) {
    for (Scales given : {Scales::kNone, Scales::kOne}) {
      EpilogueCase h{129, 288, this->kPreActivation, scale, given};
      h.statistics = given == Scales::kOne;
      this->compare(h);
    }
  }
}

/// In whole tiles the largest value is found first, and only where it saturates every one is seen; in a ragged tile all
/// are. NaN does not count.
TYPED_TEST(CompressGroupedEmulated, StatisticsOfWholeTilesEqualTheReference) {
  for (OutScale scale : {OutScale::kNone, OutScale::kOne, OutScale::kPerToken, OutScale::kUnusual}) {
    for (int tokens : {192, 385}) {
      for (bool specials : {false, true}) {
        EpilogueCase h{tokens, 288, this->kPreActivation, scale};
        h.statistics = true;
        h.specials = specials;
        this->compare(h);
      }
    }
  }
}

TYPED_TEST(CompressGroupedEmulated, EqualsTheReferenceOnNanAndInfinities) {
  for (OutScale scale : {OutScale::kNone, OutScale::kPerToken}) {
    EpilogueCase h{129, 288, this->kPreActivation, scale};
    h.specials = true;
    this->compare(h);
  }
}

/// Plain relu, with statistics and without; training in float16 stores it. Thresholds on a number of h, between two of
/// them, and beyond all.
TYPED_TEST(CompressGroupedEmulated, ActivationsEqualTheReference) {
  for (bool specials : {false, true}) {
    for (const ActivationArgs& activation :
         {ActivationArgs(Activation::kRelu), ActivationArgs(Activation::kRelu2, 4.f),
          ActivationArgs(Activation::kRelu2, 2.3f), ActivationArgs(Activation::kRelu2, 3e38f)}) {
      for (OutScale scale : {OutScale::kNone, OutScale::kPerToken}) {
        EpilogueCase h{129, 288, this->kPreActivation, scale};
        h.specials = h.statistics = specials;
        h.activation = activation;
        this->compare(h);
      }
    }
  }
}

TYPED_TEST(CompressGroupedEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) {
    for (OutScale scale : {OutScale::kNone, OutScale::kPerToken}) {
      this->compare({300, 544, this->kPreActivation, scale}, order);
    }
  }
}

}  // namespace
}  // namespace sparse24::emulate
