/// @file
/// Configurations of the dense GEMMs beside the library's own choice, for tests of every kernel.
#pragma once

#include <vector>

#include "sparse24/linear.h"

namespace sparse24::test {

/// Every tile that is compiled, in the other raster order and with a swizzle that pads.
inline std::vector<LinearConfig> other_linear_configs(DType dtype, int64_t m, int64_t n, bool wide) {
  LinearConfig config = select_linear_config(dtype, m, n, 132, /*wide=*/false);
  config.raster_along_m = !config.raster_along_m;
  config.swizzle = 8;
  std::vector<LinearConfig> configs{config};
  if (wide) {
    config.tile = LinearTile::k128x192;
    config.tile_n = 192;
    configs.push_back(config);
  }
  return configs;
}

}  // namespace sparse24::test
