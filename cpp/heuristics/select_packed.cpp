// The tile of the first GEMM with a 2:4 weight, and the order of tiles.
#include "heuristics/cost_model.h"
#include "sparse24/format.h"
#include "sparse24/packed.h"

namespace sparse24 {

namespace {

// Input features from which the overlapped tiles of float8 are faster, their epilogue being short beside the product,
// if it has no statistics to collect (docs/log/101-one-warpgroup-a-tile.md).
constexpr int64_t kOverlappedDepth = 4096;

}  // namespace

std::vector<GemmConfig> linear_packed_configs(const LinearArgs& args) {
  std::vector<GemmConfig> configs{config_of(sparse_tile(GemmTile::k128x256), args.dtype)};
  if (args.y_dtype == DType::kFloat8E4M3) configs.push_back(config_of(dense_tile(GemmTile::k128x192), args.dtype));
  return configs;
}

GemmConfig linear_packed_config(const LinearArgs& args, const DeviceModel& device) {
  const auto configs = linear_packed_configs(args);
  const bool statistics = args.amax || args.saturated;
  const bool overlaps = configs.size() == 1 || (args.in >= kOverlappedDepth && !statistics);
  GemmConfig config = configs[overlaps ? 0 : 1];
  // Tiles that run together share rows of the weight and of x in L2. On an H200 8 rows of clusters are within 1 % of
  // the best order in 16 bits, and 16 in 8 (docs/log/072-two-four-weights.md).
  config.swizzle = int(16 / size_of(args.dtype));
  config.raster_along_m = true;
  const CostModel model{device, measured_costs()};
  config.splits_last_wave =
      overlaps && model.splits_pay({Product::kSparse, args.dtype, args.out, args.tokens, args.in}, config);
  return config;
}

}  // namespace sparse24
