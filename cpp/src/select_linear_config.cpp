// How the first GEMM of the feed-forward network runs (bench/NOTES.md).
#include "sparse24/error.h"
#include "sparse24/linear.h"

namespace sparse24 {

// Along N, in groups: x, the larger operand, is read once, while the columns of a group find their rows of it in L2.
// Swizzling by s pads both tile counts to multiples of s clusters, so s must divide them.
LinearConfig select_linear_config(DType dtype, int64_t m, int64_t n) {
  check(dtype != DType::kFloat32, "sparse24: expected a 16-bit or fp8 dtype on the GPU, got ", name_of(dtype));
  LinearConfig config{128, 128, dtype == DType::kFloat8E4M3 ? 128 : 64, /*cluster_m=*/2, /*swizzle=*/4, false};
  const int64_t clusters_m = ceil_div(m, config.tile_m * config.cluster_m), tiles_n = ceil_div(n, config.tile_n);
  while (clusters_m % config.swizzle != 0 || tiles_n % config.swizzle != 0) config.swizzle /= 2;
  return config;
}

std::string to_string(const LinearConfig& c) {
  return std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n) + "x" + std::to_string(c.tile_k) + " cluster " +
         std::to_string(c.cluster_m) + "x1 swizzle " + std::to_string(c.swizzle) + " along " +
         (c.raster_along_m ? "M" : "N");
}

}  // namespace sparse24
