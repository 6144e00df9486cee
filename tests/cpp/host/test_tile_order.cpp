/// @file
/// The order of tiles: what runs at the same time reads as little as it can.
#include <gtest/gtest.h>

#include "heuristics/tile_order.h"
#include "sparse24/mm.h"

namespace sparse24 {
namespace {

/// Sizes and what was measured there (docs/log).
TEST(SelectTileOrder, ReadsFewOperandsAtOnce) {
  const TileTraffic small{144, 256, 0.32 * 128 * 256}, large{288, 192, 0.32 * 256 * 192};
  // 7 columns of tiles: all of them, row by row.
  EXPECT_FALSE(select_tile_order(128, 7, 66, small).along_m);
  // 10 columns are not padded to 12 or 16, whatever 4 or 8 would save.
  EXPECT_LE(select_tile_order(64, 10, 66, small).swizzle, 2);
  // 43 columns, 56 rows of clusters: not all rows at a time, 1.2 columns wide.
  const TileOrder order = select_tile_order(56, 43, 66, large);
  EXPECT_TRUE(!order.along_m || order.swizzle > 1);
  // Nothing divides 33 and 127, and one row of 66 clusters would read more than it computes.
  EXPECT_GT(select_tile_order(33, 127, 66, {256, 128, 0.53 * 128 * 128}).swizzle, 1);
}

/// Groups of any width: the square of what runs at once, whatever the counts divide by.
TEST(SelectTileOrder, MakesGroupsOfAnyWidth) {
  TileTraffic groups{256, 256, 0.53 * 128 * 256};
  groups.any_swizzle = true;
  const TileOrder even = select_tile_order(64, 84, 66, groups);
  EXPECT_EQ(even.swizzle, 8);
  EXPECT_FALSE(even.along_m);  // 8 groups of 8, where along M 84 make 11 of 7 and 8
  groups.any_swizzle = false;
  EXPECT_NE(select_tile_order(64, 84, 66, groups).swizzle, 8);
}

/// The columns of a group are read once for its length if the cache holds them beside the rows: then wide groups read
/// less (docs/log). 24 columns and 2.75 rows of clusters are 6848 entries, 8 and 8.25 are 4160.
TEST(SelectTileOrder, MakesWideGroupsWhereTheCacheHoldsWhatTheyRead) {
  TileTraffic groups{256, 256, 0.53 * 128 * 256};
  groups.any_swizzle = true;
  const auto width = [&](double cached) {
    groups.cached = cached;
    return select_tile_order(64, 72, 66, groups).swizzle;
  };
  EXPECT_EQ(width(0), 8);
  EXPECT_EQ(width(4100), 8);
  EXPECT_EQ(width(6850), 24);
  EXPECT_EQ(width(1e9), 24);
  groups.any_swizzle = false;
  EXPECT_EQ(width(1e9), 8);  // CUTLASS's widest
}

/// A last column of 128x256 tiles that is half empty costs along N (1664 = 6.5 tiles), unless all rows are too many.
TEST(SelectTileOrder, GoesAlongMWhereTheLastColumnIsHalfEmpty) {
  const auto along_m = [](int64_t m, int64_t n) {
    const GemmConfig c = select_mm_config(DType::kBFloat16, m, n, 6656, 132);
    EXPECT_EQ(c.tile, GemmTile::k128x256) << to_string(c);
    return c.raster_along_m;
  };
  EXPECT_TRUE(along_m(2048, 1664));
  EXPECT_TRUE(along_m(4096, 1664));
  EXPECT_TRUE(along_m(8192, 1664));
  TileTraffic tall{144, 256, 0.32 * 128 * 256, 1.1};
  EXPECT_FALSE(select_tile_order(64, 7, 66, tall).along_m);
}

TEST(SelectTileOrder, IsSymmetric) {
  const TileTraffic traffic{128, 128, 4000};
  const TileOrder tall = select_tile_order(512, 6, 66, traffic), wide = select_tile_order(6, 512, 66, traffic);
  EXPECT_EQ(tall.swizzle, wide.swizzle);
  EXPECT_NE(tall.along_m, wide.along_m);
}

}  // namespace
}  // namespace sparse24
