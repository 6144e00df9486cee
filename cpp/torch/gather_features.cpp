/// @file
/// sparse24.gather_features: columns of the dense matrix, from the 2:4 operand.
#include "tensor.h"

namespace sparse24::torch_ops {

Tensor gather_features(const Tensor& values, const Tensor& meta, const Tensor& features, bool fp8_meta) {
  constexpr OpName op = "sparse24.gather_features";
  GatherFeaturesArgs args{};
  check_kept(op, values, meta, fp8_meta, args);
  check_device(op, "features", features, "values", values);
  check_sizes(op, "features", features, 1);
  expect(features.scalar_type() == ScalarType::Long, op, "features to be int64, got ",
         dtype_text(features.scalar_type()));
  const DeviceScope scope(op, values);

  args.count = features.size(0);
  const Tensor out = new_empty(values, {args.a.m, args.count}, values.scalar_type());
  if (args.a.m > 0 && args.count > 0) {
    const Tensor source = contiguous_aligned(values), pattern = contiguous_aligned(meta);
    const Tensor columns = as_contiguous(features);
    args.values = source.const_data_ptr();
    args.meta = pattern.const_data_ptr<uint8_t>();
    args.features = columns.const_data_ptr<int64_t>();
    args.out = out.mutable_data_ptr();
    scope.run(SPARSE24_KERNELS(gather_features), args);
  }
  return out;
}

SPARSE24_OP(gather_features,
            "gather_features(Tensor values, Tensor meta, Tensor features, bool fp8_meta=False) -> Tensor")

}  // namespace sparse24::torch_ops
