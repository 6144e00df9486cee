/// @file
/// sparse24.linear_gradient_fp8 and linear_gradient_fp8_packed: every size against the others, and a copy of the last
/// rows where tokens are odd.
#include "gradient_fp8.h"

namespace sparse24::torch_ops {
namespace {

constexpr DType kFp8 = DType::kFloat8E4M3;
using Gradient = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The arguments of both ops but the scales. `w_meta`: w is the values of a packed weight.
struct Inputs {
  const Tensor& grad;
  const Tensor& w;
  const Tensor* w_meta;
  const Tensor& values;
  const Tensor& meta;
  bool interleaved;
  const std::optional<Tensor>& hot;
};

/// Checks the sizes and dtypes of everything but the scales.
LinearGradientFp8Args check_operands(OpName op, const Inputs& in) {
  const int64_t multiple = feature_alignment(kFp8, Dim::kFeatures);
  auto args = check_fp8_product<LinearGradientFp8Args>(op, in.grad, in.w, multiple, in.w_meta != nullptr);
  if (in.w_meta) {
    check_device(op, "w_meta", *in.w_meta, "grad", in.grad);
    check_meta(op, *in.w_meta, Operand::of(args.features, args.in, kFp8, Dim::kFeatures), "w_meta");
  }
  check_fp8_beside(op, "values", in.values, in.grad);
  expect(in.values.size(0) == args.tokens, op, "values to have ", args.tokens, " rows (rows of grad), got ",
         in.values.size(0));
  expect(in.values.size(1) == args.features / 2, op, "values to have ", args.features / 2,
         " columns (half the rows of w), got ", in.values.size(1));
  check_device(op, "meta", in.meta, "grad", in.grad);
  check_meta(op, in.meta, Operand::of(args.tokens, args.features, kFp8, Dim::kFeatures));
  return args;
}

/// Multiplies grad with the dense weight, in the kernel that does all of it.
void run_dense(const DeviceScope& scope, const Inputs& in, LinearGradientFp8Args& args) {
  const Fp8ProductOwners owners = prepare_fp8_product(in.grad, in.w, args);
  scope.run(SPARSE24_KERNELS(linear_gradient_fp8), args);
}

/// Multiplies it with the packed one; dy goes through memory where no kernel does all of it.
void run_packed(const DeviceScope& scope, const Inputs& in, LinearGradientFp8Args& args) {
  const bool through_memory = in.grad.is_cuda() && !linear_gradient_fp8_packed_is_fused(args);
  Tensor dy = new_empty(in.grad, {through_memory ? args.tokens : 0, args.features}, ScalarType::BFloat16);
  PackedProductOwners owners = prepare_packed_product(in.grad, in.w, *in.w_meta, kFp8, args);
  scope.run(SPARSE24_KERNELS(linear_gradient_fp8_packed),
            LinearGradientFp8PackedArgs{args, owners.w_meta.const_data_ptr<uint8_t>(), dy.mutable_data_ptr()});
}

Gradient gradient(OpName op, const Inputs& in, const Tensor& scale_grad, const Tensor& scale_w, const Tensor& scale_y,
                  const Tensor& scale_dh) {
  const Tensor& grad = in.grad;
  LinearGradientFp8Args args = check_operands(op, in);
  const FourScales scales(op, scale_grad, scale_w, scale_y, scale_dh, grad);
  if (in.hot) args.hot_count = check_hot(op, *in.hot, grad, args.features, "rows of w");
  args.interleaved = in.interleaved;
  const DeviceScope scope(op, grad);

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
    const Tensor owned_values = contiguous_aligned(in.values), owned_meta = contiguous_aligned(in.meta);
    scales.point(args);
    args.y = owned_values.const_data_ptr();
    args.meta = owned_meta.const_data_ptr<uint8_t>();
    args.dh = dh.mutable_data_ptr();
    args.dh_tokens = {dh_tokens.mutable_data_ptr(), dh_meta.mutable_data_ptr<uint8_t>()};
    args.y_tokens = {y_tokens.mutable_data_ptr(), y_meta.mutable_data_ptr<uint8_t>()};
    args.amax = amax.mutable_data_ptr<float>();
    args.saturated = saturated.mutable_data_ptr<int32_t>();
    const HotOwners hot_owners = prepare_hot(in.hot, y_hot, dh_hot, args);
    in.w_meta ? run_packed(scope, in, args) : run_dense(scope, in, args);
  }
  return {dh, dh_tokens, dh_meta, y_tokens, y_meta, y_hot, dh_hot, amax, saturated};
}

}  // namespace

Gradient linear_gradient_fp8(const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta,
                             const Tensor& scale_grad, const Tensor& scale_w, const Tensor& scale_y,
                             const Tensor& scale_dh, bool interleaved, const std::optional<Tensor>& hot) {
  return gradient("sparse24.linear_gradient_fp8", {grad, w, nullptr, values, meta, interleaved, hot}, scale_grad,
                  scale_w, scale_y, scale_dh);
}

Gradient linear_gradient_fp8_packed(const Tensor& grad, const Tensor& w, const Tensor& w_meta, const Tensor& values,
                                    const Tensor& meta, const Tensor& scale_grad, const Tensor& scale_w,
                                    const Tensor& scale_y, const Tensor& scale_dh, bool interleaved,
                                    const std::optional<Tensor>& hot) {
  return gradient("sparse24.linear_gradient_fp8_packed", {grad, w, &w_meta, values, meta, interleaved, hot}, scale_grad,
                  scale_w, scale_y, scale_dh);
}

SPARSE24_OP(linear_gradient_fp8,
            "linear_gradient_fp8(Tensor grad, Tensor w, Tensor values, Tensor meta, Tensor scale_grad, Tensor scale_w, "
            "Tensor scale_y, Tensor scale_dh, bool interleaved=False, Tensor? hot=None) -> (Tensor dh_values, "
            "Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, Tensor y_hot, "
            "Tensor dh_hot, Tensor amax, Tensor saturated)")
SPARSE24_OP(linear_gradient_fp8_packed,
            "linear_gradient_fp8_packed(Tensor grad, Tensor w, Tensor w_meta, Tensor values, Tensor meta, "
            "Tensor scale_grad, Tensor scale_w, Tensor scale_y, Tensor scale_dh, bool interleaved=False, "
            "Tensor? hot=None) -> (Tensor dh_values, Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, "
            "Tensor y_tokens_meta, Tensor y_hot, Tensor dh_hot, Tensor amax, Tensor saturated)")

}  // namespace sparse24::torch_ops
