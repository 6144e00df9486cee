/// @file
/// densest_features on the device: what the CPU reference gives, and nothing beside it.
#include "sparse24/densest_features.h"
#include "support/densest_cases.h"
#include "support/device_buffer.h"

namespace sparse24::test {
namespace {

class DensestFeaturesGpu : public GpuTest, public testing::WithParamInterface<Counts> {};

TEST_P(DensestFeaturesGpu, EqualsTheReference) {
  for (int64_t features : {1, 33, 1024, 5000, 16384, 32768, 32769, 200001}) {
    const auto counts = make_counts(GetParam(), features);
    DeviceBuffer in(counts);
    for (int64_t k : some_k(features)) {
      SCOPED_TRACE(testing::Message() << k << " of " << features);
      std::vector<int64_t> expected(static_cast<size_t>(k));
      DeviceBuffer out(8 * k);
      cpu::densest_features({counts.data(), features, k, expected.data()});
      uploads_done();
      cuda::densest_features({in.data<int32_t>(), features, k, out.data<int64_t>()}, stream_);
      synchronize();
      EXPECT_EQ(first_difference(out.to_host<int64_t>(), expected), -1);
      EXPECT_TRUE(in.guards_intact() && out.guards_intact());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, DensestFeaturesGpu, testing::ValuesIn(kAllCounts),
                         [](const auto& info) { return testing::PrintToString(info.param); });

}  // namespace
}  // namespace sparse24::test
