// Host side of linear_relu2_gradient_fp8: checks, and launches its kernel.
#include "gemm/linear_relu2_gradient_fp8_launchers.h"
#include "sparse24/device.h"
#include "sparse24/error.h"

namespace sparse24::cuda {

void linear_relu2_gradient_fp8(const LinearRelu2GradientFp8Args& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.features == 0) return;
  check(args.in > 0, "sparse24.linear_relu2_gradient_fp8: expected K (columns of grad) to be above 0, got 0");
  const GemmConfig config =
      select_linear_gradient_config(DType::kFloat8E4M3, args.tokens, args.features, device_model());
  launch_linear_relu2_gradient_fp8_sm90<DType::kFloat8E4M3>(args, config, stream);
}

}  // namespace sparse24::cuda
