/// @file
/// sparse24.densest_features: the features that the most tokens use.
#include "tensor.h"

namespace sparse24::torch_ops {

Tensor densest_features(const Tensor& counts, int64_t k) {
  constexpr OpName op = "sparse24.densest_features";
  check_sizes(op, "counts", counts, 1);
  expect(counts.scalar_type() == ScalarType::Int, op, "counts to be int32, got ", dtype_text(counts.scalar_type()));
  const int64_t features = counts.size(0);
  expect(0 <= k && k <= features, op, "k to be at least 0 and at most ", features, " (elements of counts), got ", k);
  const DeviceScope scope(op, counts);

  const Tensor out = new_empty(counts, {k}, ScalarType::Long);
  if (k > 0) {
    const Tensor source = as_contiguous(counts);
    const DensestFeaturesArgs args{source.const_data_ptr<int32_t>(), features, k, out.mutable_data_ptr<int64_t>()};
    scope.run(SPARSE24_KERNELS(densest_features), args);
  }
  return out;
}

SPARSE24_OP(densest_features, "densest_features(Tensor counts, SymInt k) -> Tensor")

}  // namespace sparse24::torch_ops
