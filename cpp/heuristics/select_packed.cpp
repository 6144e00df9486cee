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

// Tiles of one warpgroup wherever they are compiled: at 4,096 input features they take 0.90 and 0.92 of the overlapped
// tiles' time in float8, 0.81 and 0.85 back to back; and in 16 bits, at four sizes, 0.98 to 1.01, 0.97 to 0.98 back to
// back (docs/log/107-metadata-two-k-tiles-ahead.md).
GemmConfig linear_packed_config(const LinearCompressArgs& args) {
  constexpr const char* kOp = "sparse24.linear_compress_packed";
  const LinearArgs& linear = args.linear;
  // What is quantised afterwards is of 16 bits here, but its metadata is that of the output.
  check(args.meta_dtype == linear.dtype, kOp, ": expected out_dtype to be ", name_of(linear.dtype),
        " (the dtype of x, on CUDA), got ", name_of(args.meta_dtype));
  const auto configs = linear_packed_configs(linear);
  check(!configs.empty(), kOp, ": expected w to have a multiple of ", kGroupedFeatures, " rows (",
        name_of(linear.y_dtype), " output), got ", linear.out);
  GemmConfig config = configs.back();
  // Tiles that run together share rows of the weight and of x in L2: 8 rows of clusters are within 1 % of the best
  // order.
  config.swizzle = 8;
  config.raster_along_m = true;
  return config;
}

}  // namespace sparse24
