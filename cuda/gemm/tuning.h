// An environment variable "tile,swizzle,m|n[,parts]" that overrides the choice of a GEMM's configuration, for tuning.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <vector>

#include "sparse24/error.h"
#include "sparse24/gemm.h"

namespace sparse24::cuda {

// One of `configs`, of which tile is the index, in an order of tiles; `splits` are the parts.
inline std::optional<GemmConfig> tuning_override(const char* variable, const std::vector<GemmConfig>& configs) {
  const char* text = std::getenv(variable);
  if (!text) return std::nullopt;
  int tile = 0, swizzle = 1, parts = 1;
  char raster = 'm';
  const int fields = std::sscanf(text, "%d,%d,%c,%d", &tile, &swizzle, &raster, &parts);
  check(fields >= 3 && tile >= 0 && tile < int(configs.size()) && swizzle > 0 && parts > 0, "sparse24: expected ",
        variable, " to be \"tile,swizzle,m|n[,parts]\" with tile below ", configs.size(),
        " and swizzle above 0, got \"", text, "\"");
  GemmConfig config = configs[tile];
  config.swizzle = swizzle;
  config.raster_along_m = raster == 'm';
  config.splits = parts;
  return config;
}

}  // namespace sparse24::cuda
