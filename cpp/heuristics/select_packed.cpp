// The tile of the first GEMM with a 2:4 weight, and the order of tiles.
#include "sparse24/error.h"
#include "sparse24/packed.h"

namespace sparse24 {

std::vector<GemmConfig> linear_packed_configs(const LinearArgs& args) {
  std::vector<GemmConfig> configs;
  if (args.y_dtype != DType::kFloat8E4M3) configs.push_back(config_of(sparse_tile(GemmTile::k128x256), args.dtype));
  if (args.y_dtype == args.dtype && args.out % kGroupedFeatures == 0)
    configs.push_back(config_of(dense_tile(GemmTile::k128x192), args.dtype));
  return configs;
}

// Tiles of one warpgroup wherever they are compiled: at four sizes they take 0.78 to 0.92 of the overlapped tiles' time
// in float8, and 0.97 to 1.00 in 16 bits, 0.94 to 0.97 back to back (docs/log/107-metadata-two-k-tiles-ahead.md).
GemmConfig linear_packed_config(const LinearArgs& args) {
  const auto configs = linear_packed_configs(args);
  check(!configs.empty(), "sparse24.linear_compress_packed: expected x ", name_of(DType::kFloat8E4M3),
        " and a multiple of ", kGroupedFeatures, " features for y ", name_of(args.y_dtype), ", got x ",
        name_of(args.dtype), " and ", args.out, " features");
  GemmConfig config = configs.back();
  // Tiles that run together share rows of the weight and of x in L2: 8 rows of clusters are within 1 % of the best
  // order.
  config.swizzle = 8;
  config.raster_along_m = true;
  return config;
}

}  // namespace sparse24
