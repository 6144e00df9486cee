/// @file
/// sparse24.linear_relu2_gradient_fp8: every size against the others.
#include "gradient_fp8.h"

namespace sparse24::torch_ops {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_relu2_gradient_fp8(const Tensor& grad, const Tensor& w,
                                                                             const Tensor& y, const Tensor& scale_grad,
                                                                             const Tensor& scale_w,
                                                                             const Tensor& scale_y,
                                                                             const Tensor& scale_dh) {
  constexpr OpName op = "sparse24.linear_relu2_gradient_fp8";
  constexpr int64_t kMultiple = 16;  // rows of y and dh are 16-byte aligned
  auto args = check_fp8_product<LinearRelu2GradientFp8Args>(op, grad, w, kMultiple);
  check_fp8_beside(op, "y", y, grad);
  expect(y.size(0) == args.tokens, op, "y to have ", args.tokens, " rows (rows of grad), got ", y.size(0));
  expect(y.size(1) == args.features, op, "y to have ", args.features, " columns (rows of w), got ", y.size(1));
  const FourScales scales(op, scale_grad, scale_w, scale_y, scale_dh, grad);
  const DeviceScope scope(op, grad);

  const ScalarType fp8 = ScalarType::Float8_e4m3fn;
  const Tensor dh = new_empty(grad, {args.tokens, args.features}, fp8);
  const Tensor y_transposed = new_empty(grad, {args.features, args.ld_transposed()}, fp8);
  const Tensor dh_transposed = new_empty(grad, {args.features, args.ld_transposed()}, fp8);
  const Tensor amax = new_zeros(grad, {1}, ScalarType::Float), saturated = new_zeros(grad, {1}, ScalarType::Int);
  if (args.tokens > 0 && args.features > 0) {
    const Fp8ProductOwners owners = prepare_fp8_product(grad, w, args);
    const Tensor owned_y = contiguous_aligned(y);
    scales.point(args);
    args.y = owned_y.const_data_ptr();
    args.dh = dh.mutable_data_ptr();
    args.y_transposed = y_transposed.mutable_data_ptr();
    args.dh_transposed = dh_transposed.mutable_data_ptr();
    args.amax = amax.mutable_data_ptr<float>();
    args.saturated = saturated.mutable_data_ptr<int32_t>();
    scope.run(SPARSE24_KERNELS(linear_relu2_gradient_fp8), args);
  }
  return {dh, dh_transposed, y_transposed, amax, saturated};
}

SPARSE24_OP(linear_relu2_gradient_fp8,
            "linear_relu2_gradient_fp8(Tensor grad, Tensor w, Tensor y, Tensor scale_grad, Tensor scale_w, "
            "Tensor scale_y, Tensor scale_dh) -> (Tensor dh, Tensor dh_transposed, Tensor y_transposed, Tensor amax, "
            "Tensor saturated)")

}  // namespace sparse24::torch_ops
