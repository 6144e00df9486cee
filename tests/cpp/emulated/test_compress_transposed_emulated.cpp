/// @file
/// The epilogue of linear_compress with a packed weight on the host, for every type, against the CPU reference.
#include <gtest/gtest.h>

#include "emulator/linear.h"
// After it.
#include "gemm/sm90/epilogues/compress_transposed.cuh"

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
class CompressTransposedEmulated : public testing::Test {
 protected:
  using T = typename Types::T;
  using Tile = emulate::Tile<128, 256, Schedule::kOverlapped, /*kSparse=*/true>;
  static constexpr DType kPreActivation = Types::kPreActivation;

  /// The epilogue's values, metadata with its padding and statistics are the reference's; nothing else is written.
  template <bool kFp8Meta>
  void compare(const EpilogueCase& h, Order order) {
    SCOPED_TRACE(testing::PrintToString(h) + (kFp8Meta ? ", fp8 metadata" : ""));
    const LinearCase c = h.linear();
    const Sums sums = h.sums();
    const auto expected = compressed_reference(c, kFp8Meta ? DType::kFloat8E4M3 : kPreActivation, sums);
    Guarded values(expected.values.bytes()), meta(expected.a.meta_bytes());
    test::LinearStatistics seen;
    const cuda::CompressParams params{params_of(c, h.statistics ? &seen : nullptr), expected.a, values.data(),
                                      meta.data<uint8_t>()};
    using Epilogue = cuda::TransposedCompressEpilogue<T, kFp8Meta, Tile::kM, Tile::kN>;
    const auto accumulator = [&](int row, int token, int batch) {
      return sums(token, int(packed_feature(row)), batch);
    };
    run_epilogue<Epilogue, Tile>(params, h.out, h.tokens, accumulator, order);
    Array got(c.y_dtype, expected.values.size());
    std::memcpy(got.data(), values.data(), got.bytes());
    const int64_t at = got.first_difference(expected.values), row = h.out / 2;
    ASSERT_EQ(at, -1) << "values[" << at / row << ", " << at % row << "]";
    const auto different = std::mismatch(expected.meta.begin(), expected.meta.end(), meta.data<uint8_t>()).first;
    ASSERT_EQ(different - expected.meta.begin(), meta.bytes()) << "the first byte of the metadata that differs";
    ASSERT_TRUE(values.intact() && meta.intact());
    if (h.statistics) expect_equal(seen, expected);
  }
  /// Both layouts of the metadata.
  void compare(const EpilogueCase& h, Order order = Order::kForward) {
    compare<false>(h, order);
    compare<true>(h, order);
  }
};
TYPED_TEST_SUITE(CompressTransposedEmulated, Types);

/// One token, tails of the tiles and of the metadata's atoms in tokens and features, whole tiles.
constexpr int kSizes[][2] = {{1, 32}, {127, 64}, {5, 192}, {257, 288}, {130, 576}, {256, 512}};

TYPED_TEST(CompressTransposedEmulated, EqualsTheReference) {
  for (const auto& [tokens, out] : kSizes) {
    this->compare({tokens, out, this->kPreActivation});
  }
}

/// Features that suit the 16-bit format only.
TYPED_TEST(CompressTransposedEmulated, TakesMultiplesOf16) {
  this->template compare<false>({5, 16, this->kPreActivation}, Order::kForward);
  this->template compare<false>({129, 272, this->kPreActivation}, Order::kForward);
}

TYPED_TEST(CompressTransposedEmulated, TakesScalesBiasAndStatisticsOrNone) {
  for (Scales given : {Scales::kNone, Scales::kOne}) {
    EpilogueCase h{129, 288, this->kPreActivation, OutScale::kNone, given};
    h.statistics = given == Scales::kOne;
    this->compare(h);
  }
}

TYPED_TEST(CompressTransposedEmulated, EqualsTheReferenceOnNanAndInfinities) {
  EpilogueCase h{129, 288, this->kPreActivation};
  h.specials = true;
  this->compare(h);
}

/// Plain relu, with statistics and without; training in float16 stores it. Thresholds on a number of h, between two of
/// them, and beyond all.
TYPED_TEST(CompressTransposedEmulated, ActivationsEqualTheReference) {
  for (bool specials : {false, true}) {
    for (const ActivationArgs& activation :
         {ActivationArgs(Activation::kRelu), ActivationArgs(Activation::kRelu2, 4.f),
          ActivationArgs(Activation::kRelu2, 2.3f), ActivationArgs(Activation::kRelu2, 3e38f)}) {
      EpilogueCase h{129, 288, this->kPreActivation};
      h.specials = h.statistics = specials;
      h.activation = activation;
      this->compare(h);
    }
  }
}

TYPED_TEST(CompressTransposedEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) {
    this->compare({300, 544, this->kPreActivation}, order);
  }
}

}  // namespace
}  // namespace sparse24::emulate
