/// @file
/// sparse24.relu2_mlp_sparse: a whole 2:4 network for inference in one call, which is what the host pays for.
#include <algorithm>

#include "network.h"
#include "sparse24/activation.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.relu2_mlp_sparse";

/// The tensors beside x; scales are float8's.
struct Network {
  const Tensor &w1, &w2;
  const std::optional<Tensor>&b1, &b2, &w1_scale, &w2_scale, &scale_y, &scale_y_factor;
};

struct Sizes {
  int64_t tokens, in, features, out;
  DType dtype;  ///< of x
  bool fp8;
};

void check_weight(const char* argument, const Tensor& w, const Tensor& x, ScalarType dtype, const char* of) {
  check_device(kOp, argument, w, "x", x);
  check_sizes(kOp, argument, w, 2);
  expect(w.scalar_type() == dtype, kOp, argument, " to be ", dtype_text(dtype), of, ", got ",
         dtype_text(w.scalar_type()));
}

void check_bias(const char* argument, const std::optional<Tensor>& bias, const Tensor& x, DType dtype, bool or_float,
                int64_t elements, const char* meaning) {
  if (!bias) return;
  check_device(kOp, argument, *bias, "x", x);
  const ScalarType actual = bias->scalar_type();
  or_float = or_float && dtype != DType::kFloat32;
  expect(actual == to_torch(dtype) || (or_float && actual == ScalarType::Float), kOp, argument, " to be ",
         name_of(dtype), or_float ? " or float32" : "", ", got ", dtype_text(actual));
  check_sizes(kOp, argument, *bias, 1);
  expect(bias->size(0) == elements, kOp, argument, " to have ", elements, " elements (", meaning, "), got ",
         bias->size(0));
}

/// A scale is there for float8 weights (`needed` or not), and for nothing else.
void check_scale_of(const char* argument, const std::optional<Tensor>& scale, bool fp8, bool needed, const Tensor& x,
                    int64_t elements, const char* meaning) {
  if (!scale) {
    expect(!needed, kOp, argument, " to be a tensor (w1 is float8_e4m3fn), got None");
    return;
  }
  expect(fp8, kOp, argument, " to be None (w1 is not float8_e4m3fn), got a tensor");
  check_device(kOp, argument, *scale, "x", x);
  check_scale(kOp, argument, *scale, elements, true, meaning);
}

