// How the first GEMM of the feed-forward network runs (bench/NOTES.md).
#include <algorithm>

#include "sparse24/error.h"
#include "sparse24/linear.h"
#include "sparse24/mm.h"

namespace sparse24 {
namespace {

// A compiled tile, its throughput relative to 128x128 where tiles fill the machine, and the fewest K tiles that it
// runs.
struct Tile {
  LinearTile tile;
  int m, n, cluster_m;
  double throughput;
  int min_k_tiles;
};
constexpr Tile kTiles[] = {
    {LinearTile::k128x128, 128, 128, 2, 1.00, 1},
    {LinearTile::k128x192, 128, 192, 2, 1.04, 1},
    {LinearTile::k128x256, 128, 256, 2, 1.07, 16},
};

// Waves of clusters, times the time that one takes for a column of K.
double predicted_time(const LinearConfig& config, int64_t m, int64_t n, int64_t k, int sm_count) {
  const Tile& tile = kTiles[int(config.tile)];
  const int64_t clusters = ceil_div(m, int64_t{config.tile_m} * config.cluster_m) * ceil_div(n, config.tile_n);
  const int64_t waves = ceil_div(clusters, std::max(sm_count / config.cluster_m, 1));
  const int64_t k_tiles = std::max<int64_t>(ceil_div(k, config.tile_k), 1);
  const double padding = double(std::max<int64_t>(k_tiles, tile.min_k_tiles)) / double(k_tiles);
  return double(waves) * config.tile_n / tile.throughput * padding;
}

}  // namespace

std::vector<LinearConfig> linear_configs(DType dtype, LinearTile widest) {
  check(dtype != DType::kFloat32, "sparse24: expected a 16-bit or fp8 dtype on the GPU, got ", name_of(dtype));
  const int tile_k = dtype == DType::kFloat8E4M3 ? 128 : 64;
  std::vector<LinearConfig> configs;
  for (const Tile& t : kTiles) {
    if (t.tile == LinearTile::k128x128 || t.tile == widest)
      configs.push_back({t.tile, t.m, t.n, tile_k, t.cluster_m, /*swizzle=*/1, true});
  }
  return configs;
}

LinearConfig select_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count, LinearTile widest) {
  const std::vector<LinearConfig> configs = linear_configs(dtype, widest);
  const auto faster = [&](const LinearConfig& a, const LinearConfig& b) {
    return predicted_time(a, m, n, k, sm_count) < predicted_time(b, m, n, k, sm_count);
  };
  LinearConfig config = *std::min_element(configs.begin(), configs.end(), faster);
  const int cluster_rows = config.tile_m * config.cluster_m;
  // Memory delivers 0.53 entries in the time of an entry of a tile and one column of K.
  const TileTraffic traffic{double(cluster_rows), double(config.tile_n), 0.53 * config.tile_m * config.tile_n};
  const TileOrder order = select_tile_order(ceil_div(m, cluster_rows), ceil_div(n, config.tile_n),
                                            std::max(sm_count / config.cluster_m, 1), traffic);
  config.swizzle = order.swizzle;
  config.raster_along_m = order.along_m;
  return config;
}

std::string to_string(const LinearConfig& c) {
  return std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n) + "x" + std::to_string(c.tile_k) + " cluster " +
         std::to_string(c.cluster_m) + "x1 swizzle " + std::to_string(c.swizzle) + " along " +
         (c.raster_along_m ? "M" : "N");
}

}  // namespace sparse24
