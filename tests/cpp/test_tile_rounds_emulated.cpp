/// @file
/// The parts of divided tiles: every part of every tile once, and a CTA has the same place in its cluster as its tile.
#include <gtest/gtest.h>

#include <set>
#include <utility>

#include "tile_rounds.cuh"

namespace sparse24::emulate {
namespace {

/// The numbers of parts ask nothing of it.
struct Scheduler {
  struct Params {};
};

template <int kClusterSize, int kParts>
void expect_every_part_once(uint32_t divided) {
  using Rounds = cuda::TileRounds<Scheduler, kClusterSize, kParts>;
  std::set<std::pair<uint32_t, int>> seen;
  for (uint32_t i = 0; i < divided * kParts; ++i) {
    const auto part = Rounds::part_of(i, divided);
    EXPECT_LT(part.tile, divided);
    EXPECT_GE(part.index, 0);
    EXPECT_LT(part.index, kParts);
    EXPECT_EQ(part.tile % kClusterSize, i % kClusterSize);
    // The CTAs of a cluster have the same part of neighbouring tiles.
    const auto first = Rounds::part_of(i / kClusterSize * kClusterSize, divided);
    EXPECT_EQ(part.index, first.index);
    EXPECT_EQ(part.tile / kClusterSize, first.tile / kClusterSize);
    EXPECT_TRUE(seen.emplace(part.tile, part.index).second) << divided << ", " << i;
  }
}

TEST(TileRounds, DivideEveryTileOnce) {
  for (uint32_t divided : {2, 4, 38, 66, 130}) expect_every_part_once<2, 4>(divided);
  for (uint32_t divided : {1, 3, 131}) expect_every_part_once<1, 4>(divided);
}

}  // namespace
}  // namespace sparse24::emulate
