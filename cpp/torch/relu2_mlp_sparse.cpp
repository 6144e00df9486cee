/// @file
/// sparse24.relu2_mlp_sparse: a whole 2:4 network for inference in one call, which is what the host pays for.
#include <algorithm>

#include "network.h"
#include "sparse24/activation.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.relu2_mlp_sparse";

RowMultiples multiples_of(DType stored) {
  return {stored == DType::kFloat8E4M3 ? 16 : 1, feature_alignment(stored, Dim::kFeatures)};
}

/// Computes `result` [tokens, out] of sizes above zero.
void run(const DeviceScope& scope, const Tensor& x, const Network& net, const NetworkSizes& s,
         ActivationArgs activation, Tensor& result) {
  const DType stored = s.fp8 ? DType::kFloat8E4M3 : s.dtype;
  const bool by_row = s.fp8 && !net.scale_y && !net.scale_y_factor;
  // Kernels always get columns to multiply, if only zeros.
  const int64_t padded = round_up(std::max<int64_t>(s.in, 1), 16 / size_of(stored));
  Kept kept;
  const Tensor input = padded_rows(x, s, padded), first_weight = pad_columns(net.w1, padded);

  LinearCompressArgs first{};
  LinearArgs& linear = first.linear;
  linear.tokens = s.tokens;
  linear.in = first_weight.size(1);
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
  const NetworkSizes s = check_network(kOp, x, net, multiples_of);
  const ActivationArgs activation = ActivationArgs(Activation::kRelu2).above(kOp, threshold);
  const DeviceScope scope(kOp, x);
  return network_result(x, net, s, [&](Tensor& result) { run(scope, x, net, s, activation, result); });
}

SPARSE24_OP(relu2_mlp_sparse,
            "relu2_mlp_sparse(Tensor x, Tensor w1, Tensor w2, Tensor? b1=None, Tensor? b2=None, Tensor? w1_scale=None, "
            "Tensor? w2_scale=None, Tensor? scale_y=None, Tensor? scale_y_factor=None, float threshold=0.0) -> Tensor")

}  // namespace sparse24::torch_ops
