/// @file
/// sparse24.linear_gradient: every size against the others, one copy where rows are not aligned.
#include "gradient.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.linear_gradient";

/// Sizes and dtypes of everything, checked.
LinearGradientArgs check_operands(const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta,
                                  bool fp8_meta) {
  auto args = check_product<LinearGradientArgs>(kOp, grad, w);
  const DType dtype = args.dtype;
  args.meta_dtype = fp8_meta ? DType::kFloat8E4M3 : dtype;
  const int64_t multiple = feature_alignment(args.meta_dtype, Dim::kFeatures);
  expect(args.features % multiple == 0, kOp, "w to have a multiple of ", multiple, " columns (",
         fp8_meta ? "fp8_meta=True" : name_of(dtype), fp8_meta ? "" : " values", "), got ", args.features);
  check_beside(kOp, "values", values, grad, dtype);
  expect(values.size(0) == args.tokens, kOp, "values to have ", args.tokens, " rows (rows of grad), got ",
         values.size(0));
  expect(values.size(1) == args.features / 2, kOp, "values to have ", args.features / 2,
         " columns (half the columns of w), got ", values.size(1));
  check_device(kOp, "meta", meta, "grad", grad);
  check_meta(kOp, meta, Operand::of(args.tokens, args.features, args.meta_dtype, Dim::kFeatures));
  return args;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_gradient(const Tensor& grad, const Tensor& w,
                                                                           const Tensor& values, const Tensor& meta,
                                                                           bool interleaved, bool tokens,
                                                                           bool fp8_meta) {
  LinearGradientArgs args = check_operands(grad, w, values, meta, fp8_meta);
  args.interleaved = interleaved;
  const DeviceScope scope(kOp, grad);

  const Operand along_tokens = Operand::of(args.tokens, args.features, args.dtype, Dim::kTokens);
  const auto new_values = [&] {
    return tokens ? new_empty(grad, {along_tokens.values_rows(), along_tokens.values_cols()}, grad.scalar_type())
                  : new_empty(grad, {0}, grad.scalar_type());
  };
  const auto new_meta = [&] { return new_empty(grad, {tokens ? along_tokens.meta_bytes() : 0}, ScalarType::Byte); };
  const Tensor dh = new_empty(grad, {args.tokens, args.features / 2}, grad.scalar_type());
  const Tensor dh_tokens = new_values(), dh_meta = new_meta(), y_tokens = new_values(), y_meta = new_meta();
  const Tensor counts = torch::stable::new_zeros(grad, {tokens ? args.features : 0}, ScalarType::Int);
  if (args.tokens > 0 && args.features > 0) {
    const ProductOwners owners = prepare_product(grad, w, args);
    const Tensor owned_values = contiguous_aligned(values), owned_meta = contiguous_aligned(meta);
    args.y = owned_values.const_data_ptr();
    args.meta = owned_meta.const_data_ptr<uint8_t>();
    args.dh = dh.mutable_data_ptr();
    if (tokens) {
      args.dh_tokens = {dh_tokens.mutable_data_ptr(), dh_meta.mutable_data_ptr<uint8_t>()};
      args.y_tokens = {y_tokens.mutable_data_ptr(), y_meta.mutable_data_ptr<uint8_t>()};
      args.counts = counts.mutable_data_ptr<int32_t>();
    }
    scope.run(cpu::linear_gradient, cuda::linear_gradient, args);
  }
  return {dh, dh_tokens, dh_meta, y_tokens, y_meta, counts};
}

}  // namespace sparse24::torch_ops
