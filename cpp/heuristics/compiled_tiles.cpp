// What is compiled (tiles.def), as lists to choose from.
#include <algorithm>

#include "sparse24/error.h"
#include "sparse24/format.h"
#include "sparse24/linear.h"
#include "sparse24/mm.h"

namespace sparse24 {
namespace {

bool contains(const std::vector<GemmTile>& tiles, GemmTile tile) {
  return std::find(tiles.begin(), tiles.end(), tile) != tiles.end();
}

template <size_t kCount>
std::vector<GemmConfig> configs_of(const TileSpec (&specs)[kCount], const std::vector<GemmTile>& tiles, DType dtype) {
  check(dtype != DType::kFloat32, "sparse24: expected a 16-bit or fp8 dtype on the GPU, got ", name_of(dtype));
  std::vector<GemmConfig> configs;
  for (const TileSpec& spec : specs) {
    if (contains(tiles, spec.tile)) configs.push_back(config_of(spec, dtype));
  }
  return configs;
}

}  // namespace

GemmConfig config_of(const TileSpec& t, DType dtype) {
  return {t.tile, t.m, t.n, int(meta_atom_k(dtype)), t.cluster_m, t.cluster_n};
}

std::string to_string(const GemmConfig& c) {
  std::string text = std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n) + "x" + std::to_string(c.tile_k) +
                     " cluster " + std::to_string(c.cluster_m) + "x" + std::to_string(c.cluster_n) + " swizzle " +
                     std::to_string(c.swizzle) + " along " + (c.raster_along_m ? "M" : "N");
  if (c.splits > 1) text += " split " + std::to_string(c.splits);
  return c.splits_last_wave ? text + ", the last tiles in quarters" : text;
}

std::vector<GemmConfig> mm_configs(DType dtype) {
  std::vector<GemmTile> tiles;  // of every layout of A and B the same
#define SPARSE24_MM(of, a_dim, b_major, tile) \
  if (DType::of == dtype) tiles.push_back(GemmTile::tile);
#include "sparse24/tiles.def"
  return configs_of(kSparseTiles, tiles, dtype);
}

std::vector<GemmConfig> linear_configs(DType dtype, const LinearTiles& tiles) {
  return configs_of(kDenseTiles, tiles, dtype);
}

LinearTiles linear_relu2_tiles(DType x, DType y) {
  LinearTiles tiles;
#define SPARSE24_LINEAR_RELU2(of_x, pre_activation, of_y, tile) \
  if (DType::of_x == x && DType::of_y == y) tiles.push_back(GemmTile::tile);
#include "sparse24/tiles.def"
  return tiles;
}

LinearTiles linear_compress_tiles(DType x, DType y, DType meta) {
  LinearTiles tiles;  // metadata of both 16-bit types is the same
#define SPARSE24_LINEAR_COMPRESS(of_x, pre_activation, of_y, of_meta, tile)                     \
  if (DType::of_x == x && DType::of_y == y && meta_atom_k(DType::of_meta) == meta_atom_k(meta)) \
    tiles.push_back(GemmTile::tile);
#include "sparse24/tiles.def"
  return tiles;
}

LinearTiles linear_relu2_gradient_tiles() {
  LinearTiles tiles;  // of both 16-bit types the same
#define SPARSE24_LINEAR_RELU2_GRADIENT(of, tile) \
  if (!contains(tiles, GemmTile::tile)) tiles.push_back(GemmTile::tile);
#include "sparse24/tiles.def"
  return tiles;
}

}  // namespace sparse24
