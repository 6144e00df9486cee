/// @file
/// The schedulers of persistent kernels: every tile, and every part of a split tile, once; in groups; and a CTA has the
/// same place in its cluster as its tile. A scheduler of another kind shows what the kernels' seam can carry.
#include <gtest/gtest.h>

#include <set>
#include <utility>
#include <vector>

#include "emulator/intrinsics.h"
#include "gemm/sm90/schedulers/tile_walk.cuh"
#include "gemm/sm90/schedulers/wave_scheduler.cuh"

namespace sparse24::emulate {
namespace {

using cuda::Place;
using cuda::RasterGroups;

/// The same order by loops: the first groups are wider by one, where the side is no multiple; odd ones go back.
std::vector<std::pair<int, int>> order_of(int clusters_m, int clusters_n, int width, bool along_m) {
  const int length = along_m ? clusters_m : clusters_n, side = along_m ? clusters_n : clusters_m;
  const int groups = (side + width - 1) / width;
  std::vector<std::pair<int, int>> order;
  for (int group = 0, first = 0; group < groups; ++group) {
    const int end = first + side / groups + (group < side % groups ? 1 : 0);
    for (int i = 0; i < length; ++i) {
      const int along = group % 2 == 0 ? i : length - 1 - i;
      for (int across = first; across < end; ++across)
        order.push_back(along_m ? std::pair{along, across} : std::pair{across, along});
    }
    first = end;
  }
  return order;
}

TEST(RasterGroups, AreWalkedThereAndBack) {
  for (bool along_m : {true, false}) {
    for (const auto& [m, n] : {std::pair{64, 84}, {7, 5}, {2, 1}, {3, 26}, {33, 127}}) {
      for (int width : {1, 2, 3, 4, 7, 8, 16}) {
        const RasterGroups raster(m, n, width, along_m);
        const auto order = order_of(m, n, width, along_m);
        ASSERT_EQ(raster.clusters(), int(order.size()));
        for (int i = 0; i < raster.clusters(); ++i) {
          const RasterGroups::Cluster at = raster.cluster(i);
          ASSERT_EQ((std::pair{at.m, at.n}), order[size_t(i)]) << m << " x " << n << ", width " << width << ", " << i;
        }
      }
    }
  }
}

/// The example of schedulers/raster_groups.cuh.
TEST(RasterGroups, AreAsEqualAsTheyCanBe) {
  const RasterGroups raster(8, 7, 4, true);
  const auto at = [&](int i) { return std::pair{raster.cluster(i).m, raster.cluster(i).n}; };
  EXPECT_EQ(at(4), (std::pair{1, 0}));
  EXPECT_EQ(at(31), (std::pair{7, 3}));
  EXPECT_EQ(at(32), (std::pair{7, 4}));
  EXPECT_EQ(at(35), (std::pair{6, 4}));
  EXPECT_EQ(at(55), (std::pair{0, 6}));
}

template <int kClusterSize, int kParts>
void expect_every_part_once(uint32_t split) {
  using Waves = cuda::WaveScheduler<kClusterSize, kParts>;
  std::set<std::pair<uint32_t, int>> seen;
  for (uint32_t i = 0; i < split * kParts; ++i) {
    const auto part = Waves::part_of(i, split);
    EXPECT_LT(part.tile, split);
    EXPECT_GE(part.index, 0);
    EXPECT_LT(part.index, kParts);
    EXPECT_EQ(part.tile % kClusterSize, i % kClusterSize);
    // The CTAs of a cluster have the same part of neighbouring tiles.
    const auto first = Waves::part_of(i / kClusterSize * kClusterSize, split);
    EXPECT_EQ(part.index, first.index);
    EXPECT_EQ(part.tile / kClusterSize, first.tile / kClusterSize);
    EXPECT_TRUE(seen.emplace(part.tile, part.index).second) << split << ", " << i;
  }
}

TEST(WaveScheduler, SplitsEveryTileOnce) {
  for (uint32_t split : {2, 4, 38, 66, 130}) expect_every_part_once<2, 4>(split);
  for (uint32_t split : {1, 3, 131}) expect_every_part_once<1, 4>(split);
}

/// The tiles of all CTAs and the parts of those that are left over cover a result once, and a cluster lies along M.
TEST(WaveScheduler, CoversTheResult) {
  using Waves = cuda::WaveScheduler<2, 4>;
  GemmConfig config{};
  config.swizzle = 8;
  config.raster_along_m = false;
  for (bool splits_last_wave : {false, true}) {
    config.splits_last_wave = splits_last_wave;
    for (int multiprocessors : {2, 5, 132}) {
      const auto params = Waves::params({17 * 2 * 128 - 5, 21 * 256, 1, 128, 256}, config, multiprocessors);
      const uint32_t ctas = Waves::grid(params).x;
      EXPECT_EQ(ctas, uint32_t(multiprocessors / 2 * 2));
      EXPECT_EQ(params.split, splits_last_wave ? 17 * 2 * 21 % ctas : 0);
      std::set<std::pair<int, int>> quarters;  // of columns
      for (uint32_t cta = 0; cta < ctas; ++cta) {
        const Waves waves(params.raster, params.split, cta, ctas);
        for (uint32_t i = waves.first(); waves.has_part(i); i += waves.stride()) {
          const auto at = waves.part(i);
          EXPECT_EQ(at.m % 2, int(cta % 2));
          EXPECT_TRUE(quarters.emplace(at.m, at.n).second);
        }
        for (uint32_t i = waves.first(); waves.has_tile(i); i += waves.stride()) {
          const auto at = waves.tile(i);
          EXPECT_EQ(at.m % 2, int(cta % 2));
          for (int part = 0; part < 4; ++part) EXPECT_TRUE(quarters.emplace(at.m, 4 * at.n + part).second);
        }
      }
      EXPECT_EQ(quarters.size(), 2u * 17 * 21 * 4);
      EXPECT_EQ(quarters.rbegin()->first, 33);
    }
  }
}

/// Groups of rows, whose ends only the device knows: what a product with a weight for each group would take.
class GroupedScheduler {
 public:
  static constexpr int kParts = 1;
  static constexpr bool kReadsMemory = true;
  struct Params {
    const int* ends;
    int groups, tiles_n, tile_m;
  };
  struct GroupPlace : Place {
    int begin, end;  // rows
  };
  GroupedScheduler(Params const& params, int cta, int ctas) : p_(params), cta_(cta), ctas_(ctas) {
    for (int g = 0; g < p_.groups; ++g) tiles_ += tiles_of(g);
  }
  int first() const { return cta_; }
  int stride() const { return ctas_; }
  bool has_tile(int i) const { return i < tiles_; }
  GroupPlace tile(int i) const {
    int group = 0;
    for (; i >= tiles_of(group); ++group) i -= tiles_of(group);
    return {{i / p_.tiles_n, i % p_.tiles_n, group}, begin(group), p_.ends[group]};
  }

