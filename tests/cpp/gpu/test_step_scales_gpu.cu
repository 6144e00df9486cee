/// @file
/// spread_scales and next_scales on the device: what the CPU reference gives, and nothing beside it.
#include <limits>
#include <vector>

#include "sparse24/step_scales.h"
#include "support/device_buffer.h"

namespace sparse24::test {
namespace {

using StepScalesGpu = GpuTest;

TEST_F(StepScalesGpu, EqualTheReference) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> delayed{1, 0.3f, 7e-9f, 0}, weights{0.25f, 3}, now{1, 64, 7e-9f, 1e-12f};
  for (const auto& seen : std::vector<std::vector<float>>{{448, 1, 3e-6f, 5}, {0, infinity, 1e30f, 1e-30f}}) {
    std::vector<float> places(kStepScales * kStepScaleStride), next(kDelayedScales);
    cpu::spread_scales({delayed.data(), weights.data(), weights.data() + 1, places.data()});
    DeviceBuffer given(delayed), of_weights(weights), of_now(now), magnitudes(seen);
    DeviceBuffer spread(sizeof(float) * places.size()), found(sizeof(float) * next.size());
    uploads_done();
    const auto* w = of_weights.data<float>();
    cuda::spread_scales({given.data<float>(), w, w + 1, spread.data<float>()}, stream_);
    synchronize();
    EXPECT_EQ(spread.to_host<float>(), places);

    places[place_of(StepScale::kX) + kLargestBehind] = seen[0];
    places[place_of(StepScale::kY) + kLargestBehind] = seen[1];
    cpu::next_scales({places.data(), now.data(), &seen[2], &seen[3], next.data()});
    DeviceBuffer with_largest(places);
    uploads_done();
    const auto* largest = magnitudes.data<float>();
    cuda::next_scales({with_largest.data<float>(), of_now.data<float>(), largest + 2, largest + 3, found.data<float>()},
                      stream_);
    synchronize();
    EXPECT_EQ(found.to_host<float>(), next);
    EXPECT_TRUE(spread.guards_intact() && found.guards_intact());
  }
}

TEST_F(StepScalesGpu, WeightsWithoutScales) {
  const std::vector<float> delayed{1, 2, 3, 4};
  std::vector<float> places(kStepScales * kStepScaleStride);
  cpu::spread_scales({delayed.data(), nullptr, nullptr, places.data()});
  DeviceBuffer given(delayed), spread(sizeof(float) * places.size());
  uploads_done();
  cuda::spread_scales({given.data<float>(), nullptr, nullptr, spread.data<float>()}, stream_);
  synchronize();
  EXPECT_EQ(spread.to_host<float>(), places);
}

}  // namespace
}  // namespace sparse24::test
