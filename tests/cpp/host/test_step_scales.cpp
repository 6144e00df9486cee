/// @file
/// The CPU spread_scales and next_scales: numbers that a person can check.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "sparse24/step_scales.h"

namespace sparse24::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(StepScales, AreSpread) {
  const float delayed[] = {1, 2, 3, 4}, of_w2 = 5;
  std::array<float, kStepScales * kStepScaleStride> places;
  places.fill(-1);
  cpu::spread_scales({delayed, nullptr, &of_w2, places.data()});
  for (size_t i = 0; i < places.size(); ++i) {
    const bool scale = i % kStepScaleStride == 0;
    const float expected = !scale ? 0 : i < 16 ? float(i / 4 + 1) : int64_t(i) == place_of(StepScale::kW2) ? 5 : 0;
    EXPECT_EQ(places[i], expected) << i;
  }
}

TEST(StepScales, FollowTheLargestMagnitude) {
  EXPECT_EQ(next_scale(1, 448), 2);        // twice what it asks for
  EXPECT_EQ(next_scale(1, 0.448f), 0.5f);  // half of what it was
  EXPECT_EQ(next_scale(0, 4.48f), 4.48f / 448 * 2);
  for (const float nothing : {0.0f, -1.0f, kInfinity, std::nanf("")}) EXPECT_EQ(next_scale(3, nothing), 3);
  EXPECT_TRUE(std::isnan(next_scale(std::nanf(""), 1)));
}

TEST(StepScales, OfAnotherStepStayIfTheyAreLarger) {
  const float delayed[] = {1, 1, 1, 1};
  std::array<float, kStepScales * kStepScaleStride> places;
  cpu::spread_scales({delayed, nullptr, nullptr, places.data()});
  places[place_of(StepScale::kX) + kLargestBehind] = 448;
  places[place_of(StepScale::kY) + kLargestBehind] = 448;
  const float now[] = {1, 64, 0.5f, 1}, of_grad = 224, of_dh = 0;
  std::array<float, kDelayedScales> next;
  cpu::next_scales({places.data(), now, &of_grad, &of_dh, next.data()});
  EXPECT_EQ(next, (std::array<float, kDelayedScales>{2, 64, 1, 1}));
}

}  // namespace
}  // namespace sparse24::test
