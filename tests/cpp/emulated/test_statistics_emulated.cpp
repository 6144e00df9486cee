/// @file
/// What a thread counts of y, on the host: numbers at the edge of what float8_e4m3fn holds.
#include <gtest/gtest.h>

#include <cmath>

#include "emulator/epilogue.h"
// After it.
#include "gemm/sm90/epilogues/linear.cuh"

namespace sparse24::emulate {
namespace {

TEST(StatisticsEmulated, TheLargestNumberOfFp8DoesNotSaturate) {
  cuda::ActivationStatistics seen;
  seen.see(448.f, 1.f);
  seen.see(9.f, 1.f / (9.f / 448.f));
  EXPECT_EQ(seen.saturated, 0);
  seen.see(std::nextafter(448.f, 449.f), 1.f);
  seen.see(INFINITY, 1.f);
  EXPECT_EQ(seen.saturated, 2);
}

TEST(StatisticsEmulated, WhatIsNotScaledCannotSaturate) {
  cuda::ActivationStatistics seen;
  seen.see(3e38f, 0.f);
  EXPECT_EQ(seen.saturated, 0);
  EXPECT_EQ(seen.amax, 3e38f);
}

TEST(StatisticsEmulated, NanIsNoMaximum) {
  cuda::ActivationStatistics seen;
  for (float y : {NAN, 2.f, NAN}) seen.see(y, 1.f);
  EXPECT_EQ(seen.amax, 2.f);
  EXPECT_EQ(seen.saturated, 0);
}

}  // namespace
}  // namespace sparse24::emulate