 private:
  int begin(int group) const { return group == 0 ? 0 : p_.ends[group - 1]; }
  int tiles_of(int group) const { return (p_.ends[group] - begin(group) + p_.tile_m - 1) / p_.tile_m * p_.tiles_n; }
  Params p_;
  int cta_, ctas_, tiles_ = 0;
};
/// What a kernel calls for a place, here with the offset of its group.
int first_row(GroupedScheduler::GroupPlace const& at, int tile_m) { return at.begin + at.m * tile_m; }

TEST(SchedulerSeam, CarriesGroupsOfRows) {
  const std::vector<int> ends = {130, 130, 131, 512, 515};  // an empty group, and ones that are no multiple of a tile
  const GroupedScheduler::Params params{ends.data(), int(ends.size()), 3, 128};
  std::set<std::pair<int, int>> seen;  // rows, columns of tiles
  for (int cta = 0; cta < 4; ++cta) {
    const GroupedScheduler scheduler(params, cta, 4);
    cuda::TileWalk<GroupedScheduler> tiles(scheduler);
    for (tiles.find(); tiles.valid(); tiles.advance()) {
      const auto at = tiles.place();
      EXPECT_EQ(cute::get<3>(coordinates(at)), at.batch);
      EXPECT_EQ(at.end, ends[size_t(at.batch)]);
      EXPECT_LT(first_row(at, 128), at.end);
      for (int row = first_row(at, 128); row < std::min(first_row(at, 128) + 128, at.end); ++row)
        EXPECT_TRUE(seen.emplace(row, at.n).second) << row;
    }
  }
  EXPECT_EQ(seen.size(), 515u * 3);
}

}  // namespace
}  // namespace sparse24::emulate
