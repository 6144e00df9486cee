/// @file
/// sparse24.linear_gradient and linear_gradient_packed: every size against the others, a copy where rows are not
/// aligned, and of the last rows where tokens are odd.
#include "gradient.h"

namespace sparse24::torch_ops {
namespace {

using Gradient = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The arguments of both ops. `w_meta`: w is the values of a packed weight.
struct Inputs {
  const Tensor& grad;
  const Tensor& w;
  const Tensor* w_meta;
  const Tensor& values;
  const Tensor& meta;
  bool interleaved, tokens, fp8_meta;
  const std::optional<Tensor>& hot;
  bool roots;
};

/// Checks the sizes and dtypes of grad and of a packed w [F, D/2].
LinearGradientArgs check_packed_product(OpName op, const Inputs& in) {
  LinearGradientArgs args{};
  check_sizes(op, "grad", in.grad, 2);
  args.dtype = args.hidden_dtype =
      check_dtype(op, "grad", in.grad, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  args.tokens = in.grad.size(0);
  args.in = in.grad.size(1);
  check_beside(op, "w", in.w, in.grad, args.dtype);
  args.features = in.w.size(0);
  const int64_t multiple = feature_alignment(args.dtype, Dim::kFeatures);
  expect(args.in % multiple == 0, op, "grad to have a multiple of ", multiple, " columns (", name_of(args.dtype),
         "), got ", args.in);
  expect(2 * in.w.size(1) == args.in, op, "w to have ", args.in / 2, " columns (half of those of grad), got ",
         in.w.size(1));
  check_device(op, "w_meta", *in.w_meta, "grad", in.grad);
  check_meta(op, *in.w_meta, Operand::of(args.features, args.in, args.dtype, Dim::kFeatures), "w_meta");
  return args;
}

/// Checks the sizes and dtypes of everything.
LinearGradientArgs check_operands(OpName op, const Inputs& in) {
  auto args = in.w_meta ? check_packed_product(op, in) : check_product<LinearGradientArgs>(op, in.grad, in.w);
  const char *of_w = in.w_meta ? "rows" : "columns", *half = in.w_meta ? "half the rows of w" : "half the columns of w";
  const DType dtype = args.dtype;
  args.meta_dtype = in.fp8_meta ? DType::kFloat8E4M3 : dtype;
  const int64_t multiple = feature_alignment(args.meta_dtype, Dim::kFeatures);
  expect(args.features % multiple == 0, op, "w to have a multiple of ", multiple, " ", of_w, " (",
         in.fp8_meta ? "fp8_meta=True" : name_of(dtype), in.fp8_meta ? "" : " values", "), got ", args.features);
  check_beside(op, "values", in.values, in.grad, dtype);
  expect(in.values.size(0) == args.tokens, op, "values to have ", args.tokens, " rows (rows of grad), got ",
         in.values.size(0));
  expect(in.values.size(1) == args.features / 2, op, "values to have ", args.features / 2, " columns (", half,
         "), got ", in.values.size(1));
  check_device(op, "meta", in.meta, "grad", in.grad);
  check_meta(op, in.meta, Operand::of(args.tokens, args.features, args.meta_dtype, Dim::kFeatures));
  args.roots = check_roots(op, args.dtype, in.roots);
  if (in.hot) {
    expect(in.tokens, op, "tokens to be True where hot is given, got False");
    args.hot_count = check_hot(op, *in.hot, in.grad, args.features, in.w_meta ? "rows of w" : "columns of w");
  }
  args.interleaved = in.interleaved;
  return args;
}

/// Multiplies grad with the dense weight, in the kernel that does all of it.
void run_dense(const DeviceScope& scope, const Inputs& in, LinearGradientArgs& args) {
  const ProductOwners owners = prepare_product(in.grad, in.w, args);
  Tensor tail;
  if (in.grad.is_cuda() && args.tokens % kGradTokenMultiple != 0) {
    tail = new_grad_tail(owners.grad, args);
    args.grad_tail = tail.const_data_ptr();
  }
  scope.run(SPARSE24_KERNELS(linear_gradient), args);
}

/// Multiplies it with the packed one; dy goes through memory where no kernel does all of it.
void run_packed(const DeviceScope& scope, const Inputs& in, LinearGradientArgs& args) {
  const bool through_memory = in.grad.is_cuda() && !linear_gradient_packed_is_fused(args);
  Tensor dy = new_empty(in.grad, {through_memory ? args.tokens : 0, args.features}, in.grad.scalar_type());
  const PackedProductOwners owners = prepare_packed_product(in.grad, in.w, *in.w_meta, args.dtype, args);
  scope.run(SPARSE24_KERNELS(linear_gradient_packed),
            LinearGradientPackedArgs{args, owners.w_meta.const_data_ptr<uint8_t>(), dy.mutable_data_ptr()});
}

Gradient gradient(OpName op, const Inputs& in) {
  LinearGradientArgs args = check_operands(op, in);
  const Tensor& grad = in.grad;
  const bool tokens = in.tokens;
  const DeviceScope scope(op, grad);

  const Operand along_tokens = Operand::of(args.tokens, args.features, args.dtype, Dim::kTokens);
  const auto new_values = [&] {
    return tokens ? new_empty(grad, {along_tokens.values_rows(), along_tokens.values_cols()}, grad.scalar_type())
                  : new_empty(grad, {0}, grad.scalar_type());
  };
  const auto new_meta = [&] { return new_empty(grad, {tokens ? along_tokens.meta_bytes() : 0}, ScalarType::Byte); };
  const Tensor dh = new_empty(grad, {args.tokens, args.features / 2}, grad.scalar_type());
  const Tensor dh_tokens = new_values(), dh_meta = new_meta(), y_tokens = new_values(), y_meta = new_meta();
  const Tensor counts = new_zeros(grad, {tokens && !in.hot ? args.features : 0}, ScalarType::Int);
  const auto new_rows = [&] { return new_empty(grad, {args.hot_count, args.tokens}, grad.scalar_type()); };
  const Tensor y_hot = new_rows(), dh_hot = new_rows();
  if (args.tokens > 0 && args.features > 0) {
    const Tensor owned_values = contiguous_aligned(in.values), owned_meta = contiguous_aligned(in.meta);
    args.y = owned_values.const_data_ptr();
    args.meta = owned_meta.const_data_ptr<uint8_t>();
    args.dh = dh.mutable_data_ptr();
    if (tokens) {
      args.dh_tokens = {dh_tokens.mutable_data_ptr(), dh_meta.mutable_data_ptr<uint8_t>()};
      args.y_tokens = {y_tokens.mutable_data_ptr(), y_meta.mutable_data_ptr<uint8_t>()};
      if (!in.hot) args.counts = counts.mutable_data_ptr<int32_t>();
    }
    const HotOwners hot_owners = prepare_hot(in.hot, y_hot, dh_hot, args);
    in.w_meta ? run_packed(scope, in, args) : run_dense(scope, in, args);
  }
  return {dh, dh_tokens, dh_meta, y_tokens, y_meta, counts, y_hot, dh_hot};
}

}  // namespace

Gradient linear_gradient(const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta,
                         bool interleaved, bool tokens, bool fp8_meta, const std::optional<Tensor>& hot, bool roots) {
  return gradient("sparse24.linear_gradient",
                  {grad, w, nullptr, values, meta, interleaved, tokens, fp8_meta, hot, roots});
}

Gradient linear_gradient_packed(const Tensor& grad, const Tensor& w, const Tensor& w_meta, const Tensor& values,
                                const Tensor& meta, bool interleaved, bool tokens, bool fp8_meta,
                                const std::optional<Tensor>& hot, bool roots) {
  return gradient("sparse24.linear_gradient_packed",
                  {grad, w, &w_meta, values, meta, interleaved, tokens, fp8_meta, hot, roots});
}

SPARSE24_OP(
    linear_gradient,
    "linear_gradient(Tensor grad, Tensor w, Tensor values, Tensor meta, bool interleaved=False, bool tokens=True, "
    "bool fp8_meta=False, Tensor? hot=None, bool roots=False) -> (Tensor dh_values, Tensor dh_tokens, "
    "Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, Tensor counts, Tensor y_hot, Tensor dh_hot)")

SPARSE24_OP(linear_gradient_packed,
            "linear_gradient_packed(Tensor grad, Tensor w, Tensor w_meta, Tensor values, Tensor meta, "
            "bool interleaved=False, bool tokens=True, bool fp8_meta=False, Tensor? hot=None, bool roots=False) -> "
            "(Tensor dh_values, Tensor dh_tokens, Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, "
            "Tensor counts, Tensor y_hot, Tensor dh_hot)")

}  // namespace sparse24::torch_ops
