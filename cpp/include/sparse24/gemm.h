/// @file
/// What all GEMMs have in common: the tiles and kernels that are compiled, and how one of them runs.
#pragma once

#include <cstdint>
#include <string>

#include "sparse24/types.h"

namespace sparse24 {

/// The shapes of tiles, rows by columns of the result; an entry is one for each row of tiles.def.
enum class GemmTile {
#define SPARSE24_TILE(name, m, n) name,
#include "sparse24/tiles.def"
};

/// How two warpgroups share the tiles of a multiprocessor.
enum class Schedule {
  kPingpong,     ///< they work on a tile each, the epilogue of one under the mma of the other
  kCooperative,  ///< they work on one tile, whose epilogue stands between its mma and those of the next
  kOverlapped,   ///< they work on one tile, whose epilogue runs in steps under the mma of the next
};

/// In which order the multiprocessors take the tiles (cuda/gemm/sm90/schedulers).
enum class Scheduler {
  kCutlass,  ///< that of CUTLASS, padded to groups of powers of two; the only one with batches
  kWaves,    ///< ours, which nothing pads; of dense products it may split the tiles of the last wave
};

/// An overlapped epilogue finishes so many columns in a step, and each step stands behind the mma of a K tile.
inline constexpr int kColumnsOfStep = 16;

/// A tile as the kernels of one kind of product run it.
struct TileSpec {
  GemmTile tile;
  int m, n;
  int cluster_m, cluster_n;  ///< tiles of a cluster, which share the longer operand
  Schedule schedule;

  constexpr Scheduler scheduler() const {
    return schedule == Schedule::kOverlapped ? Scheduler::kWaves : Scheduler::kCutlass;
  }
  /// The fewest K tiles that it runs: what lies beyond K is read as zeros.
  constexpr int min_k_tiles() const { return schedule == Schedule::kOverlapped ? n / kColumnsOfStep : 1; }
};

namespace detail {
struct TileSize {
  int m, n;
};
inline constexpr TileSize kTileSizes[] = {
#define SPARSE24_TILE(name, m, n) {m, n},
#include "sparse24/tiles.def"
};
inline constexpr const char* kTileNames[] = {
#define SPARSE24_TILE(name, m, n) #m "x" #n,
#include "sparse24/tiles.def"
};
constexpr TileSpec spec_of(GemmTile tile, int cluster_m, int cluster_n, Schedule schedule) {
  return {tile, kTileSizes[int(tile)].m, kTileSizes[int(tile)].n, cluster_m, cluster_n, schedule};
}
template <size_t kCount>
constexpr TileSpec find(const TileSpec (&specs)[kCount], GemmTile tile) {
  size_t i = 0;
  while (specs[i].tile != tile) ++i;  // beyond the end: no constant expression
  return specs[i];
}
}  // namespace detail

inline constexpr int kGemmTiles = int(sizeof(detail::kTileSizes) / sizeof(detail::kTileSizes[0]));
/// "128x256"
constexpr const char* name_of(GemmTile tile) { return detail::kTileNames[int(tile)]; }

/// The tiles of sparse products (mm), and of dense ones (the first GEMM and its gradient).
inline constexpr TileSpec kSparseTiles[] = {
#define SPARSE24_SPARSE_TILE(name, cluster_m, cluster_n, schedule) \
  detail::spec_of(GemmTile::name, cluster_m, cluster_n, Schedule::schedule),
#include "sparse24/tiles.def"
};
inline constexpr TileSpec kDenseTiles[] = {
#define SPARSE24_DENSE_TILE(name, cluster_m, cluster_n, schedule) \
  detail::spec_of(GemmTile::name, cluster_m, cluster_n, Schedule::schedule),
#include "sparse24/tiles.def"
};
/// Of a tile that is in the table.
constexpr TileSpec sparse_tile(GemmTile tile) { return detail::find(kSparseTiles, tile); }
constexpr TileSpec dense_tile(GemmTile tile) { return detail::find(kDenseTiles, tile); }

/// How one GEMM runs.
struct GemmConfig {
  GemmTile tile;
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
  int swizzle = 1;  ///< lines of clusters that are walked together, so that their operands stay in L2
  bool raster_along_m = true;
  int splits = 1;  ///< mm: parts of K that each tile is computed in, which go to the workspace and are added up
  bool splits_last_wave =
      false;  ///< overlapped dense tiles: those that whole waves of all CTAs leave over are quarters
};

/// A tile with K tiles as deep as the metadata atom, in the first of all orders.
GemmConfig config_of(const TileSpec& tile, DType dtype);

/// "128x256x64 cluster 2x1 swizzle 8 along M", and behind it " split 4" or ", the last tiles in quarters"
std::string to_string(const GemmConfig& config);

}  // namespace sparse24
