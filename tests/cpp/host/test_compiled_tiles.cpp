/// @file
/// The tiles that are chosen from are those that the lists of kernels compile, for every combination of types.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>

#include "sparse24/linear.h"
#include "sparse24/mm.h"

namespace sparse24 {
namespace {

template <class Tile>
std::set<Tile> as_set(const std::vector<Tile>& tiles) {
  return {tiles.begin(), tiles.end()};
}

struct Kernel {
  DType x, y, meta;
  GemmTile tile;
};

TEST(CompiledTiles, OfLinearCompress) {
  const Kernel kernels[] = {
#define SPARSE24_LINEAR_COMPRESS(x, pre_activation, y, meta, tile) {DType::x, DType::y, DType::meta, GemmTile::tile},
#include "sparse24/tiles.def"
  };
  std::map<std::tuple<DType, DType, DType>, std::set<GemmTile>> compiled;
  for (const Kernel& k : kernels) compiled[{k.x, k.y, k.meta}].insert(k.tile);
  EXPECT_EQ(compiled.size(), 9u);  // x by what is made of it: 16 bits, the same with fp8 metadata, fp8
  for (const auto& [types, tiles] : compiled) {
    const auto [x, y, meta] = types;
    EXPECT_EQ(as_set(linear_compress_tiles(x, y, meta)), tiles)
        << name_of(x) << " " << name_of(y) << " " << name_of(meta);
  }
}

TEST(CompiledTiles, OfLinearRelu2) {
  const Kernel kernels[] = {
#define SPARSE24_LINEAR_RELU2(x, pre_activation, y, tile) {DType::x, DType::y, DType::y, GemmTile::tile},
#include "sparse24/tiles.def"
  };
  std::map<std::pair<DType, DType>, std::set<GemmTile>> compiled;
  for (const Kernel& k : kernels) compiled[{k.x, k.y}].insert(k.tile);
  EXPECT_EQ(compiled.size(), 6u);
  for (const auto& [types, tiles] : compiled) {
    EXPECT_EQ(as_set(linear_relu2_tiles(types.first, types.second)), tiles)
        << name_of(types.first) << " " << name_of(types.second);
  }
}

TEST(CompiledTiles, OfLinearRelu2Gradient) {
  std::map<DType, std::set<GemmTile>> compiled;
#define SPARSE24_LINEAR_RELU2_GRADIENT(dtype, tile) compiled[DType::dtype].insert(GemmTile::tile);
#include "sparse24/tiles.def"
  EXPECT_EQ(compiled.size(), 2u);
  for (const auto& [dtype, tiles] : compiled) EXPECT_EQ(as_set(linear_relu2_gradient_tiles()), tiles) << name_of(dtype);
}

TEST(CompiledTiles, OfMm) {
  enum Dimension { kFeatures, kTokens };
  enum MajorOfB { kRow, kColumn };
  std::map<std::tuple<DType, Dimension, MajorOfB>, std::set<GemmTile>> compiled;
#define SPARSE24_MM(dtype, dim, major, tile) compiled[{DType::dtype, dim, major}].insert(GemmTile::tile);
#include "sparse24/tiles.def"
  std::set<DType> dtypes;
  for (const auto& [kind, tiles] : compiled) {
    const DType dtype = std::get<0>(kind);
    dtypes.insert(dtype);
    std::set<GemmTile> chosen_from;
    for (const GemmConfig& config : mm_configs(dtype)) chosen_from.insert(config.tile);
    EXPECT_EQ(chosen_from, tiles) << name_of(dtype);
  }
  EXPECT_EQ(dtypes.size(), 3u);
}

}  // namespace
}  // namespace sparse24
