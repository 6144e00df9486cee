/// @file
/// sparse24.linear_gradient_fp8: every size against the others, and a copy of the last rows where tokens are odd.
#include "gradient.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.linear_gradient_fp8";
constexpr DType kFp8 = DType::kFloat8E4M3;

void check_fp8(const char* argument, const Tensor& t, const Tensor& grad) {
  check_device(kOp, argument, t, "grad", grad);
  check_sizes(kOp, argument, t, 2);
  expect(t.scalar_type() == to_torch(kFp8), kOp, argument, " to be ", name_of(kFp8), ", got ",
         dtype_text(t.scalar_type()));
}

/// Checks the sizes and dtypes of everything but the scales.
LinearGradientFp8Args check_operands(const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta) {
  LinearGradientFp8Args args{};
  check_sizes(kOp, "grad", grad, 2);
  check_dtype(kOp, "grad", grad, {kFp8});
  args.tokens = grad.size(0);
  args.in = args.ld_grad = grad.size(1);
  constexpr int64_t kMultiple = 16;  // as every fp8 GEMM wants its rows aligned
  expect(args.in % kMultiple == 0, kOp, "grad to have a multiple of ", kMultiple, " columns, got ", args.in);
  check_fp8("w", w, grad);
  expect(w.size(1) == args.in, kOp, "w to have ", args.in, " columns (columns of grad), got ", w.size(1));
  args.features = w.size(0);
  const int64_t multiple = feature_alignment(kFp8, Dim::kFeatures);
  expect(args.features % multiple == 0, kOp, "w to have a multiple of ", multiple, " rows, got ", args.features);
  check_fp8("values", values, grad);
  expect(values.size(0) == args.tokens, kOp, "values to have ", args.tokens, " rows (rows of grad), got ",
         values.size(0));
  expect(values.size(1) == args.features / 2, kOp, "values to have ", args.features / 2,
         " columns (half the rows of w), got ", values.size(1));
  check_device(kOp, "meta", meta, "grad", grad);
  check_meta(kOp, meta, Operand::of(args.tokens, args.features, kFp8, Dim::kFeatures));
  return args;
}

Tensor check_one_scale(const char* argument, const Tensor& scale, const Tensor& grad) {
  check_device(kOp, argument, scale, "grad", grad);
  check_scale(kOp, argument, scale, 1, true, "one scale");
  return as_contiguous(scale);
}

/// Owns the memory of grad and w that the arguments point to. The kernel always has something to multiply.
ProductOwners prepare(const Tensor& grad, const Tensor& w, LinearGradientFp8Args& args) {
  ProductOwners owners{contiguous_aligned(grad), contiguous_aligned(w)};
  if (grad.is_cuda() && args.in == 0) {
    args.in = args.ld_grad = 16;
    owners.grad = new_zeros(grad, {args.tokens, args.in}, grad.scalar_type());
    owners.w = new_zeros(w, {args.features, args.in}, w.scalar_type());
  }
  args.grad = owners.grad.const_data_ptr();
  args.w = owners.w.const_data_ptr();
  return owners;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_gradient_fp8(
    const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta, const Tensor& scale_grad,
    const Tensor& scale_w, const Tensor& scale_y, const Tensor& scale_dh, bool interleaved,
    const std::optional<Tensor>& hot) {
  LinearGradientFp8Args args = check_operands(grad, w, values, meta);
  const Tensor scales[] = {check_one_scale("scale_grad", scale_grad, grad), check_one_scale("scale_w", scale_w, grad),
                           check_one_scale("scale_y", scale_y, grad), check_one_scale("scale_dh", scale_dh, grad)};
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
    const ProductOwners owners = prepare(grad, w, args);
    Tensor tail;
    if (grad.is_cuda() && args.tokens % kGradTokenMultiple != 0) {
      tail = new_grad_tail(owners.grad, args);
      args.grad_tail = tail.const_data_ptr();
    }
    const Tensor owned_values = contiguous_aligned(values), owned_meta = contiguous_aligned(meta);
    args.scale_grad = scales[0].const_data_ptr<float>();
    args.scale_w = scales[1].const_data_ptr<float>();
    args.scale_y = scales[2].const_data_ptr<float>();
    args.scale_dh = scales[3].const_data_ptr<float>();
    args.y = owned_values.const_data_ptr();
    args.meta = owned_meta.const_data_ptr<uint8_t>();
    args.dh = dh.mutable_data_ptr();
    args.dh_tokens = {dh_tokens.mutable_data_ptr(), dh_meta.mutable_data_ptr<uint8_t>()};
    args.y_tokens = {y_tokens.mutable_data_ptr(), y_meta.mutable_data_ptr<uint8_t>()};
    args.amax = amax.mutable_data_ptr<float>();
    args.saturated = saturated.mutable_data_ptr<int32_t>();
    Tensor owned_hot, slots;
    if (args.hot_count > 0) {
      owned_hot = as_contiguous(*hot);
      args.hot = owned_hot.const_data_ptr<int64_t>();
      args.y_hot = y_hot.mutable_data_ptr();
      args.dh_hot = dh_hot.mutable_data_ptr();
      slots = new_empty(grad, {grad.is_cuda() ? args.features : 0}, ScalarType::Int);
      args.hot_slots = slots.mutable_data_ptr<int32_t>();
    }
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
