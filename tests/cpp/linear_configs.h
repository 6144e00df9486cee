/// @file
/// Configurations of the dense GEMMs beside the library's own choice, for tests of every kernel.
#pragma once

#include <vector>

#include "sparse24/linear.h"

namespace sparse24::test {

/// Every one of `tiles`: as few of them as cover the result, then in the other raster order than the library would take
/// and with a swizzle that pads.
inline std::vector<LinearConfig> other_linear_configs(DType dtype, int64_t m, int64_t n, const LinearTiles& tiles) {
  const bool along_m = select_linear_config(dtype, m, n, 64, 132, {LinearTile::k128x128}).raster_along_m;
  std::vector<LinearConfig> configs = linear_configs(dtype, tiles);
  for (LinearConfig& config : configs) config.raster_along_m = along_m;
  for (LinearConfig config : linear_configs(dtype, tiles)) {
    config.raster_along_m = !along_m;
    config.swizzle = 8;
    configs.push_back(config);
  }
  return configs;
}

}  // namespace sparse24::test
