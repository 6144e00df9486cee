/// @file
/// sparse24.feature_counts: how many of some tokens use each feature of a 2:4 activation.
#include <algorithm>

#include "tensor.h"

namespace sparse24::torch_ops {

Tensor feature_counts(const Tensor& values, const Tensor& meta, int64_t samples, bool fp8_meta) {
  constexpr OpName op = "sparse24.feature_counts";
  FeatureCountsArgs args{};
  check_sizes(op, "values", values, 2);
  const DType dtype =
      check_dtype(op, "values", values, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  args.meta_dtype = fp8_meta ? DType::kFloat8E4M3 : dtype;
  const int64_t multiple = feature_alignment(args.meta_dtype, Dim::kFeatures) / 2;
  expect(values.size(1) % multiple == 0, op, "values to have a multiple of ", multiple, " columns (",
         fp8_meta ? "fp8_meta=True" : name_of(dtype), "), got ", values.size(1));
  args.a = Operand::of(values.size(0), 2 * values.size(1), dtype, Dim::kFeatures);
  check_device(op, "meta", meta, "values", values);
  check_meta(op, meta, args.pattern());
  expect(samples >= 1, op, "samples to be 1 or more, got ", samples);
  const DeviceScope scope(op, values);

  args.samples = std::min(samples, args.a.m);
  const Tensor counts = torch::stable::new_zeros(values, {args.a.k}, ScalarType::Int);
  if (args.a.m > 0 && args.a.k > 0) {
    const Tensor source = contiguous_aligned(values), pattern = contiguous_aligned(meta);
    args.values = source.const_data_ptr();
    args.meta = pattern.const_data_ptr<uint8_t>();
    args.counts = counts.mutable_data_ptr<int32_t>();
    scope.run(cpu::feature_counts, cuda::feature_counts, args);
  }
  return counts;
}

}  // namespace sparse24::torch_ops
