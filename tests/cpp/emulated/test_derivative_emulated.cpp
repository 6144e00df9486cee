/// @file
/// The square roots that the derivative is made of, on the host, against those of float64.
#include <gtest/gtest.h>

#include <cmath>

#include "emulator/intrinsics.h"
#include "emulator/ptx.h"
// After them.
#include "gemm/sm90/epilogues/derivative.cuh"

namespace sparse24::emulate {
namespace {

/// Of every number that is not negative, rounded once: the tiniest need the scale that they get.
template <class T>
void expect_rounded_roots() {
  for (uint32_t bits = 0; bits < 0x8000u; ++bits) {
    const float x = cuda::to_float(T{}, uint16_t(bits));
    if (std::isnan(x)) continue;
    float root[1] = {x};
    cuda::twice_roots<T>(root, /*roots=*/false);
    ASSERT_EQ(root[0], float(2 * std::sqrt(double(x)))) << "of " << x;
  }
}

TEST(DerivativeEmulated, RootsAreRoundedOnce) {
  expect_rounded_roots<__nv_bfloat16>();
  expect_rounded_roots<__half>();
}

/// float16 may have them already: they are doubled.
TEST(DerivativeEmulated, GivenRootsAreDoubled) {
  float x[3] = {0.f, 3.f, 0x1p-24f};
  cuda::twice_roots<__half>(x, /*roots=*/true);
  EXPECT_EQ(x[0], 0.f);
  EXPECT_EQ(x[1], 6.f);
  EXPECT_EQ(x[2], 0x1p-23f);
}

}  // namespace
}  // namespace sparse24::emulate
