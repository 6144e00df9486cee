/// @file
/// feature_counts on the device: what the CPU reference gives, and nothing beside it.
#include <tuple>

#include "support/device_buffer.h"
#include "support/feature_counts_case.h"

namespace sparse24::test {
namespace {

using Case = std::tuple<DType, bool>;
class FeatureCountsGpu : public GpuTest, public testing::WithParamInterface<Case> {};

/// One token, parts of a block of tokens and of a block of threads, and more tokens than are sampled.
TEST_P(FeatureCountsGpu, EqualsTheReference) {
  const auto [dtype, fp8_meta] = GetParam();
  for (const auto& [tokens, features] :
       {std::pair<int64_t, int64_t>{0, 32}, {1, 32}, {15, 64}, {16, 1024}, {129, 1056}, {1025, 96}, {3001, 4128}}) {
    const CountsCase c(dtype, fp8_meta, tokens, features);
    DeviceBuffer values(c.x.values), meta(c.meta);
    for (int64_t samples : {1, 100, 1024, 5000}) {
      SCOPED_TRACE(testing::Message() << tokens << " x " << features << ", " << samples);
      DeviceBuffer counts(std::vector<int32_t>(static_cast<size_t>(features), -1));
      uploads_done();
      cuda::feature_counts(c.args(values.data(), meta.data<uint8_t>(), samples, counts.data<int32_t>()), stream_);
      synchronize();
      EXPECT_EQ(first_difference(counts.to_host<int32_t>(), cpu_feature_counts(c, samples)), -1);
      EXPECT_TRUE(values.guards_intact() && meta.guards_intact() && counts.guards_intact());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, FeatureCountsGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3),
                                          testing::Bool()));

}  // namespace
}  // namespace sparse24::test
