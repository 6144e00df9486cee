// The model of time, from waves of tiles, what they compute and what they read.
#include "heuristics/cost_model.h"

#include <algorithm>
#include <limits>

#include "heuristics/tile_order.h"

namespace sparse24 {
namespace {

int64_t rows_of_cluster(const GemmConfig& c) { return int64_t{c.tile_m} * c.cluster_m; }
int64_t columns_of_cluster(const GemmConfig& c) { return int64_t{c.tile_n} * c.cluster_n; }

// Whether tiles come in the waves of our scheduler, which no tiles beyond the result pad, as they pad CUTLASS's order.
bool has_waves(Product product, const GemmConfig& c) {
  return product == Product::kDense && dense_tile(c.tile).scheduler() == Scheduler::kWaves;
}

// Whether the last column of tiles is at most half full.
bool is_half_empty(const GemmConfig& c, int64_t n) {
  return 2 * (n - (ceil_div(n, c.tile_n) - 1) * c.tile_n) <= c.tile_n;
}

// Returns the columns of K that a tile computes.
double depth_of(const GemmProblem& p, const GemmConfig& c) {
  if (p.product == Product::kSparse) return double(p.k) / c.splits;
  const int64_t k_tiles = std::max<int64_t>(ceil_div(p.k, c.tile_k), 1);
  return double(std::max<int64_t>(k_tiles, dense_tile(c.tile).min_k_tiles()) * c.tile_k);
}

// Returns the share of A that is read: of a sparse product one half, and metadata of an eighth of that.
double read_share_of_a(Product product) { return product == Product::kSparse ? 0.5625 : 1; }

}  // namespace

int CostModel::clusters_in_flight(const GemmConfig& c) const {
  return std::max(device.sm_count / (c.cluster_m * c.cluster_n), 1);
}

double CostModel::mac_us(const GemmProblem& p) const {
  return costs.product(p.product, p.dtype).mac_us * (reference_device().sm_tflops / device.sm_tflops);
}

double CostModel::reading_us(double bytes, double tb_s) const {
  return bytes / (tb_s * 1e6 * (device.memory_tb_s / reference_device().memory_tb_s));
}

// The clusters that pad the order count too, but not of sparse products, whose order is chosen after the tile and pads
// little.
CostModel::Waves CostModel::waves_of(const GemmProblem& p, const GemmConfig& c) const {
  const int64_t multiple = p.product == Product::kSparse || has_waves(p.product, c) ? 1 : c.swizzle;
  const int64_t rows = round_up(ceil_div(p.m, rows_of_cluster(c)), multiple);
  const int64_t columns = round_up(ceil_div(p.n, columns_of_cluster(c)), multiple);
  const int64_t clusters = rows * columns * c.splits, in_flight = clusters_in_flight(c);
  return {clusters / in_flight, clusters % in_flight};
}

// The quarters of the tiles that are left over cost a share of a wave for each time that they fill the machine.
double CostModel::quarter_waves(const Waves& waves, const GemmConfig& c) const {
  return costs.common.quarter_wave * double(ceil_div(4 * waves.left_over, int64_t{clusters_in_flight(c)}));
}

GemmConfig CostModel::in_order(const GemmProblem& p, GemmConfig c) const {
  const int64_t rows = rows_of_cluster(c), columns = columns_of_cluster(c);
  const TileCost& cost = costs.tile(p.product, p.dtype, c.tile);
  const double size = double(size_of(p.dtype));
  TileTraffic traffic{read_share_of_a(p.product) * double(rows) * size, double(columns) * size,
                      double(c.tile_m) * c.tile_n * mac_us(p)};
  traffic.read_us = reading_us(1, costs.product(p.product, p.dtype).order_tb_s);
  traffic.unshared = costs.common.unshared;
  traffic.hidden = cost.hidden_reading;
  traffic.along_n = cost.half_empty > 1 && is_half_empty(c, p.n) ? cost.half_empty : cost.along_n;
  if (has_waves(p.product, c)) {
    traffic.any_swizzle = true;
    traffic.cached = costs.common.cached_share * device.l2_bytes / double(std::max<int64_t>(p.k, 1));
  }
  const TileOrder order =
      select_tile_order(ceil_div(p.m, rows), ceil_div(p.n, columns), clusters_in_flight(c), traffic);
  c.swizzle = order.swizzle;
  c.raster_along_m = order.along_m;
  const Waves waves = waves_of(p, c);
  c.splits_last_wave = has_waves(p.product, c) && waves.whole > 0 && waves.left_over > 0 && quarter_waves(waves, c) < 1;
  return c;
}

double CostModel::predicted_us(const GemmProblem& p, const GemmConfig& c) const {
  const TileCost& cost = costs.tile(p.product, p.dtype, c.tile);
  if (cost.throughput == 0) return std::numeric_limits<double>::infinity();
  const Waves waves = waves_of(p, c);
  const double last = c.splits_last_wave ? quarter_waves(waves, c) : waves.left_over > 0 ? 1 : 0;
  const double columns = (double(waves.whole) + last) * (depth_of(p, c) + cost.start) + cost.tail;
  const double throughput = cost.throughput / (is_half_empty(c, p.n) ? cost.half_empty : 1);
  const double computing = columns * c.tile_m * c.tile_n / throughput * mac_us(p);
  const double rate = costs.product(p.product, p.dtype).read_tb_s;
  const double reading = rate > 0 ? reading_us(double(p.n * p.k * size_of(p.dtype)), rate) : 0;
  const double us = std::max(computing, reading) + costs.common.overlap * std::min(computing, reading);
  if (c.splits == 1) return us;
  // fp32 sums are written and read once; most of them stay in L2.
  return us + costs.common.launch_us + double(c.splits) * double(p.m * p.n) * 8 / (costs.common.sums_tb_s * 1e6);
}

GemmConfig fastest(const CostModel& model, const GemmProblem& problem, const std::vector<GemmConfig>& configs) {
  const bool order_counts = problem.product == Product::kDense;  // the prediction depends on it
  GemmConfig best{};
  double best_us = std::numeric_limits<double>::infinity();
  for (const GemmConfig& unordered : configs) {
    const GemmConfig config = order_counts ? model.in_order(problem, unordered) : unordered;
    const double us = model.predicted_us(problem, config);
    if (us < best_us) {
      best_us = us;
      best = config;
    }
  }
  return order_counts || configs.empty() ? best : model.in_order(problem, best);
}

}  // namespace sparse24
