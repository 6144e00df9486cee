/// @file
/// sparse24.experts_linear_relu2 and sparse24.experts_linear_compress: the first products of all experts.
#include "experts.h"

namespace sparse24::torch_ops {

Experts check_offsets(OpName op, const Tensor& offsets, const Tensor& x, int64_t rows) {
  check_device(op, "offsets", offsets, "x", x);
  check_sizes(op, "offsets", offsets, 1);
  expect(offsets.scalar_type() == ScalarType::Int, op, "offsets to be int32, got ", dtype_text(offsets.scalar_type()));
  const int64_t experts = offsets.size(0);
  expect(experts >= 1 && experts <= kMostExperts, op, "offsets to have 1 to ", kMostExperts, " elements, got ",
         experts);
  return {experts, rows, nullptr};
}

Experts check_experts(OpName op, const Tensor& offsets, const char* w_name, const Tensor& w, const Tensor& x,
                      int64_t rows) {
  check_device(op, w_name, w, "x", x);
  check_sizes(op, w_name, w, 3);
  const Experts experts = check_offsets(op, offsets, x, rows);
  expect(w.size(0) == experts.count, op, w_name, " to have ", experts.count, " experts (elements of offsets), got ",
         w.size(0));
  return experts;
}

void check_weight_scale(OpName op, const char* argument, const std::optional<Tensor>& scale, int64_t experts, int64_t n,
                        const Tensor& x) {
  if (!scale) return;
  check_device(op, argument, *scale, "x", x);
  expect(scale->scalar_type() == ScalarType::Float, op, argument, " to be float32, got ",
         dtype_text(scale->scalar_type()));
  const bool fits = (scale->dim() == 1 && scale->size(0) == experts) ||
                    (scale->dim() == 2 && scale->size(0) == experts && scale->size(1) == n);
  expect(fits, op, argument, " to be [", experts, "] or [", experts, ", ", n, "], got ", Shape{*scale});
}

namespace {

/// The tensors of both ops.
struct Inputs {
  const Tensor& x;
  const Tensor& w;
  const Tensor& offsets;
  const std::optional<Tensor>& scale_x;
  const std::optional<Tensor>& scale_w;
};

/// What is multiplied, and for whom.
struct Problem {
  LinearArgs linear{};
  Experts experts{};
};

Problem check_inputs(OpName op, const Inputs& in, const Word& activation, double threshold) {
  Problem out;
  LinearArgs& args = out.linear;
  check_sizes(op, "x", in.x, 2);
  args.dtype = check_dtype(op, "x", in.x, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  args.hidden_dtype = args.y_dtype = args.dtype == DType::kFloat8E4M3 ? DType::kBFloat16 : args.dtype;
  args.tokens = in.x.size(0);
  args.in = in.x.size(1);
  out.experts = check_experts(op, in.offsets, "w", in.w, in.x, args.tokens);
  expect(in.w.scalar_type() == in.x.scalar_type(), op, "w to be ", name_of(args.dtype), " (the dtype of x), got ",
         dtype_text(in.w.scalar_type()));
  expect(in.w.size(2) == args.in, op, "w to have ", args.in, " columns (columns of x), got ", in.w.size(2));
  args.out = in.w.size(1);
  const int64_t multiple = 16 / size_of(args.dtype);
  expect(args.dtype == DType::kFloat32 || args.in % multiple == 0, op, "x to have a multiple of ", multiple,
         " columns (", name_of(args.dtype), "), got ", args.in);
  expect(args.in > 0, op, "x to have columns, got 0");
  if (in.scale_x) {
    check_device(op, "scale_x", *in.scale_x, "x", in.x);
    check_scale(op, "scale_x", *in.scale_x, args.tokens, true, "rows of x");
  }
  check_weight_scale(op, "scale_w", in.scale_w, out.experts.count, args.out, in.x);
  expect(activation.text == "relu2" || activation.text == "relu", op, R"(activation to be "relu2" or "relu", got ")",
         activation.text, '"');
  const ActivationArgs kind = activation.text == "relu" ? Activation::kRelu : Activation::kRelu2;
  args.activation = kind.above(op, threshold);
  return out;
}

/// What owns the memory that a problem points to.
struct Owners {
  Tensor x, w, offsets;
  std::optional<Tensor> scale_x, scale_w;
};

const float* point(const std::optional<Tensor>& given, std::optional<Tensor>& owner) {
  if (!given) return nullptr;
  owner = as_contiguous(*given);
  return owner->const_data_ptr<float>();
}

Owners prepare(const Inputs& in, Problem& problem) {
  Owners owners{contiguous_aligned(in.x), contiguous_aligned(in.w), as_contiguous(in.offsets), {}, {}};
  LinearArgs& args = problem.linear;
  args.x = owners.x.const_data_ptr();
  args.w = owners.w.const_data_ptr();
  problem.experts.offsets = owners.offsets.const_data_ptr<int32_t>();
  args.scale_x = point(in.scale_x, owners.scale_x);
  args.scale_x_per_row = in.scale_x && is_per_row_of(*in.scale_x, args.tokens);
  args.scale_w = point(in.scale_w, owners.scale_w);
  args.scale_w_per_row = in.scale_w && in.scale_w->dim() == 2;
  return owners;
}

}  // namespace

Tensor experts_linear_relu2(const Tensor& x, const Tensor& w, const Tensor& offsets,
                            const std::optional<Tensor>& scale_x, const std::optional<Tensor>& scale_w,
                            const Word& activation, double threshold) {
  constexpr OpName op = "sparse24.experts_linear_relu2";
  const Inputs in{x, w, offsets, scale_x, scale_w};
  Problem problem = check_inputs(op, in, activation, threshold);
  const LinearArgs& linear = problem.linear;
  expect(linear.out % 8 == 0, op, "w to have a multiple of 8 rows, got ", linear.out);
  const DeviceScope scope(op, x);

  // Rows of no expert are not written; on the CPU they are zeros, so that two calls return the same.
  const ScalarType dtype = to_torch(linear.y_dtype);
  const Tensor y =
      x.is_cuda() ? new_empty(x, {linear.tokens, linear.out}, dtype) : new_zeros(x, {linear.tokens, linear.out}, dtype);
  if (linear.tokens > 0 && linear.out > 0) {
    const Owners owners = prepare(in, problem);
    scope.run(SPARSE24_KERNELS(experts_linear_relu2),
              ExpertsLinearRelu2Args{{problem.linear, y.mutable_data_ptr()}, problem.experts});
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> experts_linear_compress(const Tensor& x, const Tensor& w, const Tensor& offsets,
                                                           const std::optional<Tensor>& scale_x,
                                                           const std::optional<Tensor>& scale_w, const Word& activation,
                                                           double threshold) {
  constexpr OpName op = "sparse24.experts_linear_compress";
  const Inputs in{x, w, offsets, scale_x, scale_w};
  Problem problem = check_inputs(op, in, activation, threshold);
  const LinearArgs& linear = problem.linear;
  const DType stored = linear.dtype;
  const bool fp8 = stored == DType::kFloat8E4M3;
  const int64_t multiple = feature_alignment(stored, Dim::kFeatures);
  expect(linear.out % multiple == 0, op, "w to have a multiple of ", multiple, " rows (", name_of(stored), "), got ",
         linear.out);
  const DeviceScope scope(op, x);

  const Operand a = Operand::of(problem.experts.padded_rows(), linear.out, stored, Dim::kFeatures);
  const auto new_values = [&](DType dtype) {
    return x.is_cuda() ? new_empty(x, {a.values_rows(), a.values_cols()}, to_torch(dtype))
                       : new_zeros(x, {a.values_rows(), a.values_cols()}, to_torch(dtype));
  };
  const Tensor values = new_values(stored);
  Tensor meta = new_empty(x, {a.meta_bytes()}, ScalarType::Byte);
  if (!x.is_cuda()) torch::stable::fill_(meta, kMetaPaddingByte);
  Tensor scale = fp8 ? new_empty(x, {a.m, 1}, ScalarType::Float) : new_empty(x, {0}, ScalarType::Float);
  if (a.m > 0 && a.k > 0) {
    const Owners owners = prepare(in, problem);
    // The maximum of a row is known when the row is complete: 16-bit values come first.
    const Tensor wide = fp8 ? new_values(linear.y_dtype) : values;
    scope.run(
        SPARSE24_KERNELS(experts_linear_compress),
        ExpertsLinearCompressArgs{{problem.linear, wide.mutable_data_ptr(), meta.mutable_data_ptr<uint8_t>(), stored},
                                  problem.experts});
    if (fp8) {
      QuantizeArgs quantize{wide.const_data_ptr(), linear.y_dtype, a.values_rows(), a.values_cols(),
                            values.mutable_data_ptr()};
      quantize.computed_scale = scale.mutable_data_ptr<float>();
      scope.run(SPARSE24_KERNELS(quantize_fp8), quantize);
    }
  } else if (fp8) {
    torch::stable::fill_(scale, 1.0);  // the scale of nothing but zeros
  }
  return {values, meta, scale};
}

SPARSE24_OP(experts_linear_relu2,
            "experts_linear_relu2(Tensor x, Tensor w, Tensor offsets, Tensor? scale_x=None, Tensor? scale_w=None, *, "
            R"(str activation="relu2", float threshold=0.0) -> Tensor)")
SPARSE24_OP(experts_linear_compress,
            "experts_linear_compress(Tensor x, Tensor w, Tensor offsets, Tensor? scale_x=None, Tensor? scale_w=None, "
            R"(*, str activation="relu2", float threshold=0.0) -> (Tensor values, Tensor meta, Tensor scale))")

}  // namespace sparse24::torch_ops
