// The choice of the kernel that runs a sparse GEMM.
#include "heuristics/cost_model.h"
#include "sparse24/mm.h"

namespace sparse24 {

bool splits_evenly(const GemmConfig& config, int64_t k, int splits) {
  return splits == 1 || (splits <= kMostSplits && k % (int64_t{config.tile_k} * splits) == 0);
}

GemmConfig select_mm_config(DType dtype, int64_t m, int64_t n, int64_t k, const DeviceModel& device, bool may_split) {
  std::vector<GemmConfig> configs;
  for (GemmConfig config : mm_configs(dtype)) {
    for (config.splits = 1; config.splits <= (may_split ? kMostSplits : 1); ++config.splits) {
      if (splits_evenly(config, k, config.splits)) configs.push_back(config);
    }
  }
  return fastest({device, measured_costs()}, {Product::kSparse, dtype, m, n, k}, configs);
}

GemmConfig select_mm_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count, bool may_split) {
  return select_mm_config(dtype, m, n, k, reference_device(sm_count), may_split);
}

}  // namespace sparse24
