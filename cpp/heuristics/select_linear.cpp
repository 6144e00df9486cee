// The choice of how the first GEMM of the feed-forward network runs, and its gradient.
#include "heuristics/cost_model.h"
#include "sparse24/linear.h"
#include "sparse24/linear_gradient.h"

namespace sparse24 {

GemmConfig select_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, const DeviceModel& device,
                                const LinearTiles& tiles) {
  return fastest({device, measured_costs()}, {Product::kDense, dtype, m, n, k}, linear_configs(dtype, tiles));
}

GemmConfig select_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count, const LinearTiles& tiles) {
  return select_linear_config(dtype, m, n, k, reference_device(sm_count), tiles);
}

GemmConfig select_linear_gradient_config(DType dtype, int64_t tokens, int64_t features, const DeviceModel& device) {
  static_assert(dense_tile(kLinearGradientTile).scheduler() != Scheduler::kWaves, "no waves, for which K is needed");
  const CostModel model{device, measured_costs()};
  return model.in_order({Product::kDense, dtype, tokens, features, /*k=*/0},
                        linear_configs(dtype, {kLinearGradientTile}).front());
}

GemmConfig select_linear_gradient_config(DType dtype, int64_t tokens, int64_t features, int sm_count) {
  return select_linear_gradient_config(dtype, tokens, features, reference_device(sm_count));
}

}  // namespace sparse24
