// Which order of tiles reads least.
//
// The clusters that run at the same time are a rectangle of tiles, whose operands come from memory once. Its sides
// follow from the swizzle s: along N it has s rows of clusters and as many columns as there are clusters left, along M
// the other way round. Reading that takes longer than computing costs the difference, and so do the tiles that pad both
// counts to multiples of s in an order of CUTLASS's. One of ours has groups of s or fewer, as equal as they can be
// (cuda/gemm/sm90/schedulers/raster_groups.cuh draws it). Where the cache holds all that is read at the same time, the
// short side is read once for the length of a group.
#include "heuristics/tile_order.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sparse24/types.h"

namespace sparse24 {
namespace {

// CUTLASS's largest; groups of ours may be wider where the L2 cache holds what they read.
constexpr int kMostSwizzle = 8, kWidestGroup = 24;

}  // namespace

TileOrder select_tile_order(int64_t clusters_m, int64_t clusters_n, int in_flight, const TileTraffic& traffic) {
  TileOrder best{1, true};
  double best_cost = std::numeric_limits<double>::infinity();
  const int most = traffic.any_swizzle ? kWidestGroup : kMostSwizzle;
  for (int swizzle = 1; swizzle <= most; swizzle += traffic.any_swizzle ? 1 : swizzle) {
    const int64_t multiple = traffic.any_swizzle ? 1 : swizzle;
    const int64_t padded_m = round_up(clusters_m, multiple), padded_n = round_up(clusters_n, multiple);
    for (const bool along_m : {true, false}) {
      const double major = double(along_m ? padded_m : padded_n), minor = double(along_m ? padded_n : padded_m);
      const double width = minor / std::ceil(minor / swizzle);  // of a group
      const double short_side = std::max(width, in_flight / major);
      const double long_side = std::min(major, in_flight / width);
      const double along = long_side * (along_m ? traffic.cluster_row : traffic.cluster_col);
      const double across = short_side * (along_m ? traffic.cluster_col : traffic.cluster_row);
      const double bytes = along + across * (along + across <= traffic.cached ? long_side / major : 1);
      const double reading = bytes * traffic.read_us;
      const double work = double(padded_m * padded_n) * (along_m ? 1 : traffic.along_n);
      const double cost = work * (std::max(traffic.computing, traffic.unshared * reading) + traffic.hidden * reading);
      if (cost < best_cost) {
        best_cost = cost;
        best = {swizzle, along_m};
      }
    }
  }
  return best;
}

}  // namespace sparse24
