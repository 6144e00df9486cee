// Host side of linear_gradient_fp8: checks, and launches its kernel.
#include "elementwise/hot_slots.h"
#include "gemm/linear_gradient_fp8_launchers.h"
#include "gemm/tuning.h"
#include "sparse24/device.h"
#include "sparse24/error.h"

namespace sparse24::cuda {

void linear_gradient_fp8(const LinearGradientFp8Args& args, const GemmConfig& config, cudaStream_t stream) {
  if (args.tokens == 0 || args.features == 0) return;
  check(args.in > 0, "sparse24.linear_gradient_fp8: expected K (columns of grad) to be above 0, got 0");
  check(config.tile == kLinearGradientTile, "sparse24.linear_gradient_fp8: expected a tile of 128x192, got ",
        to_string(config));
  if (args.hot_count > 0) hot_slots(args, stream);
  launch_linear_gradient_fp8_sm90<DType::kFloat8E4M3>(args, config, stream);
}

void linear_gradient_fp8(const LinearGradientFp8Args& args, cudaStream_t stream) {
  GemmConfig config = select_linear_gradient_config(DType::kFloat8E4M3, args.tokens, args.features, device_model());
  // Its order: other kernels that read the variable have two tiles or more.
  if (const auto wanted = tuning_override("SPARSE24_LINEAR_CONFIG", {config, config})) {
    config.swizzle = wanted->swizzle;
    config.raster_along_m = wanted->raster_along_m;
  }
  linear_gradient_fp8(args, config, stream);
}

}  // namespace sparse24::cuda
