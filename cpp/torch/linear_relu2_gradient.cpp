/// @file
/// sparse24.linear_relu2_gradient: every size against the others, one copy where rows are not aligned.
#include "gradient.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.linear_relu2_gradient";

/// Rows of w, y and dh are 16-byte aligned: that of linear_relu2, which stores y.
constexpr int64_t kMultiple = 8;

/// Checks the sizes and dtypes of everything.
LinearRelu2GradientArgs check_operands(const Tensor& grad, const Tensor& w, const Tensor& y) {
  const auto args = check_product<LinearRelu2GradientArgs>(kOp, grad, w);
  expect(args.features % kMultiple == 0, kOp, "w to have a multiple of ", kMultiple, " columns (", name_of(args.dtype),
         " output), got ", args.features);
  check_beside(kOp, "y", y, grad, args.dtype);
  expect(y.size(0) == args.tokens, kOp, "y to have ", args.tokens, " rows (rows of grad), got ", y.size(0));
  expect(y.size(1) == args.features, kOp, "y to have ", args.features, " columns (columns of w), got ", y.size(1));
  return args;
}

}  // namespace

Tensor linear_relu2_gradient(const Tensor& grad, const Tensor& w, const Tensor& y, bool roots) {
  LinearRelu2GradientArgs args = check_operands(grad, w, y);
  args.roots = check_roots(kOp, args.dtype, roots);
  const DeviceScope scope(kOp, grad);

  const Tensor dh = new_empty(grad, {args.tokens, args.features}, grad.scalar_type());
  if (args.tokens > 0 && args.features > 0) {
    const ProductOwners owners = prepare_product(grad, w, args);
    const Tensor owned_y = contiguous_aligned(y);
    args.y = owned_y.const_data_ptr();
    args.dh = dh.mutable_data_ptr();
    scope.run(SPARSE24_KERNELS(linear_relu2_gradient), args);
  }
  return dh;
}

SPARSE24_OP(linear_relu2_gradient, "linear_relu2_gradient(Tensor grad, Tensor w, Tensor y, bool roots=False) -> Tensor")

}  // namespace sparse24::torch_ops
