/// @file
/// linear_compress_packed on the CPU, and the order of a packed weight's rows.
#include <gtest/gtest.h>

#include "support/packed_case.h"

namespace sparse24::test {
namespace {

TEST(Packed, RowsAndFeaturesAreEachOthersInverse) {
  for (int64_t m = 0; m < 64; ++m) {
    EXPECT_EQ(packed_row(packed_feature(m)), m);
    EXPECT_EQ(packed_feature(m) / 16, m / 16);
  }
  // Rows r and r + 8 of a fragment are neighbours.
  for (int64_t r = 0; r < 8; ++r) EXPECT_EQ(packed_feature(16 + r + 8), packed_feature(16 + r) + 1);
}

/// The same as with the pruned dense weight.
TEST(LinearCompressPacked, EqualsTheDenseWeight) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3}) {
    for (OutScale kind : {OutScale::kNone, OutScale::kPerToken}) {
      LinearCase linear = LinearCase::integers(dtype, 37, 96, 64, 1);
      linear.add_scales_and_bias(3);
      linear.scale_output(kind);
      const PackedCase c(std::move(linear));
      const CompressedResult expected = cpu_linear_compress(c.linear, c.linear.y_dtype);
      CompressedResult got(c.linear, c.linear.y_dtype);
      cpu::linear_compress_packed(c.args(c.linear.y_dtype, got.values.data(), got.meta.data()));
      EXPECT_EQ(got.values.first_difference(expected.values), -1) << name_of(dtype);
      EXPECT_EQ(got.meta, expected.meta) << name_of(dtype);
    }
  }
}

}  // namespace
}  // namespace sparse24::test
