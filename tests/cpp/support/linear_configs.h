/// @file
/// Configurations of the dense GEMMs beside the library's own choice, for tests of every kernel.
#pragma once

#include <vector>

#include "sparse24/linear.h"

namespace sparse24::test {

/// Every one of `tiles`: as few of them as cover the result, then in the other raster order than the library would take
/// and with a swizzle that pads, or makes unequal groups; and both with the tiles that whole waves leave over in
/// quarters, where a tile has them.
inline std::vector<GemmConfig> other_linear_configs(DType dtype, int64_t m, int64_t n, const LinearTiles& tiles) {
  const bool along_m = select_linear_config(dtype, m, n, 64, 132, {GemmTile::k128x128}).raster_along_m;
  std::vector<GemmConfig> configs = linear_configs(dtype, tiles);
  for (GemmConfig& config : configs) config.raster_along_m = along_m;
  for (GemmConfig config : linear_configs(dtype, tiles)) {
    config.raster_along_m = !along_m;
    config.swizzle = config.tile == GemmTile::k128x256 ? 3 : 8;
    configs.push_back(config);
  }
  for (size_t i = 0, count = configs.size(); i < count; ++i) {
    if (configs[i].tile != GemmTile::k128x256) continue;
    configs.push_back(configs[i]);
    configs.back().splits_last_wave = true;
  }
  return configs;
}

}  // namespace sparse24::test
