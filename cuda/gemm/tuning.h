// An environment variable "tile,swizzle,m|n[,splits]" that overrides the choice of a GEMM's configuration, for tuning.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <optional>

#include "sparse24/error.h"
#include "sparse24/mm.h"

namespace sparse24::cuda {

struct TuningOverride {
  int tile;  // an index into the compiled configurations
  TileOrder order;
  int splits;  // parts of K; of the first GEMM: more than one divides the last tiles
};

inline std::optional<TuningOverride> tuning_override(const char* variable, int tiles) {
  const char* text = std::getenv(variable);
  if (!text) return std::nullopt;
  int tile = 0, swizzle = 1, splits = 1;
  char raster = 'm';
  const int fields = std::sscanf(text, "%d,%d,%c,%d", &tile, &swizzle, &raster, &splits);
  check(fields >= 3 && tile >= 0 && tile < tiles && swizzle > 0 && splits > 0, "sparse24: expected ", variable,
        " to be \"tile,swizzle,m|n[,splits]\" with tile below ", tiles, " and swizzle above 0, got \"", text, "\"");
  return TuningOverride{tile, {swizzle, raster == 'm'}, splits};
}

}  // namespace sparse24::cuda
