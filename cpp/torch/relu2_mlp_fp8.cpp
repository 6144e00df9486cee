/// @file
/// sparse24.relu2_mlp_fp8: the forward pass of a training step in float8, in one call, which is what the host pays for.
#include "step_fp8.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.relu2_mlp_fp8";
constexpr DType kFp8 = DType::kFloat8E4M3;

/// The tensors beside x. A weight that is float8 already has a scale.
struct StepNetwork {
  const Tensor &w1, &w2;
  const std::optional<Tensor>&b1, &b2, &w1_scale, &w2_scale;
};

struct Sizes {
  int64_t tokens, in, features, out;
  DType dtype;  ///< of x
};

/// Checks one weight, of x's dtype or float8 with a scale.
void check_weight(const char* argument, const char* of_scale, const Tensor& w, const std::optional<Tensor>& scale,
                  const Tensor& x) {
  check_device(kOp, argument, w, "x", x);
  check_sizes(kOp, argument, w, 2);
  const bool codes = w.scalar_type() == ScalarType::Float8_e4m3fn;
  expect(codes || w.scalar_type() == x.scalar_type(), kOp, argument, " to be ", dtype_text(x.scalar_type()),
         " (the dtype of x) or float8_e4m3fn, got ", dtype_text(w.scalar_type()));
  expect(codes == scale.has_value(), kOp, of_scale, " to be ", codes ? "a tensor (" : "None (", argument,
         codes ? " is float8_e4m3fn), got None" : " is not float8_e4m3fn), got a tensor");
  if (!scale) return;
  check_device(kOp, of_scale, *scale, "x", x);
  check_scale(kOp, of_scale, *scale, 1, true, "one scale");
}

void check_multiple(const char* argument, const char* of, int64_t size, int64_t multiple) {
  expect(size > 0 && size % multiple == 0, kOp, argument, " to have a multiple of ", multiple, of, " above 0, got ",
         size);
}

Sizes check(const Tensor& x, const StepNetwork& net, const Tensor& scales, bool sparse) {
  check_sizes(kOp, "x", x, 2);
  Sizes s{x.size(0), x.size(1), 0, 0, {}};
  s.dtype = check_dtype(kOp, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  check_multiple("x", " columns", s.in, 16);
  check_weight("w1", "w1_scale", net.w1, net.w1_scale, x);
  expect(net.w1.size(1) == s.in, kOp, "w1 to have ", s.in, " columns (columns of x), got ", net.w1.size(1));
  s.features = net.w1.size(0);
  check_multiple("w1", " rows", s.features, sparse ? feature_alignment(kFp8, Dim::kFeatures) : 16);
  check_weight("w2", "w2_scale", net.w2, net.w2_scale, x);
  expect(net.w2.size(1) == s.features, kOp, "w2 to have ", s.features, " columns (rows of w1), got ", net.w2.size(1));
  s.out = net.w2.size(0);
  check_multiple("w2", " rows", s.out, 16);
  check_device(kOp, "scales", scales, "x", x);
  check_sizes(kOp, "scales", scales, 1);
  check_scale(kOp, "scales", scales, kDelayedScales, false, "of x, y, grad and dh");
  check_bias(kOp, "b1", net.b1, x, DType::kBFloat16, false, s.features, "rows of w1");
  check_bias(kOp, "b2", net.b2, x, s.dtype, false, s.out, "rows of w2");
  return s;
}

/// The codes of a weight, and what the backward pass takes of them: nothing where they were given.
struct Codes {
  Tensor codes, transposed;
};

bool is_given(const Tensor& w) { return w.scalar_type() == ScalarType::Float8_e4m3fn; }

Codes codes_of(const DeviceScope& scope, const Tensor& w, DType dtype, const StepPlaces& places, StepScale of,
               CodeMemory& memory) {
  if (is_given(w)) return {contiguous_aligned(w), new_empty(w, {0, 0}, ScalarType::Float8_e4m3fn)};
  const Codes made{memory.take(w.size(0), w.size(1)), new_transposed(w)};
  quantize_both(scope, {w, dtype, false, nullptr, places.scale(of), places.largest(of)}, made.codes, made.transposed);
  return made;
}

/// How the activation is computed.
struct How {
  ActivationArgs activation;
  bool sparse, interleaved;
};

/// The activation as codes, 2:4 with metadata or dense, and what the backward pass takes of x and w1.
struct FirstLayer {
  Tensor values, meta, x_transposed, w1_transposed;
};

/// Quantises x and w1, and multiplies them. Their codes along rows are done with then: nothing else reads them.
FirstLayer run_first(const DeviceScope& scope, const Sizes& s, const Tensor& x, const StepNetwork& net,
                     const StepPlaces& places, const How& how, CodeMemory& memory) {
  const Tensor x_transposed = new_transposed(x), codes = memory.take(s.tokens, s.in);
  quantize_both(scope,
                {x, s.dtype, how.sparse && how.interleaved, places.scale(StepScale::kX),
                 places.scale(StepScale::kUsedX), places.largest(StepScale::kX)},
                codes, x_transposed);
  const Codes w1 = codes_of(scope, net.w1, s.dtype, places, StepScale::kW1, memory);
  const Operand a = Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures);
  const int64_t columns = how.sparse ? a.values_cols() : s.features;
  const Tensor values = new_empty(x, {s.tokens, columns}, ScalarType::Float8_e4m3fn);
  const Tensor meta = new_empty(x, {how.sparse ? a.meta_bytes() : 0}, ScalarType::Byte);
  Kept kept;
  LinearArgs args{};
  args.tokens = s.tokens;
  args.in = s.in;
  args.out = s.features;
  args.x = codes.const_data_ptr();
  args.w = w1.codes.const_data_ptr();
  args.dtype = args.y_dtype = kFp8;
  args.hidden_dtype = DType::kBFloat16;
  args.scale_x = places.scale(StepScale::kUsedX);
  args.scale_w = places.scale(StepScale::kW1);
  args.scale_y = places.scale(StepScale::kY);
  args.bias = kept.data(net.b1);
  args.amax = places.largest(StepScale::kY);
  args.saturated = places.saturated(StepScale::kY);
  args.activation = how.activation;
  if (s.tokens > 0 && how.sparse) {
    scope.run(SPARSE24_KERNELS(linear_compress),
              LinearCompressArgs{args, values.mutable_data_ptr(), meta.mutable_data_ptr<uint8_t>(), kFp8});
  } else if (s.tokens > 0) {
    scope.run(SPARSE24_KERNELS(linear_relu2), LinearRelu2Args{args, values.mutable_data_ptr()});
  }
  return {values, meta, x_transposed, w1.transposed};
}

