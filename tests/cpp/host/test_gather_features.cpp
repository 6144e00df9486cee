/// @file
/// The CPU gather_features.
#include <gtest/gtest.h>

#include "sparse24/gather_features.h"
#include "support/compressed.h"

namespace sparse24::test {
namespace {

class GatherFeatures : public testing::TestWithParam<DType> {};

/// x = 1, 2, 0, 0, 0, 0, 0, 3 and zeros: kept values where they are asked for, zeros elsewhere, NaN beside the matrix.
TEST_P(GatherFeatures, Small) {
  Array x(GetParam() == DType::kFloat8E4M3 ? DType::kBFloat16 : GetParam(), std::vector<double>(32, 0));
  x.set(0, 1);
  x.set(1, 2);
  x.set(7, 3);
  How how;
  how.given_scale = {1};
  const Compressed a = cpu_compress(x, 1, 32, GetParam(), how);
  const std::vector<int64_t> features{7, -1, 1, 0, 2, 32, 7, int64_t{1} << 40};
  Array out(GetParam(), static_cast<int64_t>(features.size()));
  cpu::gather_features({a.a, a.values.data(), a.meta.data(), GetParam(), features.data(), out.size(), out.data()});
  const std::vector<double> expected{3, NAN, 2, 1, 0, NAN, 3, NAN};
  for (int64_t i = 0; i < out.size(); ++i) {
    const double e = expected[static_cast<size_t>(i)];
    EXPECT_TRUE(std::isnan(e) ? std::isnan(out[i]) : out[i] == e) << i << ": " << out[i];
  }
}

INSTANTIATE_TEST_SUITE_P(All, GatherFeatures,
                         testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat8E4M3),
                         [](const auto& info) { return std::string(name_of(info.param)); });

}  // namespace
}  // namespace sparse24::test
