// Which kernel runs a sparse GEMM: a model of time per wave of tiles, fitted to measurements (bench/NOTES.md).
#include <algorithm>
#include <cmath>
#include <limits>

#include "sparse24/mm.h"

namespace sparse24 {
namespace {

// The throughput of a tile relative to 128x256, for tiles that fill the machine; 0: not measured, not chosen.
double throughput_of(GemmTile tile) {
  switch (tile) {
    case GemmTile::k128x256: return 1.00;  // many tokens
    case GemmTile::k256x192: return 0.98;  // where it makes fewer waves
    case GemmTile::k128x128: return 0.72;  // hundreds of tokens
    case GemmTile::k64x128: return 0.46;   // few tokens
    case GemmTile::k64x64: return 0.28;    // the fewest; an estimate
    default: return 0;
  }
}

// 128x256 tiles whose last column is at most half full (n = 1664, 2176, 4480) take 4 to 15 % more than their number
// says, unless few of them lie along M. Measured, not explained.
constexpr double kHalfEmpty = 1.1;
bool is_half_empty(const GemmConfig& c, int64_t n) {
  return c.tile == GemmTile::k128x256 && 2 * (n - (ceil_div(n, c.tile_n) - 1) * c.tile_n) <= c.tile_n;
}

/// Microseconds, by the model: waves of tiles, and with several parts of K the pass that adds them up.
double predicted_time(const GemmConfig& c, DType dtype, int64_t m, int64_t n, int64_t k, int sm_count) {
  const int64_t clusters = ceil_div(m, int64_t{c.tile_m} * c.cluster_m) * ceil_div(n, c.tile_n) * c.splits;
  const int64_t waves = ceil_div(clusters, std::max(sm_count / c.cluster_m, 1));
  // A tile's time: its area over its throughput, times K and what filling and draining its pipeline costs: about 1,000
  // columns. The unit is fp8's time for an entry of a 128x256 tile and one column.
  const double unit = dtype == DType::kFloat8E4M3 ? 1.05e-7 : 2.1e-7;
  const double throughput = throughput_of(c.tile) / (is_half_empty(c, n) ? kHalfEmpty : 1);
  const double computing = double(waves) * c.tile_m * c.tile_n / throughput * (double(k) / c.splits + 1000) * unit;
  // All of B is read, at about 2.3 TB/s, and the shorter of both is not quite hidden.
  const double reading = double(n * k * size_of(dtype)) / 2.3e6;
  const double product = std::max(computing, reading) + 0.05 * std::min(computing, reading);
  if (c.splits == 1) return product;
  // One more launch; fp32 sums are written and read once, at about 5 TB/s: most of them stay in L2.
  return product + 4 + double(c.splits) * double(m * n) * 8 / 5e6;
}

// CUTLASS's largest; bands of ours may be wider where the L2 cache holds what they read.
constexpr int kMostSwizzle = 8, kWidestBand = 24;

}  // namespace

// The clusters that run at the same time are a rectangle of tiles, whose operands come from memory once. Its sides
// follow from the swizzle s: along N it has s rows of clusters and as many columns as there are clusters left, along M
// the other way round. Reading that takes longer than computing costs the difference, and so do the tiles that pad both
// counts to multiples of s, of an order of CUTLASS's. One of ours has bands of s or fewer, as equal as they can be.
// Where the cache holds all that is read at the same time, the short side is read once for the length of a band.
TileOrder select_tile_order(int64_t clusters_m, int64_t clusters_n, int in_flight, const TileTraffic& traffic) {
  TileOrder best{1, true};
  double best_cost = std::numeric_limits<double>::infinity();
  const int most = traffic.any_swizzle ? kWidestBand : kMostSwizzle;
  for (int swizzle = 1; swizzle <= most; swizzle += traffic.any_swizzle ? 1 : swizzle) {
    const int64_t multiple = traffic.any_swizzle ? 1 : swizzle;
    const int64_t padded_m = round_up(clusters_m, multiple), padded_n = round_up(clusters_n, multiple);
    for (const bool along_m : {true, false}) {
      const double major = double(along_m ? padded_m : padded_n), minor = double(along_m ? padded_n : padded_m);
      const double width = minor / std::ceil(minor / swizzle);  // of a band
      const double short_side = std::max(width, in_flight / major);
      const double long_side = std::min(major, in_flight / width);
      const double along = long_side * (along_m ? traffic.cluster_row : traffic.cluster_col);
      const double across = short_side * (along_m ? traffic.cluster_col : traffic.cluster_row);
      const double reading = along + across * (along + across <= traffic.cached ? long_side / major : 1);
      // Reading that is not shared in time: a third more than the rectangle says.
      const double work = double(padded_m * padded_n) * (along_m ? 1 : traffic.along_n);
      const double cost = work * (std::max(traffic.computing, 1.35 * reading) + traffic.hidden * reading);
      if (cost < best_cost) {
        best_cost = cost;
        best = {swizzle, along_m};
      }
    }
  }
  return best;
}

bool splits_evenly(const GemmConfig& config, int64_t k, int splits) {
  return splits == 1 || (splits <= kMostSplits && k % (int64_t{config.tile_k} * splits) == 0);
}

GemmConfig select_mm_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count, bool may_split) {
  GemmConfig best{};
  double best_time = std::numeric_limits<double>::infinity();
  for (GemmConfig config : mm_configs(dtype)) {
    for (config.splits = 1; config.splits <= (may_split ? kMostSplits : 1); ++config.splits) {
      if (!splits_evenly(config, k, config.splits)) continue;
      const double time = predicted_time(config, dtype, m, n, k, sm_count);
      if (time < best_time) {
        best_time = time;
        best = config;
      }
    }
  }
  const int cluster_rows = best.tile_m * best.cluster_m;
  // Per column of K: half of A's entries with metadata of an eighth of them, and meanwhile memory delivers 0.32 entries
  // for each entry of a tile.
  TileTraffic traffic{0.5625 * cluster_rows, double(best.tile_n), 0.32 * best.tile_m * best.tile_n};
  if (best.tile == GemmTile::k128x256) {
    // Measured, not explained: elsewhere along N takes 2 % less than along M.
    traffic.along_n = is_half_empty(best, n) ? kHalfEmpty : 0.98;
    traffic.hidden = kEnergyOfReading;
  }
  const TileOrder order = select_tile_order(ceil_div(m, cluster_rows), ceil_div(n, best.tile_n),
                                            std::max(sm_count / best.cluster_m, 1), traffic);
  best.swizzle = order.swizzle;
  best.raster_along_m = order.along_m;
  return best;
}

}  // namespace sparse24
