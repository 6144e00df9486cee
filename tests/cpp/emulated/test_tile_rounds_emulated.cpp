/// @file
/// The order of tiles and of the parts of divided tiles: every one of them once, in bands; and a CTA has the same place
/// in its cluster as its tile.
#include <gtest/gtest.h>

#include <set>
#include <utility>
#include <vector>

#include "gemm/sm90/schedulers/tile_rounds.cuh"

namespace sparse24::emulate {
namespace {

using cuda::TileBands;

/// The same order by loops: the first bands are wider by one, where the side is no multiple; odd ones go back.
std::vector<std::pair<int, int>> order_of(int clusters_m, int clusters_n, int width, bool along_m) {
  const int length = along_m ? clusters_m : clusters_n, side = along_m ? clusters_n : clusters_m;
  const int bands = (side + width - 1) / width;
  std::vector<std::pair<int, int>> order;
  for (int band = 0, first = 0; band < bands; ++band) {
    const int end = first + side / bands + (band < side % bands ? 1 : 0);
    for (int i = 0; i < length; ++i) {
      const int along = band % 2 == 0 ? i : length - 1 - i;
      for (int across = first; across < end; ++across)
        order.push_back(along_m ? std::pair{along, across} : std::pair{across, along});
    }
    first = end;
  }
  return order;
}

TEST(TileBands, AreWalkedThereAndBack) {
  for (bool along_m : {true, false}) {
    for (const auto& [m, n] : {std::pair{64, 84}, {7, 5}, {2, 1}, {3, 26}, {33, 127}}) {
      for (int width : {1, 2, 3, 4, 7, 8, 16}) {
        const TileBands bands(m, n, width, along_m);
        const auto order = order_of(m, n, width, along_m);
        ASSERT_EQ(bands.clusters(), int(order.size()));
        for (int i = 0; i < bands.clusters(); ++i) {
          const TileBands::Place at = bands.place(i);
          ASSERT_EQ((std::pair{at.m, at.n}), order[size_t(i)]) << m << " x " << n << ", width " << width << ", " << i;
        }
      }
    }
  }
}

/// The example of schedulers/tile_bands.cuh.
TEST(TileBands, AreAsEqualAsTheyCanBe) {
  const TileBands bands(8, 7, 4, true);
  const auto at = [&](int i) { return std::pair{bands.place(i).m, bands.place(i).n}; };
  EXPECT_EQ(at(4), (std::pair{1, 0}));
  EXPECT_EQ(at(31), (std::pair{7, 3}));
  EXPECT_EQ(at(32), (std::pair{7, 4}));
  EXPECT_EQ(at(35), (std::pair{6, 4}));
  EXPECT_EQ(at(55), (std::pair{0, 6}));
}

template <int kClusterSize, int kParts>
void expect_every_part_once(uint32_t divided) {
  using Rounds = cuda::TileRounds<kClusterSize, kParts>;
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

/// The tiles of all CTAs and the parts of those that are left over cover a result once, and a cluster lies along M.
TEST(TileRounds, CoverTheResult) {
  using Rounds = cuda::TileRounds<2, 4>;
  for (uint32_t ctas : {2, 4, 132}) {
    const TileBands bands(17, 21, 8, false);
    const uint32_t divided = Rounds::left_over(bands, ctas);
    std::set<std::pair<int, int>> quarters;  // of columns
    for (uint32_t cta = 0; cta < ctas; ++cta) {
      const Rounds rounds(bands, divided, cta, ctas);
      for (uint32_t i = rounds.first(); rounds.has_part(i); i += rounds.stride()) {
        const auto at = rounds.part(i);
        EXPECT_EQ(at.m % 2, int(cta % 2));
        EXPECT_TRUE(quarters.emplace(at.m, at.n).second);
      }
      for (uint32_t i = rounds.first(); rounds.has_tile(i); i += rounds.stride()) {
        const auto at = rounds.tile(i);
        EXPECT_EQ(at.m % 2, int(cta % 2));
        for (int part = 0; part < 4; ++part) EXPECT_TRUE(quarters.emplace(at.m, 4 * at.n + part).second);
      }
    }
    EXPECT_EQ(quarters.size(), 2u * 17 * 21 * 4);
    EXPECT_EQ(quarters.rbegin()->first, 33);
  }
}

}  // namespace
}  // namespace sparse24::emulate