Sizes check(const Tensor& x, const Network& net) {
  check_defined(kOp, "x", x);
  expect(x.dim() >= 1, kOp, "x to have at least 1 dimension, got 0 with shape ()");
  Sizes s{1, x.size(x.dim() - 1), 0, 0, {}, false};
  s.dtype = check_dtype(kOp, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  for (int64_t i = 0; i + 1 < x.dim(); ++i) s.tokens *= x.size(i);
  expect(s.tokens <= INT32_MAX && s.in <= INT32_MAX, kOp, "x to have sizes below 2^31, got ", Shape{x});
  check_defined(kOp, "w1", net.w1);
  s.fp8 = net.w1.scalar_type() == ScalarType::Float8_e4m3fn;
  if (!s.fp8) check_weight("w1", net.w1, x, to_torch(s.dtype), " (the dtype of x) or float8_e4m3fn");
  check_weight("w1", net.w1, x, net.w1.scalar_type(), "");
  expect(net.w1.size(1) == s.in, kOp, "w1 to have ", s.in, " columns (columns of x), got ", net.w1.size(1));
  expect(!s.fp8 || s.in % 16 == 0, kOp, "x to have a multiple of 16 columns (float8_e4m3fn weights), got ", s.in);
  s.features = net.w1.size(0);
  const DType stored = s.fp8 ? DType::kFloat8E4M3 : s.dtype;
  const int64_t multiple = feature_alignment(stored, Dim::kFeatures);
  expect(s.features % multiple == 0, kOp, "w1 to have a multiple of ", multiple, " rows (", name_of(stored), "), got ",
         s.features);
  check_weight("w2", net.w2, x, net.w1.scalar_type(), " (the dtype of w1)");
  expect(net.w2.size(1) == s.features, kOp, "w2 to have ", s.features, " columns (rows of w1), got ", net.w2.size(1));
  s.out = net.w2.size(0);
  check_bias("b1", net.b1, x, s.fp8 ? DType::kBFloat16 : s.dtype, false, s.features, "rows of w1");
  check_bias("b2", net.b2, x, s.dtype, true, s.out, "rows of w2");
  check_scale_of("w1_scale", net.w1_scale, s.fp8, s.fp8, x, s.features, "rows of w1");
  check_scale_of("w2_scale", net.w2_scale, s.fp8, s.fp8, x, s.out, "rows of w2");
  check_scale_of("scale_y", net.scale_y, s.fp8, false, x, s.tokens, "tokens of x");
  check_scale_of("scale_y_factor", net.scale_y_factor, s.fp8, false, x, 1, "one factor");
  expect(!net.scale_y || !net.scale_y_factor, kOp, "scale_y_factor to be None beside scale_y, got a tensor");
  return s;
}

bool is_per_row(const std::optional<Tensor>& scale, int64_t rows) {
  return scale && rows != 1 && scale->numel() == rows;
}

Tensor as_rows(const Tensor& x, const Sizes& s) {
  if (x.dim() == 2) return x;
  const int64_t sizes[] = {s.tokens, s.in};
  return torch::stable::view(as_contiguous(x), sizes);
}

/// Computes `result` [tokens, out] of sizes above zero.
void run(const DeviceScope& scope, const Tensor& x, const Network& net, const Sizes& s, ActivationArgs activation,
         Tensor& result) {
  const DType stored = s.fp8 ? DType::kFloat8E4M3 : s.dtype;
  const bool by_row = s.fp8 && !net.scale_y && !net.scale_y_factor;
  // Kernels always get columns to multiply, if only zeros.
  const int64_t padded = round_up(std::max<int64_t>(s.in, 1), 16 / size_of(stored));
  Kept kept;
  const Tensor input = pad_columns(as_rows(x, s), padded), first_weight = pad_columns(net.w1, padded);

  LinearCompressArgs first{};
  LinearArgs& linear = first.linear;
  linear.tokens = s.tokens;
  linear.in = input.size(1);
  linear.out = s.features;
  linear.dtype = stored;
  linear.hidden_dtype = s.fp8 ? DType::kBFloat16 : s.dtype;
  linear.y_dtype = by_row ? linear.hidden_dtype : stored;
  linear.activation = activation;
  first.meta_dtype = stored;
  MmArgs second{};
  second.a = Operand::of(s.tokens, s.features, stored, Dim::kFeatures);
  second.n = s.out;
  second.b_major = Major::kColumn;
  second.ldb = s.features;
  second.d_dtype = s.dtype;
  second.d_major = Major::kRow;

  linear.x = input.const_data_ptr();
  linear.w = first_weight.const_data_ptr();
  linear.bias = kept.data(net.b1);
  linear.scale_w = kept.scale(net.w1_scale);
  linear.scale_w_per_row = is_per_row(net.w1_scale, s.features);
  second.b = kept.data(net.w2);
  second.scale_b = kept.scale(net.w2_scale);
  second.scale_b_per_column = is_per_row(net.w2_scale, s.out);
  second.d = result.mutable_data_ptr();
  second.bias = kept.data(net.b2);
  if (net.b2) second.bias_dtype = net.b2->scalar_type() == ScalarType::Float ? DType::kFloat32 : s.dtype;
  const bool scale_per_row = s.fp8 && (net.scale_y ? is_per_row(net.scale_y, s.tokens) : s.tokens != 1);
  second.scale_a_per_row = scale_per_row;

  Between between;
  const int64_t kept_entries = second.a.values_rows() * second.a.values_cols();
  const int64_t values = between.add(kept_entries * size_of(stored)), meta = between.add(second.a.meta_bytes());
  int64_t quantised = 0, x_scale = 0, y_scale = 0, wide = 0;
  if (s.fp8) {
    quantised = between.add(s.tokens * linear.in);
    x_scale = between.add(4 * s.tokens);
    y_scale = between.add(4 * s.tokens);
    if (by_row) wide = between.add(kept_entries * size_of(linear.y_dtype));
  }
  const MmPlan plan = x.is_cuda() ? cuda::plan_mm(second) : MmPlan{};
  const int64_t workspace = between.add(plan.workspace_bytes);
  between.allocate(x);
  second.values = between.at(values);
  second.meta = first.meta = between.at<uint8_t>(meta);
  first.values = between.at(by_row ? wide : values);
  if (plan.workspace_bytes > 0) second.workspace = between.at<float>(workspace);
  if (s.fp8) {
    QuantizeArgs quantize{input.const_data_ptr(), s.dtype, s.tokens, linear.in, between.at(quantised)};
    linear.x = quantize.q;
    linear.scale_x = quantize.computed_scale = between.at<float>(x_scale);
    linear.scale_x_per_row = s.tokens != 1;
    second.scale_a = between.at<float>(y_scale);
    if (net.scale_y_factor) {
      quantize.factor = kept.scale(net.scale_y_factor);
      quantize.predicted = between.at<float>(y_scale);
    }
    scope.run(SPARSE24_KERNELS(quantize_fp8), quantize);
    if (net.scale_y) {
      scope.run(SPARSE24_KERNELS(usable_scales),
                UsableScalesArgs{kept.scale(net.scale_y), net.scale_y->numel(), between.at<float>(y_scale)});
    }
    if (!by_row) {
      linear.scale_y = second.scale_a;
      linear.scale_y_per_row = scale_per_row;
    }
  }
  scope.run(SPARSE24_KERNELS(linear_compress), first);
  if (by_row) {
    QuantizeArgs quantize{first.values, linear.y_dtype, second.a.values_rows(), second.a.values_cols(),
                          between.at(values)};
    quantize.computed_scale = between.at<float>(y_scale);
    scope.run(SPARSE24_KERNELS(quantize_fp8), quantize);
  }
  const auto by_plan = [&](const MmArgs& a, cudaStream_t stream) { cuda::mm(a, plan, stream); };
  scope.run(cpu::mm, by_plan, second);
}

}  // namespace

