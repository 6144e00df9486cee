/// @file
/// The selection of two of four on the host, against the rule written out.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>

#include "emulator/intrinsics.h"
#include "emulator/ptx.h"
// After them.
#include "sparsity/select24.cuh"

namespace sparse24::emulate {
namespace {

using Four = std::array<uint16_t, 4>;

/// The places of the two largest, in order; of equals the lower ones.
std::array<int, 2> two_largest(const Four& m) {
  std::array<int, 4> places{0, 1, 2, 3};
  std::stable_sort(places.begin(), places.end(), [&](int a, int b) { return m[a] > m[b]; });
  return {std::min(places[0], places[1]), std::max(places[0], places[1])};
}

/// Every group of these: zeros, neighbours, numbers that differ in the upper byte or the lower one, infinity and NaN.
template <class Check>
void for_each_group(const Check& check) {
  constexpr uint16_t kMagnitudes[] = {0, 1, 2, 0x00FF, 0x0100, 0x3F80, 0x7F80, 0x7FFF};
  for (uint16_t a : kMagnitudes)
    for (uint16_t b : kMagnitudes)
      for (uint16_t c : kMagnitudes)
        for (uint16_t d : kMagnitudes) check(Four{a, b, c, d});
}

uint32_t word(uint32_t low, uint32_t high) { return low | high << 16; }

TEST(SelectEmulated, KeepsTheTwoLargestOfEqualsTheLower) {
  for_each_group([](const Four& m) {
    const auto [first, second] = two_largest(m);
    // Values that name their places.
    const cuda::Kept kept = cuda::keep_two(word(m[0], m[1]), word(m[2], m[3]), 0xA001A000u, 0xA003A002u);
    ASSERT_EQ(kept.pair, word(0xA000u + first, 0xA000u + second)) << testing::PrintToString(m);
    ASSERT_EQ(15 - kept.complement, uint32_t(first | second << 2)) << testing::PrintToString(m);
  });
}

/// Two groups that share their words, the second in reverse.
TEST(SelectEmulated, KeepsTheTwoLargestOfBothGroups) {
  for_each_group([](const Four& low) {
    const Four high{low[3], low[1], low[2], low[0]};
    uint32_t m[4], v[4];
    for (uint32_t i = 0; i < 4; ++i) {
      m[i] = word(low[i], high[i]);
      v[i] = word(0xA000u + i, 0xB000u + i);
    }
    const cuda::KeptPairs kept = cuda::keep_two_pairs(m, v);
    const auto a = two_largest(low), b = two_largest(high);
    ASSERT_EQ(kept.first, word(0xA000u + a[0], 0xB000u + b[0])) << testing::PrintToString(low);
    ASSERT_EQ(kept.second, word(0xA000u + a[1], 0xB000u + b[1])) << testing::PrintToString(low);
    const uint32_t nibbles = word(0x1111u * (a[0] | a[1] << 2), 0x1111u * (b[0] | b[1] << 2));
    ASSERT_EQ(kept.nibbles, nibbles) << testing::PrintToString(low);
  });
}

}  // namespace
}  // namespace sparse24::emulate
