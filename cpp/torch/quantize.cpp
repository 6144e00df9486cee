/// @file
/// sparse24.quantize_fp8 and sparse24.quantize_fp8_predict.
#include "tensor.h"

namespace sparse24::torch_ops {

namespace {

/// Checks x [R, C].
QuantizeArgs check_x(OpName op, const Tensor& x) {
  constexpr int64_t kMultiple = 16;  // of columns: rows of q are 16-byte aligned, as every fp8 GEMM wants them
  QuantizeArgs args{};
  check_sizes(op, "x", x, 2);
  args.x_dtype = check_dtype(op, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  args.rows = x.size(0);
  args.cols = x.size(1);
  expect(args.cols % kMultiple == 0, op, "x to have a multiple of ", kMultiple, " columns, got ", args.cols);
  return args;
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x, const std::optional<Tensor>& scale, const Word& scaling) {
  constexpr OpName op = "sparse24.quantize_fp8";
  const Scaling parsed = parse_scaling(op, scaling);
  QuantizeArgs args = check_x(op, x);
  args.scaling = parsed;
  check_given_scale(op, scale, args.scaling, args.rows, "rows of x", x);
  const DeviceScope scope(op, x);

  const Tensor values = new_empty(x, {args.rows, args.cols}, ScalarType::Float8_e4m3fn);
  const Tensor used_scale = new_scale(scope, x, scale, args.scaling, args.rows);
  if (args.rows > 0 && args.cols > 0) {
    const Tensor source = contiguous_aligned(x);
    args.x = source.const_data_ptr();
    args.q = values.mutable_data_ptr();
    if (scale) {
      args.given_scale = used_scale.const_data_ptr<float>();
    } else {
      args.computed_scale = used_scale.mutable_data_ptr<float>();
    }
    scope.run(SPARSE24_KERNELS(quantize_fp8), args);
  } else if (!scale) {
    torch::stable::fill_(used_scale, 1.0);  // the scale of nothing but zeros
  }
  return {values, used_scale};
}

std::tuple<Tensor, Tensor, Tensor> quantize_fp8_predict(const Tensor& x, const Tensor& factor) {
  constexpr OpName op = "sparse24.quantize_fp8_predict";
  QuantizeArgs args = check_x(op, x);
  check_device(op, "factor", factor, "x", x);
  check_scale(op, "factor", factor, 1, true, "one factor");
  const DeviceScope scope(op, x);

  const Tensor values = new_empty(x, {args.rows, args.cols}, ScalarType::Float8_e4m3fn);
  const Tensor scale = new_scale(scope, x, std::nullopt, Scaling::kRow, args.rows);
  const Tensor predicted = new_scale(scope, x, std::nullopt, Scaling::kRow, args.rows);
  if (args.rows > 0 && args.cols > 0) {
    const Tensor source = contiguous_aligned(x);
    args.x = source.const_data_ptr();
    args.q = values.mutable_data_ptr();
    args.computed_scale = scale.mutable_data_ptr<float>();
    args.factor = factor.const_data_ptr<float>();
    args.predicted = predicted.mutable_data_ptr<float>();
    scope.run(SPARSE24_KERNELS(quantize_fp8), args);
  } else {
    torch::stable::fill_(scale, 1.0);  // the scale of nothing but zeros
    torch::stable::fill_(predicted, 1.0);
  }
  return {values, scale, predicted};
}

SPARSE24_OP(quantize_fp8,
            R"(quantize_fp8(Tensor x, Tensor? scale=None, str scaling="row") -> (Tensor values, Tensor scale))")
SPARSE24_OP(quantize_fp8_predict,
            "quantize_fp8_predict(Tensor x, Tensor factor) -> (Tensor values, Tensor scale, Tensor predicted)")

}  // namespace sparse24::torch_ops
