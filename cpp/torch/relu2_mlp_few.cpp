/// @file
/// sparse24.relu2_mlp_few: a whole network for few tokens in one call.
#include "few_tokens.h"
#include "sparse24/activation.h"

namespace sparse24::torch_ops {
namespace {

/// w1 where a row is no multiple of 16 bytes, and x: with zeros behind the last column.
Tensor padded_columns(const Tensor& t, int64_t columns) {
  Tensor buffer = new_zeros(t, {t.size(0), columns}, t.scalar_type());
  Tensor target = torch::stable::narrow(buffer, 1, 0, t.size(1));
  torch::stable::copy_(target, t);
  return buffer;
}

/// Each call of torch costs the host a microsecond, a view too: only `padded_columns` needs one.
Tensor as_rows(const Tensor& contiguous, int64_t tokens, int64_t columns) {
  if (contiguous.dim() == 2) return contiguous;
  const int64_t sizes[] = {tokens, columns};
  return torch::stable::view(contiguous, sizes);
}

}  // namespace

Tensor relu2_mlp_few(const Tensor& x, const Tensor& w1, const Tensor& w2_rows, const std::optional<Tensor>& b1,
                     const std::optional<Tensor>& b2, const std::optional<Tensor>& w1_scale,
                     const std::optional<Tensor>& w2_scale, double threshold) {
  constexpr OpName op = "sparse24.relu2_mlp_few";
  Relu2MlpFewArgs args{};
  LinearFewArgs& first = args.first;
  MmActiveArgs& second = args.second;
  check_defined(op, "x", x);
  expect(x.dim() >= 1, op, "x to have at least 1 dimension, got 0 with shape ()");
  const DType dtype = check_dtype(op, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  const int64_t in = x.size(x.dim() - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  check_few_tokens(op, "x", x, tokens);
  check_few_weight(op, "w1", w1, "x", x, dtype);
  expect(w1.size(1) == in, op, "w1 to have ", in, " columns (columns of x), got ", w1.size(1));
  const int64_t features = w1.size(0);
  check_few_weight(op, "w2_rows", w2_rows, "x", x, dtype);
  expect(w2_rows.size(0) == features, op, "w2_rows to have ", features, " rows (rows of w1), got ", w2_rows.size(0));
  const int64_t out = w2_rows.size(1);
  if (b1) {
    check_device(op, "b1", *b1, "x", x);
    expect(b1->scalar_type() == to_torch(dtype), op, "b1 to be ", name_of(dtype), " (the dtype of x), got ",
           dtype_text(b1->scalar_type()));
    check_sizes(op, "b1", *b1, 1);
    expect(b1->size(0) == features, op, "b1 to have ", features, " elements (rows of w1), got ", b1->size(0));
  }
  check_few_bias(op, "b2", b2, "x", x, dtype, out, "columns of w2_rows");
  check_few_scale(op, "w1_scale", w1_scale, w1, "x", x, features, "rows of w1");
  check_few_scale(op, "w2_scale", w2_scale, w2_rows, "x", x, out, "columns of w2_rows");
  first.threshold = ActivationArgs(Activation::kRelu2).above(op, threshold).threshold;
  const DeviceScope scope(op, x);

  const Tensor result = new_rows(x, out);
  if (tokens > 0 && out > 0) {
    first.dtype = second.dtype = dtype;
    first.tokens = second.tokens = tokens;
    first.in = in;
    first.out = second.features = features;
    second.out_features = out;
    first.w_dtype = dtype_of_few_weight(w1, dtype);
    second.w_dtype = dtype_of_few_weight(w2_rows, dtype);

    Tensor input = contiguous_aligned(x), weight = as_contiguous(w1);
    const int64_t step = 16 / size_of(first.w_dtype);
    if (x.is_cuda() && in % step != 0) {
      first.in = round_up(in, step);
      input = padded_columns(as_rows(input, tokens, in), first.in);
      weight = padded_columns(weight, first.in);
    }
    weight = contiguous_aligned(weight);
    const Tensor rows = contiguous_aligned(w2_rows);
    // What lies between the two products: on the CPU y.
    const int64_t bytes = x.is_cuda() ? cuda::relu2_mlp_few_workspace(args) : tokens * features * size_of(dtype);
    const Tensor between = new_empty(x, {bytes}, ScalarType::Byte);

    std::optional<Tensor> kept[4];
    const auto keep = [&](const std::optional<Tensor>& t, int i) -> const Tensor* {
      if (!t) return nullptr;
      kept[i] = as_contiguous(*t);
      return &*kept[i];
    };
    first.x = input.const_data_ptr();
    first.w = weight.const_data_ptr();
    first.y = second.workspace = between.mutable_data_ptr();
    if (const Tensor* t = keep(w1_scale, 0)) {
      first.scale_w = t->const_data_ptr<float>();
      first.scale_w_per_row = t->numel() != 1;
    }
    if (const Tensor* t = keep(b1, 1)) first.bias = t->const_data_ptr();
    second.y = first.y;
    second.w = rows.const_data_ptr();
    second.out = result.mutable_data_ptr();
    second.out_dtype = dtype;
    if (const Tensor* t = keep(w2_scale, 2)) {
      second.scale_w = t->const_data_ptr<float>();
      second.scale_w_per_column = t->numel() != 1;
    }
    if (const Tensor* t = keep(b2, 3)) {
      second.bias = t->const_data_ptr();
      second.bias_dtype = t->scalar_type() == ScalarType::Float ? DType::kFloat32 : dtype;
    }
    scope.run(SPARSE24_KERNELS(relu2_mlp_few), args);
  }
  return result;
}

SPARSE24_OP(relu2_mlp_few,
            "relu2_mlp_few(Tensor x, Tensor w1, Tensor w2_rows, Tensor? b1=None, Tensor? b2=None, "
            "Tensor? w1_scale=None, Tensor? w2_scale=None, float threshold=0.0) -> Tensor")

}  // namespace sparse24::torch_ops
