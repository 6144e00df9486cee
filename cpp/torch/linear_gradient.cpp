/// @file
/// sparse24.linear_gradient: every size against the others, one copy where rows are not aligned.
#include "tensor.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.linear_gradient";

/// A tensor beside grad: same device and dtype, two dimensions.
void check_beside(const char* argument, const Tensor& t, const Tensor& grad, DType dtype) {
  check_device(kOp, argument, t, "grad", grad);
  check_sizes(kOp, argument, t, 2);
  expect(t.scalar_type() == grad.scalar_type(), kOp, argument, " to be ", name_of(dtype), " (the dtype of grad), got ",
         dtype_text(t.scalar_type()));
}

/// Sizes and dtypes of everything, checked.
LinearGradientArgs check_operands(const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta,
                                  bool fp8_meta) {
  LinearGradientArgs args{};
  check_sizes(kOp, "grad", grad, 2);
  const DType dtype = check_dtype(kOp, "grad", grad, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  args.dtype = args.hidden_dtype = dtype;
  args.tokens = grad.size(0);
  args.in = grad.size(1);
  check_beside("w", w, grad, dtype);
  expect(w.size(0) == args.in, kOp, "w to have ", args.in, " rows (columns of grad), got ", w.size(0));
  args.features = w.size(1);
  args.meta_dtype = fp8_meta ? DType::kFloat8E4M3 : dtype;
  const int64_t multiple = feature_alignment(args.meta_dtype, Dim::kFeatures);
  expect(args.features % multiple == 0, kOp, "w to have a multiple of ", multiple, " columns (",
         fp8_meta ? "fp8_meta=True" : name_of(dtype), fp8_meta ? "" : " values", "), got ", args.features);
  check_beside("values", values, grad, dtype);
  expect(values.size(0) == args.tokens, kOp, "values to have ", args.tokens, " rows (rows of grad), got ",
         values.size(0));
  expect(values.size(1) == args.features / 2, kOp, "values to have ", args.features / 2,
         " columns (half the columns of w), got ", values.size(1));
  check_device(kOp, "meta", meta, "grad", grad);
  check_meta(kOp, meta, Operand::of(args.tokens, args.features, args.meta_dtype, Dim::kFeatures));
  return args;
}

/// What owns the memory that `LinearGradientArgs` points to.
struct Owners {
  Tensor grad, w, values, meta;
};

/// Copies what the kernels cannot read, and points `args` to it. They always have something to multiply, if only zeros.
Owners prepare(const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta,
               LinearGradientArgs& args) {
  Owners owners{grad, w, contiguous_aligned(values), contiguous_aligned(meta)};
  const int64_t step = 16 / size_of(args.dtype), in = args.in;
  args.ld_grad = in;
  if (grad.is_cuda() && in == 0) {
    args.in = args.ld_grad = step;
    owners.grad = torch::stable::new_zeros(grad, {args.tokens, step});
    owners.w = torch::stable::new_zeros(w, {step, args.features});
  } else if (grad.is_cuda() && in % step != 0) {
    args.ld_grad = round_up(in, step);
    owners.grad = new_empty(grad, {args.tokens, args.ld_grad}, grad.scalar_type());
    Tensor target = torch::stable::narrow(owners.grad, 1, 0, in);
    torch::stable::copy_(target, grad);
    owners.w = contiguous_aligned(w);
  } else {
    owners.grad = contiguous_aligned(grad);
    owners.w = contiguous_aligned(w);
  }
  args.grad = owners.grad.const_data_ptr();
  args.w = owners.w.const_data_ptr();
  args.y = owners.values.const_data_ptr();
  args.meta = owners.meta.const_data_ptr<uint8_t>();
  return owners;
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
    const Owners owners = prepare(grad, w, values, meta, args);
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
