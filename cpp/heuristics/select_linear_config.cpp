// How the first GEMM of the feed-forward network runs (bench/NOTES.md).
#include <algorithm>
#include <iterator>
#include <limits>

#include "sparse24/linear.h"
#include "sparse24/linear_gradient.h"
#include "sparse24/mm.h"

namespace sparse24 {
namespace {

// The throughput of a tile relative to 128x128 where tiles fill the machine, in 16 bits and in fp8; in fp8 the columns
// of K that taking its accumulators costs; and the columns that its last epilogue costs, which has no products to run
// under.
struct Cost {
  GemmTile tile;
  double throughput, throughput_fp8;
  int taking_fp8;
  int tail, tail_fp8;
};
constexpr Cost kCosts[] = {
    {GemmTile::k128x64, 0.62, 0.62, 0, 100, 0},
    {GemmTile::k128x128, 1.00, 1.00, 0, 100, 0},
    {GemmTile::k128x192, 1.08, 1.08, 0, 100, 0},
    {GemmTile::k128x256, 1.10, 1.11, 60, 300, 420},
};
const Cost* cost_of(GemmTile tile) {
  const auto* cost = std::find_if(std::begin(kCosts), std::end(kCosts), [&](const Cost& c) { return c.tile == tile; });
  return cost == std::end(kCosts) ? nullptr : cost;  // not measured, not chosen
}

int64_t rows_of_cluster(const GemmConfig& c) { return int64_t{c.tile_m} * c.cluster_m; }
int64_t columns_of_cluster(const GemmConfig& c) { return int64_t{c.tile_n} * c.cluster_n; }
int clusters_in_flight(const GemmConfig& c, int sm_count) {
  return std::max(sm_count / (c.cluster_m * c.cluster_n), 1);
}

// Overlapped tiles run in a kernel of ours, in bands that none pad (schedulers/tile_bands.cuh); the others in CUTLASS's
// order.
bool has_bands(const GemmConfig& c) { return dense_tile(c.tile).schedule == Schedule::kOverlapped; }

// The clusters of a problem, with those that pad the order, as rounds of all that run at once.
struct Rounds {
  int64_t whole, left_over;
};
Rounds rounds_of(const GemmConfig& c, int64_t m, int64_t n, int sm_count) {
  const int64_t rows = ceil_div(m, rows_of_cluster(c)), columns = ceil_div(n, columns_of_cluster(c));
  const int64_t multiple = has_bands(c) ? 1 : c.swizzle;
  const int64_t clusters = round_up(rows, multiple) * round_up(columns, multiple);
  const int64_t in_flight = clusters_in_flight(c, sm_count);
  return {clusters / in_flight, clusters % in_flight};
}

// Quarters of the tiles that are left over take so much of a round, for each time that they fill the machine.
constexpr double kRoundOfQuarters = 0.4;
double time_of_quarters(const GemmConfig& c, const Rounds& rounds, int sm_count) {
  return kRoundOfQuarters * double(ceil_div(4 * rounds.left_over, int64_t{clusters_in_flight(c, sm_count)}));
}
bool divides(const GemmConfig& c, const Rounds& rounds, int sm_count) {
  return has_bands(c) && rounds.whole > 0 && rounds.left_over > 0 && time_of_quarters(c, rounds, sm_count) < 1;
}

// What is read for 66 tiles of two multiprocessors stays in L2 if it is 18 MB, and does not if it is 34.
constexpr double kCachedBytes = 20e6;

// With the order of tiles that reads least. k: only bands depend on it.
GemmConfig in_order(GemmConfig config, DType dtype, int64_t m, int64_t n, int64_t k, int sm_count) {
  const int64_t rows = rows_of_cluster(config), columns = columns_of_cluster(config);
  // Memory delivers 0.53 entries in the time of an entry of a tile and one column of K.
  TileTraffic traffic{double(rows), double(columns), 0.53 * config.tile_m * config.tile_n};
  // 16 bits show nothing of it: 0.5 % between 4160 and 8960 entries, with 128x256 tiles.
  if (dtype == DType::kFloat8E4M3) traffic.hidden = kEnergyOfReading;
  if (has_bands(config)) {
    traffic.any_swizzle = true;
    traffic.cached = kCachedBytes / double(std::max<int64_t>(k, 1) * size_of(dtype));
  }
  const TileOrder order =
      select_tile_order(ceil_div(m, rows), ceil_div(n, columns), clusters_in_flight(config, sm_count), traffic);
  config.swizzle = order.swizzle;
  config.raster_along_m = order.along_m;
  config.divides = divides(config, rounds_of(config, m, n, sm_count), sm_count);
  return config;
}

// Rounds of clusters, with those that pad the order, times the time that one takes for a column of K.
double predicted_time(const GemmConfig& config, DType dtype, int64_t m, int64_t n, int64_t k, int sm_count) {
  const Cost* cost = cost_of(config.tile);
  if (!cost) return std::numeric_limits<double>::infinity();
  const bool fp8 = dtype == DType::kFloat8E4M3;
  const Rounds rounds = rounds_of(config, m, n, sm_count);
  const double last = config.divides ? time_of_quarters(config, rounds, sm_count) : rounds.left_over > 0 ? 1 : 0;
  const int64_t k_tiles = std::max<int64_t>(ceil_div(k, config.tile_k), 1);
  const int64_t depth =
      std::max<int64_t>(k_tiles, dense_tile(config.tile).min_k_tiles()) * config.tile_k + (fp8 ? cost->taking_fp8 : 0);
  const double throughput = fp8 ? cost->throughput_fp8 : cost->throughput;
  return ((double(rounds.whole) + last) * double(depth) + (fp8 ? cost->tail_fp8 : cost->tail)) * config.tile_n /
         throughput;
}

}  // namespace

GemmConfig select_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count, const LinearTiles& tiles) {
  GemmConfig best{};
  double best_time = std::numeric_limits<double>::infinity();
  for (const GemmConfig& unordered : linear_configs(dtype, tiles)) {
    const LinearConfig config = in_order(unordered, dtype, m, n, k, sm_count);
    const double time = predicted_time(config, dtype, m, n, k, sm_count);
    if (time < best_time) {
      best_time = time;
      best = config;
    }
  }
  return best;
}

GemmConfig select_linear_gradient_config(DType dtype, int64_t tokens, int64_t features, int sm_count) {
  static_assert(dense_tile(kLinearGradientTile).schedule != Schedule::kOverlapped,
                "no bands, for which K would be needed");
  return in_order(linear_configs(dtype, {kLinearGradientTile}).front(), dtype, tokens, features, /*k=*/0, sm_count);
}

}  // namespace sparse24