Tensor relu2_mlp_sparse(const Tensor& x, const Tensor& w1, const Tensor& w2, const std::optional<Tensor>& b1,
                        const std::optional<Tensor>& b2, const std::optional<Tensor>& w1_scale,
                        const std::optional<Tensor>& w2_scale, const std::optional<Tensor>& scale_y,
                        const std::optional<Tensor>& scale_y_factor, double threshold) {
  const Network net{w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor};
  const Sizes s = check(x, net);
  const ActivationArgs activation = ActivationArgs(Activation::kRelu2).above(kOp, threshold);
  const DeviceScope scope(kOp, x);

  Tensor result = new_rows(x, s.out);
  if (s.tokens > 0 && s.out > 0 && s.features > 0) {
    run(scope, x, net, s, activation, result);
  } else if (s.features == 0) {
    torch::stable::zero_(result);
    if (b2) torch::stable::copy_(result, *b2);
  }
  return result;
}

SPARSE24_OP(relu2_mlp_sparse,
            "relu2_mlp_sparse(Tensor x, Tensor w1, Tensor w2, Tensor? b1=None, Tensor? b2=None, Tensor? w1_scale=None, "
            "Tensor? w2_scale=None, Tensor? scale_y=None, Tensor? scale_y_factor=None, float threshold=0.0) -> Tensor")

}  // namespace sparse24::torch_ops
