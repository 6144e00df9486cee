// Which kernel runs a sparse GEMM: a model of time per wave of tiles, fitted to measurements (bench/NOTES.md).
#include <algorithm>
#include <limits>

#include "sparse24/error.h"
#include "sparse24/mm.h"

namespace sparse24 {
namespace {

// A compiled tile and its throughput relative to 128x256, for tiles that fill the machine.
struct Tile {
  MmTile tile;
  int m, n, cluster_m;
  double throughput;
  bool float16;  // compiled for float16 too
};

constexpr Tile kTiles[] = {
    {MmTile::k128x256, 128, 256, 2, 1.00, true},
    {MmTile::k256x192, 256, 192, 2, 1.01, false},
    {MmTile::k128x128, 128, 128, 1, 0.75, false},
    {MmTile::k64x128, 64, 128, 1, 0.60, true},
};

constexpr bool is_compiled(const Tile& tile, DType dtype) { return dtype != DType::kFloat16 || tile.float16; }

MmConfig config_of(const Tile& tile, DType dtype) {
  return {tile.tile, tile.m, tile.n, int(meta_atom_k(dtype)), tile.cluster_m, /*swizzle=*/1, /*raster_along_m=*/true};
}

}  // namespace

// Swizzling by s pads both tile counts to multiples of s clusters, so s must divide them; few columns of tiles are best
// finished row by row, while A's rows are in L2.
TileOrder select_tile_order(int64_t m, int64_t n, int cluster_rows, int tile_cols) {
  const int64_t clusters_m = ceil_div(m, cluster_rows), tiles_n = ceil_div(n, tile_cols);
  int swizzle = 4;
  while (clusters_m % swizzle != 0 || tiles_n % swizzle != 0) swizzle /= 2;
  return {swizzle, tiles_n > 16 || clusters_m <= tiles_n};
}

std::vector<MmConfig> mm_configs(DType dtype) {
  std::vector<MmConfig> configs;
  for (const Tile& tile : kTiles) {
    if (is_compiled(tile, dtype)) configs.push_back(config_of(tile, dtype));
  }
  return configs;
}

MmConfig select_mm_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count) {
  check(dtype != DType::kFloat32, "sparse24.mm: expected a 16-bit or fp8 dtype on the GPU, got ", name_of(dtype));
  const Tile* best = nullptr;
  double best_time = std::numeric_limits<double>::infinity();
  for (const Tile& tile : kTiles) {
    if (!is_compiled(tile, dtype)) continue;
    const int64_t clusters = ceil_div(m, int64_t{tile.m} * tile.cluster_m) * ceil_div(n, tile.n);
    const int64_t waves = ceil_div(clusters, std::max(sm_count / tile.cluster_m, 1));
    // A tile's time: its area over its throughput, plus filling and draining its pipeline (about 1,000 columns of K).
    const double per_tile = double(tile.m) * tile.n / tile.throughput * (k + 1000);
    const double time = waves * per_tile;
    if (time < best_time) {
      best_time = time;
      best = &tile;
    }
  }
  MmConfig config = config_of(*best, dtype);
  const TileOrder order = select_tile_order(m, n, config.tile_m * config.cluster_m, config.tile_n);
  config.swizzle = order.swizzle;
  config.raster_along_m = order.along_m;
  return config;
}

std::string to_string(const MmConfig& c) {
  return std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n) + "x" + std::to_string(c.tile_k) + " cluster " +
         std::to_string(c.cluster_m) + "x1 swizzle " + std::to_string(c.swizzle) + " along " +
         (c.raster_along_m ? "M" : "N");
}

}  // namespace sparse24
