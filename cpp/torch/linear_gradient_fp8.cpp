/// @file
/// sparse24.linear_gradient_fp8: every size against the others, and a copy of the last rows where tokens are odd.
#include "gradient_fp8.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.linear_gradient_fp8";
constexpr DType kFp8 = DType::kFloat8E4M3;

/// Checks the sizes and dtypes of everything but the scales.
LinearGradientFp8Args check_operands(const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta) {
  auto args = check_fp8_product<LinearGradientFp8Args>(kOp, grad, w, feature_alignment(kFp8, Dim::kFeatures));
  check_fp8_beside(kOp, "values", values, grad);
  expect(values.size(0) == args.tokens, kOp, "values to have ", args.tokens, " rows (rows of grad), got ",
         values.size(0));
  expect(values.size(1) == args.features / 2, kOp, "values to have ", args.features / 2,
         " columns (half the rows of w), got ", values.size(1));
  check_device(kOp, "meta", meta, "grad", grad);
  check_meta(kOp, meta, Operand::of(args.tokens, args.features, kFp8, Dim::kFeatures));
  return args;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_gradient_fp8(
    const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta, const Tensor& scale_grad,
    const Tensor& scale_w, const Tensor& scale_y, const Tensor& scale_dh, bool interleaved,
    const std::optional<Tensor>& hot) {
  LinearGradientFp8Args args = check_operands(grad, w, values, meta);
  const FourScales scales(kOp, scale_grad, scale_w, scale_y, scale_dh, grad);
  if (hot) args.hot_count = check_hot(kOp, *hot, grad, args.features, "rows of w");
  args.interleaved = interleaved;
  const DeviceScope scope(kOp, grad);

  const ScalarType fp8 = to_torch(kFp8);
  const Operand along_tokens = Operand::of(args.tokens, args.features, kFp8, Dim::kTokens);
  const auto new_values = [&] {
    return new_empty(grad, {along_tokens.values_rows(), along_tokens.values_cols()}, fp8);
  };
  const auto new_meta = [&] { return new_empty(grad, {along_tokens.meta_bytes()}, ScalarType::Byte); };
  // Behind the last token there are zeros, which no tile of the kernel need reach.
  const auto new_rows = [&] {
    return args.ld_hot() == args.tokens ? new_empty(grad, {args.hot_count, args.ld_hot()}, fp8)
                                        : new_zeros(grad, {args.hot_count, args.ld_hot()}, fp8);
  };
  const Tensor dh = new_empty(grad, {args.tokens, args.features / 2}, fp8);
  const Tensor dh_tokens = new_values(), dh_meta = new_meta(), y_tokens = new_values(), y_meta = new_meta();
  const Tensor y_hot = new_rows(), dh_hot = new_rows();
  const Tensor amax = new_zeros(grad, {1}, ScalarType::Float), saturated = new_zeros(grad, {1}, ScalarType::Int);
  if (args.tokens > 0 && args.features > 0) {
    const Fp8ProductOwners owners = prepare_fp8_product(grad, w, args);
    const Tensor owned_values = contiguous_aligned(values), owned_meta = contiguous_aligned(meta);
    scales.point(args);
    args.y = owned_values.const_data_ptr();
    args.meta = owned_meta.const_data_ptr<uint8_t>();
    args.dh = dh.mutable_data_ptr();
    args.dh_tokens = {dh_tokens.mutable_data_ptr(), dh_meta.mutable_data_ptr<uint8_t>()};
    args.y_tokens = {y_tokens.mutable_data_ptr(), y_meta.mutable_data_ptr<uint8_t>()};
    args.amax = amax.mutable_data_ptr<float>();
    args.saturated = saturated.mutable_data_ptr<int32_t>();
    const HotOwners hot_owners = prepare_hot(hot, y_hot, dh_hot, args);
    scope.run(SPARSE24_KERNELS(linear_gradient_fp8), args);
  }
  return {dh, dh_tokens, dh_meta, y_tokens, y_meta, y_hot, dh_hot, amax, saturated};
}

SPARSE24_OP(linear_gradient_fp8,
            "linear_gradient_fp8(Tensor grad, Tensor w, Tensor values, Tensor meta, Tensor scale_grad, Tensor scale_w, "
            "Tensor scale_y, Tensor scale_dh, bool interleaved=False, Tensor? hot=None) -> (Tensor dh_values, "
            "Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, Tensor y_hot, "
            "Tensor dh_hot, Tensor amax, Tensor saturated)")

}  // namespace sparse24::torch_ops