/// Multiplies the activation with the codes of w2.
Tensor run_second(const DeviceScope& scope, const Sizes& s, const FirstLayer& y, const Tensor& w2,
                  const std::optional<Tensor>& bias, const StepPlaces& places, bool sparse) {
  if (s.tokens == 0) return new_empty(w2, {0, s.out}, to_torch(s.dtype));
  if (!sparse) {
    return multiply_dense(y.values, places.one(StepScale::kY), w2, places.one(StepScale::kW2), bias, to_torch(s.dtype));
  }
  Kept kept;
  return multiply(scope,
                  {Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures), y.values.const_data_ptr(),
                   y.meta.const_data_ptr<uint8_t>(), w2, places.scale(StepScale::kY), places.scale(StepScale::kW2),
                   kept.data(bias), s.dtype},
                  s.dtype);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> relu2_mlp_fp8(
    const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& scales, const std::optional<Tensor>& b1,
    const std::optional<Tensor>& b2, const std::optional<Tensor>& w1_scale, const std::optional<Tensor>& w2_scale,
    bool sparse, bool interleaved, double threshold) {
  const StepNetwork net{w1, w2, b1, b2, w1_scale, w2_scale};
  const Sizes s = check(x, net, scales, sparse);
  const How how{ActivationArgs(Activation::kRelu2).above(kOp, threshold), sparse, interleaved};
  const DeviceScope scope(kOp, x);

  Kept kept;
  const StepPlaces places(new_empty(x, {kStepScales, kStepScaleStride}, ScalarType::Float));
  const Tensor delayed = as_contiguous(scales);
  scope.run(SPARSE24_KERNELS(spread_scales),
            SpreadScalesArgs{static_cast<const float*>(delayed.const_data_ptr()), kept.scale(w1_scale),
                             kept.scale(w2_scale), places.start});
  CodeMemory memory(x, {s.tokens * s.in, is_given(w1) ? 0 : w1.numel(), is_given(w2) ? 0 : w2.numel()});
  const FirstLayer y = run_first(scope, s, x, net, places, how, memory);
  const Codes second = codes_of(scope, w2, s.dtype, places, StepScale::kW2, memory);
  const Tensor out = run_second(scope, s, y, second.codes, b2, places, sparse);
  return {out, y.x_transposed, y.w1_transposed, second.transposed, y.values, y.meta, places.tensor};
}

SPARSE24_OP(relu2_mlp_fp8,
            "relu2_mlp_fp8(Tensor x, Tensor w1, Tensor w2, Tensor scales, Tensor? b1=None, Tensor? b2=None, "
            "Tensor? w1_scale=None, Tensor? w2_scale=None, bool sparse=True, bool interleaved=False, "
            "float threshold=0.0) -> (Tensor out, Tensor x_transposed, Tensor w1_transposed, Tensor w2_transposed, "
            "Tensor values, Tensor meta, Tensor places)")

}  // namespace sparse24::torch_ops
