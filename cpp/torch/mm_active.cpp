/// @file
/// sparse24.mm_active: a mostly zero activation times a weight by neuron, for few tokens.
#include "few_tokens.h"

namespace sparse24::torch_ops {

void check_few_weight(OpName op, const char* argument, const Tensor& w, const char* of, const Tensor& like,
                      DType dtype) {
  check_device(op, argument, w, of, like);
  check_sizes(op, argument, w, 2);
  const ScalarType actual = w.scalar_type();
  expect(actual == to_torch(dtype) || actual == ScalarType::Float8_e4m3fn, op, argument, " to be ", name_of(dtype),
         " (the dtype of ", of, ") or float8_e4m3fn, got ", dtype_text(actual));
}

void check_few_scale(OpName op, const char* argument, const std::optional<Tensor>& scale, const Tensor& w,
                     const char* of, const Tensor& like, int64_t elements, const char* meaning) {
  if (!scale) return;
  expect(w.scalar_type() == ScalarType::Float8_e4m3fn, op, argument, " to be None (", dtype_text(w.scalar_type()),
         " weights have no scale), got a tensor");
  check_device(op, argument, *scale, of, like);
  check_scale(op, argument, *scale, elements, true, meaning);
}

void check_few_tokens(OpName op, const char* argument, const Tensor& t, int64_t tokens) {
  expect(!t.is_cuda() || tokens <= kMaxActiveTokens, op, argument, " to have at most ", kMaxActiveTokens,
         " rows on a CUDA device, got ", tokens);
}

void check_few_bias(OpName op, const char* argument, const std::optional<Tensor>& bias, const char* of,
                    const Tensor& like, DType dtype, int64_t elements, const char* meaning) {
  if (!bias) return;
  check_device(op, argument, *bias, of, like);
  const ScalarType actual = bias->scalar_type();
  const char* other = dtype == DType::kFloat32 ? "" : " or float32";
  expect(actual == to_torch(dtype) || actual == ScalarType::Float, op, argument, " to be ", name_of(dtype), other,
         ", got ", dtype_text(actual));
  check_sizes(op, argument, *bias, 1);
  expect(bias->size(0) == elements, op, argument, " to have ", elements, " elements (", meaning, "), got ",
         bias->size(0));
}

DType dtype_of_few_weight(const Tensor& w, DType dtype) {
  return w.scalar_type() == ScalarType::Float8_e4m3fn ? DType::kFloat8E4M3 : dtype;
}

Tensor mm_active(const Tensor& y, const Tensor& w, const std::optional<Tensor>& scale_w,
                 const std::optional<Tensor>& bias, std::optional<ScalarType> out_dtype) {
  constexpr OpName op = "sparse24.mm_active";
  MmActiveArgs args{};
  check_sizes(op, "y", y, 2);
  args.dtype = check_dtype(op, "y", y, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  args.tokens = y.size(0);
  args.features = y.size(1);
  check_few_tokens(op, "y", y, args.tokens);
  check_few_weight(op, "w", w, "y", y, args.dtype);
  expect(w.size(0) == args.features, op, "w to have ", args.features, " rows (columns of y), got ", w.size(0));
  args.out_features = w.size(1);
  args.w_dtype = dtype_of_few_weight(w, args.dtype);
  check_few_scale(op, "scale_w", scale_w, w, "y", y, args.out_features, "columns of w");
  check_few_bias(op, "bias", bias, "y", y, args.dtype, args.out_features, "columns of w");
  const ScalarType out = out_dtype.value_or(to_torch(args.dtype));
  expect(out == ScalarType::BFloat16 || out == ScalarType::Half || out == ScalarType::Float, op,
         "out_dtype to be bfloat16, float16 or float32, got ", dtype_text(out));
  args.out_dtype = out == ScalarType::BFloat16 ? DType::kBFloat16
                   : out == ScalarType::Half   ? DType::kFloat16
                                               : DType::kFloat32;
  const DeviceScope scope(op, y);

  const Tensor result = new_empty(y, {args.tokens, args.out_features}, out);
  if (args.tokens == 0 || args.out_features == 0) return result;
  const Tensor activation = as_contiguous(y), weight = as_contiguous(w);
  args.y = activation.const_data_ptr();
  args.w = weight.const_data_ptr();
  args.out = result.mutable_data_ptr();
  std::optional<Tensor> scale, added, workspace;
  if (scale_w) {
    scale = as_contiguous(*scale_w);
    args.scale_w = scale->const_data_ptr<float>();
    args.scale_w_per_column = scale->numel() != 1;
  }
  if (bias) {
    added = as_contiguous(*bias);
    args.bias = added->const_data_ptr();
    args.bias_dtype = bias->scalar_type() == ScalarType::Float ? DType::kFloat32 : args.dtype;
  }
  if (y.is_cuda()) {
    workspace = new_empty(y, {cuda::mm_active_workspace(args)}, ScalarType::Byte);
    args.workspace = workspace->mutable_data_ptr();
  }
  scope.run(SPARSE24_KERNELS(mm_active), args);
  return result;
}

SPARSE24_OP(mm_active,
            "mm_active(Tensor y, Tensor w, Tensor? scale_w=None, Tensor? bias=None, *, ScalarType? out_dtype=None) "
            "-> Tensor")

}  // namespace sparse24::torch_ops
