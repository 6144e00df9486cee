/// @file
/// sparse24.relu2_mlp_dense: a whole dense network of a few dozen tokens in one call.
#include <algorithm>

#include "network.h"
#include "sparse24/activation.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.relu2_mlp_dense";

/// Rows of 16 bytes, as the tensor memory accelerator reads them.
RowMultiples multiples_of(DType stored) {
  const int64_t multiple = 16 / size_of(stored);
  return {multiple, multiple};
}

/// Computes `result` [tokens, out] of sizes above zero.
void run(const DeviceScope& scope, const Tensor& x, const Network& net, const NetworkSizes& s,
         ActivationArgs activation, Tensor& result) {
  const DType stored = s.stored();
  const bool computed = s.fp8 && !net.scale_y && !net.scale_y_factor;  // from the activation itself
  // Kernels always get columns to multiply, if only zeros.
  const int64_t padded = std::max(s.in, multiples_of(stored).columns);
  const Tensor input = padded_rows(x, s, padded), first_weight = pad_columns(net.w1, padded);
  Kept kept;
  Relu2MlpDenseArgs args{};

  LinearArgs& linear = args.first.linear;
  linear.tokens = s.tokens;
  linear.in = first_weight.size(1);
  linear.out = s.features;
  linear.x = input.const_data_ptr();
  linear.w = first_weight.const_data_ptr();
  linear.dtype = stored;
  linear.hidden_dtype = s.fp8 ? DType::kBFloat16 : s.dtype;
  linear.y_dtype = computed ? linear.hidden_dtype : stored;
  linear.scale_w = kept.scale(net.w1_scale);
  linear.scale_w_per_row = is_per_row(net.w1_scale, s.features);
  linear.bias = kept.data(net.b1);
  linear.activation = activation;

  LinearOutArgs& second = args.second;
  second.tokens = s.tokens;
  second.in = s.features;
  second.out = s.out;
  second.w = kept.data(net.w2);
  second.dtype = stored;
  second.scale_w = kept.scale(net.w2_scale);
  second.scale_w_per_row = is_per_row(net.w2_scale, s.out);
  second.bias = kept.data(net.b2);
  if (net.b2) second.bias_dtype = net.b2->scalar_type() == ScalarType::Float ? DType::kFloat32 : s.dtype;
  second.d = result.mutable_data_ptr();
  second.d_dtype = s.dtype;

  Between between;
  const int64_t y = between.add(s.tokens * s.features * size_of(linear.y_dtype));
  int64_t codes_x = 0, codes_y = 0, scale_x = 0, scale_y = 0;
  if (s.fp8) {
    codes_x = between.add(s.tokens * linear.in);
    scale_x = between.add(4 * s.tokens);
    scale_y = between.add(4 * s.tokens);
    if (computed) codes_y = between.add(s.tokens * s.features);
  }
  between.allocate(x);
  args.first.y = between.at(y);
  second.y = between.at(computed ? codes_y : y);
  if (s.fp8) {
    args.of_x = {linear.x, s.dtype, s.tokens, linear.in, between.at(codes_x)};
    linear.x = args.of_x.q;
    linear.scale_x = args.of_x.computed_scale = between.at<float>(scale_x);
    linear.scale_x_per_row = s.tokens != 1;
    second.scale_y = net.scale_y ? kept.scale(net.scale_y) : between.at<float>(scale_y);
    second.scale_y_per_row = net.scale_y ? is_per_row(net.scale_y, s.tokens) : s.tokens != 1;
    if (computed) {
      args.of_y = {args.first.y, linear.y_dtype, s.tokens, s.features, between.at(codes_y)};
      args.of_y.computed_scale = between.at<float>(scale_y);
    } else {
      linear.scale_y = second.scale_y;
      linear.scale_y_per_row = second.scale_y_per_row;
    }
    if (net.scale_y_factor) {
      args.of_x.factor = kept.scale(net.scale_y_factor);
      args.of_x.predicted = between.at<float>(scale_y);
    }
  }
  scope.run(SPARSE24_KERNELS(relu2_mlp_dense), args);
}

}  // namespace

Tensor relu2_mlp_dense(const Tensor& x, const Tensor& w1, const Tensor& w2, const std::optional<Tensor>& b1,
                       const std::optional<Tensor>& b2, const std::optional<Tensor>& w1_scale,
                       const std::optional<Tensor>& w2_scale, const std::optional<Tensor>& scale_y,
                       const std::optional<Tensor>& scale_y_factor, double threshold) {
  const Network net{w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor};
  const NetworkSizes s = check_network(kOp, x, net, multiples_of);
  expect(!x.is_cuda() || s.tokens <= kMaxDenseTokens, kOp, "x to have at most ", kMaxDenseTokens,
         " rows on a CUDA device, got ", s.tokens);
  const ActivationArgs activation = ActivationArgs(Activation::kRelu2).above(kOp, threshold);
  const DeviceScope scope(kOp, x);
  return network_result(x, net, s, [&](Tensor& result) { run(scope, x, net, s, activation, result); });
}

SPARSE24_OP(relu2_mlp_dense,
            "relu2_mlp_dense(Tensor x, Tensor w1, Tensor w2, Tensor? b1=None, Tensor? b2=None, Tensor? w1_scale=None, "
            "Tensor? w2_scale=None, Tensor? scale_y=None, Tensor? scale_y_factor=None, float threshold=0.0) -> Tensor")

}  // namespace sparse24::torch_ops
