/// @file
/// sparse24.feature_counts: how many of some tokens use each feature of a 2:4 activation.
#include <algorithm>

#include "tensor.h"

namespace sparse24::torch_ops {

Tensor feature_counts(const Tensor& values, const Tensor& meta, int64_t samples, bool fp8_meta) {
  constexpr OpName op = "sparse24.feature_counts";
  FeatureCountsArgs args{};
  check_kept(op, values, meta, fp8_meta, args);
  expect(samples >= 1, op, "samples to be 1 or more, got ", samples);
  const DeviceScope scope(op, values);

  args.samples = std::min(samples, args.a.m);
  const Tensor counts =
      args.a.m > 0 ? new_empty(values, {args.a.k}, ScalarType::Int) : new_zeros(values, {args.a.k}, ScalarType::Int);
  if (args.a.m > 0 && args.a.k > 0) {
    const Tensor source = contiguous_aligned(values), pattern = contiguous_aligned(meta);
    args.values = source.const_data_ptr();
    args.meta = pattern.const_data_ptr<uint8_t>();
    args.counts = counts.mutable_data_ptr<int32_t>();
    scope.run(SPARSE24_KERNELS(feature_counts), args);
  }
  return counts;
}

SPARSE24_OP(feature_counts,
            "feature_counts(Tensor values, Tensor meta, SymInt samples=1024, bool fp8_meta=False) -> Tensor")

}  // namespace sparse24::torch_ops
