/// @file
/// put_features on the device: what the CPU reference gives, and nothing beside it.
#include <tuple>

#include "support/device_buffer.h"
#include "support/put_features_case.h"

namespace sparse24::test {
namespace {

using Case = std::tuple<DType, bool>;
class PutFeaturesGpu : public GpuTest, public testing::WithParamInterface<Case> {};

/// Rows that are multiples of 16 bytes and others, few features and all of them.
TEST_P(PutFeaturesGpu, EqualsTheReference) {
  const auto [dtype, by_columns] = GetParam();
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {37, 61}, {264, 520}, {1030, 1664}}) {
    for (int64_t parts : {0, 1, 4, 7}) {
      for (int64_t stride : {1, 5}) {
        const PutCase c(dtype, rows, columns, by_columns, parts, stride);
        SCOPED_TRACE(testing::Message() << rows << " x " << columns << ", " << parts << " parts, every " << stride);
        DeviceBuffer out(c.out), from(c.parts), features(c.features);
        uploads_done();
        cuda::put_features(c.args(out.data(), from.data(), features.data<int64_t>()), stream_);
        synchronize();
        Array got(dtype, c.out.size());
        out.to_host(got);
        EXPECT_EQ(got.first_difference(cpu_put_features(c)), -1);
        EXPECT_TRUE(out.guards_intact() && from.guards_intact() && features.guards_intact());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, PutFeaturesGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16), testing::Bool()));

}  // namespace
}  // namespace sparse24::test
