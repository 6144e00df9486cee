// The order of tiles of the first GEMM with a 2:4 weight, which has one tile.
#include "heuristics/cost_model.h"
#include "sparse24/format.h"
#include "sparse24/packed.h"

namespace sparse24 {

GemmConfig linear_packed_config(DType dtype, int64_t tokens, int64_t out, int64_t in, const DeviceModel& device) {
  GemmConfig config = config_of(sparse_tile(GemmTile::k128x256), dtype);
  // Tiles that run together share rows of the weight and of x in L2. On an H200 8 rows of clusters are within 1 % of
  // the best order in 16 bits, and 16 in 8 (docs/log/072-two-four-weights.md).
  config.swizzle = int(16 / size_of(dtype));
  config.raster_along_m = true;
  const CostModel model{device, measured_costs()};
  config.splits_last_wave = model.splits_pay({Product::kSparse, dtype, out, tokens, in}, config);
  return config;
}

}  // namespace sparse24
