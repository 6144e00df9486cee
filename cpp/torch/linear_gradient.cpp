/// @file
/// sparse24.linear_gradient: every size against the others, a copy where rows are not aligned, and of the last rows
/// where tokens are odd.
#include "gradient.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.linear_gradient";

/// Checks the sizes and dtypes of everything.
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_gradient(
    const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta, bool interleaved, bool tokens,
    bool fp8_meta, const std::optional<Tensor>& hot, bool roots) {
  LinearGradientArgs args = check_operands(grad, w, values, meta, fp8_meta);
  args.roots = check_roots(kOp, args.dtype, roots);
  if (hot) {
    expect(tokens, kOp, "tokens to be True where hot is given, got False");
    args.hot_count = check_hot(kOp, *hot, grad, args.features, "columns of w");
  }
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
  const Tensor counts = new_zeros(grad, {tokens && !hot ? args.features : 0}, ScalarType::Int);
  const auto new_rows = [&] { return new_empty(grad, {args.hot_count, args.tokens}, grad.scalar_type()); };
  const Tensor y_hot = new_rows(), dh_hot = new_rows();
  if (args.tokens > 0 && args.features > 0) {
    const ProductOwners owners = prepare_product(grad, w, args);
    Tensor tail;
    if (grad.is_cuda() && args.tokens % kGradTokenMultiple != 0) {
      tail = new_grad_tail(owners.grad, args);
      args.grad_tail = tail.const_data_ptr();
    }
    const Tensor owned_values = contiguous_aligned(values), owned_meta = contiguous_aligned(meta);
    args.y = owned_values.const_data_ptr();
    args.meta = owned_meta.const_data_ptr<uint8_t>();
    args.dh = dh.mutable_data_ptr();
    if (tokens) {
      args.dh_tokens = {dh_tokens.mutable_data_ptr(), dh_meta.mutable_data_ptr<uint8_t>()};
      args.y_tokens = {y_tokens.mutable_data_ptr(), y_meta.mutable_data_ptr<uint8_t>()};
      if (!hot) args.counts = counts.mutable_data_ptr<int32_t>();
    }
    const HotOwners hot_owners = prepare_hot(hot, y_hot, dh_hot, args);
    scope.run(SPARSE24_KERNELS(linear_gradient), args);
  }
  return {dh, dh_tokens, dh_meta, y_tokens, y_meta, counts, y_hot, dh_hot};
}

SPARSE24_OP(
    linear_gradient,
    "linear_gradient(Tensor grad, Tensor w, Tensor values, Tensor meta, bool interleaved=False, bool tokens=True, "
    "bool fp8_meta=False, Tensor? hot=None, bool roots=False) -> (Tensor dh_values, Tensor dh_tokens, "
    "Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, Tensor counts, Tensor y_hot, Tensor dh_hot)")

}  // namespace sparse24::torch_ops
