/// @file
/// The order of a GEMM's tiles.
#pragma once

#include <cstdint>

namespace sparse24 {

/// `swizzle`: lines of clusters that are walked together.
struct TileOrder {
  int swizzle;
  bool along_m;
};

/// What one column of K moves and costs. Bytes may be in any unit, of which one is read in `read_us`.
struct TileTraffic {
  double cluster_row, cluster_col;  ///< bytes of A for a row of clusters, of B for a column of them
  double computing;                 ///< us of computing a tile
  double along_n = 1;               ///< TileCost::along_n, where both directions read enough
  double hidden = 1e-3;             ///< TileCost::hidden_reading
  bool any_swizzle = false;         ///< none pads, and need not be a power of two (schedulers/raster_groups.cuh)
  double cached = 0;                ///< bytes that the L2 cache holds until the next tiles are computed
  double read_us = 1;               ///< of a byte
  double unshared = 1.35;           ///< CommonCost::unshared
};

/// Chooses the order of `clusters_m` x `clusters_n` clusters, of which `in_flight` run at the same time.
TileOrder select_tile_order(int64_t clusters_m, int64_t clusters_n, int in_flight, const TileTraffic& traffic);

}  // namespace sparse24
