/// @file
/// sparse24.linear_relu2, linear_compress and linear_compress_packed, which share their checks and the preparation of
/// the operands.
#include "tensor.h"

namespace sparse24::torch_ops {
namespace {

/// The tensor arguments of the ops.
struct Inputs {
  const Tensor& x;
  const Tensor& w;
  const std::optional<Tensor>& scale_x;
  const std::optional<Tensor>& scale_w;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& scale_out;
  const Tensor* w_meta = nullptr;  ///< w is the values of a packed weight
};

/// What owns the memory that `LinearArgs` points to.
struct Owners {
  Tensor x, w;
  std::optional<Tensor> w_meta;
  std::optional<Tensor> scale_x, scale_w, bias, scale_out;
};

/// max y and the number of saturated values of one call.
struct Statistics {
  Tensor amax, saturated;
};

/// The multiple that the features of x must have in fp8, which is 16 bytes. In 16 bits others are padded.
constexpr int64_t kFp8Multiple = 16;

void check_scale_of(OpName op, const char* argument, const std::optional<Tensor>& scale, int64_t elements,
                    const char* meaning, const Tensor& x) {
  if (!scale) return;
  check_device(op, argument, *scale, "x", x);
  check_scale(op, argument, *scale, elements, true, meaning);
}

/// Checks the sizes of a packed weight, whose columns are half of those of x, and its metadata.
void check_packed(OpName op, const Inputs& in, const LinearArgs& args) {
  const int64_t multiple = feature_alignment(args.dtype, Dim::kFeatures);
  expect(args.in % multiple == 0, op, "x to have a multiple of ", multiple, " columns (", name_of(args.dtype),
         "), got ", args.in);
  expect(2 * in.w.size(1) == args.in, op, "w to have ", args.in / 2, " columns (half of those of x), got ",
         in.w.size(1));
  expect(args.out % kPackedFeatures == 0, op, "w to have a multiple of ", kPackedFeatures, " rows, got ", args.out);
  check_device(op, "meta", *in.w_meta, "x", in.x);
  check_meta(op, *in.w_meta, Operand::of(args.out, args.in, args.dtype, Dim::kFeatures));
}

/// Checks the sizes and dtypes of everything but the output scale.
LinearArgs check_operands(OpName op, const Inputs& in) {
  LinearArgs args{};
  check_sizes(op, "x", in.x, 2);
  args.dtype = check_dtype(op, "x", in.x, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  const bool fp8 = args.dtype == DType::kFloat8E4M3;
  args.hidden_dtype = fp8 ? DType::kBFloat16 : args.dtype;
  args.tokens = in.x.size(0);
  args.in = in.x.size(1);
  expect(!fp8 || args.in % kFp8Multiple == 0, op, "x to have a multiple of ", kFp8Multiple,
         " columns (float8_e4m3fn), got ", args.in);
  check_device(op, "w", in.w, "x", in.x);
  check_sizes(op, "w", in.w, 2);
  expect(in.w.scalar_type() == in.x.scalar_type(), op, "w to be ", name_of(args.dtype), " (the dtype of x), got ",
         dtype_text(in.w.scalar_type()));
  args.out = in.w.size(0);
  if (in.w_meta) {
    check_packed(op, in, args);
  } else {
    expect(in.w.size(1) == args.in, op, "w to have ", args.in, " columns (columns of x), got ", in.w.size(1));
  }
  check_scale_of(op, "scale_x", in.scale_x, args.tokens, "rows of x", in.x);
  check_scale_of(op, "scale_w", in.scale_w, args.out, "rows of w", in.x);
  if (in.bias) {
    check_device(op, "bias", *in.bias, "x", in.x);
    const ScalarType dtype = in.bias->scalar_type();
    expect(dtype == to_torch(args.hidden_dtype), op, "bias to be ", name_of(args.hidden_dtype), ", got ",
           dtype_text(dtype));
    check_sizes(op, "bias", *in.bias, 1);
    expect(in.bias->size(0) == args.out, op, "bias to have ", args.out, " elements (rows of w), got ",
           in.bias->size(0));
  }
  return args;
}

ActivationArgs check_activation(OpName op, const Word& word) {
  if (word.text == "relu") return Activation::kRelu;
  expect(word.text == "relu2", op, R"(activation to be "relu2" or "relu", got ")", word.text, '"');
  return Activation::kRelu2;
}

/// Returns what y is stored as: x's 16-bit type or fp8.
DType check_out_dtype(OpName op, const LinearArgs& args, std::optional<ScalarType> out_dtype) {
  const DType fp8 = DType::kFloat8E4M3, pre_activation = args.hidden_dtype;
  const ScalarType out = out_dtype.value_or(to_torch(args.dtype));
  if (out == to_torch(fp8)) return fp8;
  expect(out == to_torch(pre_activation), op, "out_dtype to be ", name_of(pre_activation), " or ", name_of(fp8),
         ", got ", dtype_text(out));
  return pre_activation;
}

void check_rows_of_w(OpName op, const LinearArgs& args, int64_t multiple) {
  expect(args.out % multiple == 0, op, "w to have a multiple of ", multiple, " rows (", name_of(args.y_dtype),
         " output), got ", args.out);
}

/// Checks that the scale of y is there where it is used, and only there.
void check_scale_out(OpName op, const Inputs& in, const LinearArgs& args, bool wanted, const char* reason) {
  if (!wanted) {
    expect(!in.scale_out, op, "scale_out to be None (", reason, "), got a tensor");
    return;
  }
  expect(in.scale_out.has_value(), op, "scale_out to be a tensor (", reason, "), got None");
  check_scale_of(op, "scale_out", in.scale_out, args.tokens, "rows of x", in.x);
}

/// Whether there is a scale for each row, and not one for all.
bool is_per_row(const Tensor& scale, int64_t rows) { return rows != 1 && scale.numel() == rows; }

/// Returns x and w as the kernels read them. They always get columns to multiply, if only zeros.
Owners prepare_factors(const Inputs& in, LinearArgs& args) {
  const int64_t step = in.w_meta ? feature_alignment(args.dtype, Dim::kFeatures) : 16 / size_of(args.dtype);
  const int64_t padded = args.in == 0 ? step : round_up(args.in, step);
  Owners owners{pad_columns(in.x, padded), pad_columns(in.w, in.w_meta ? padded / 2 : padded), {}, {}, {}, {}, {}};
  if (in.w_meta && in.x.is_cuda() && args.in == 0) {
    const Operand w = Operand::of(args.out, padded, args.dtype, Dim::kFeatures);
    owners.w_meta = new_empty(in.x, {w.meta_bytes()}, ScalarType::Byte);
    torch::stable::fill_(*owners.w_meta, kMetaPaddingByte);
  } else if (in.w_meta) {
    owners.w_meta = contiguous_aligned(*in.w_meta);
  }
  if (in.x.is_cuda()) args.in = padded;
  return owners;
}

/// Copies what the kernels cannot read, and points `args` to it.
Owners prepare(const Inputs& in, LinearArgs& args) {
  Owners owners = prepare_factors(in, args);
  args.x = owners.x.const_data_ptr();
  args.w = owners.w.const_data_ptr();
  if (in.scale_x) {
    owners.scale_x = as_contiguous(*in.scale_x);
    args.scale_x = owners.scale_x->const_data_ptr<float>();
    args.scale_x_per_row = is_per_row(*in.scale_x, args.tokens);
  }
  if (in.scale_w) {
    owners.scale_w = as_contiguous(*in.scale_w);
    args.scale_w = owners.scale_w->const_data_ptr<float>();
    args.scale_w_per_row = is_per_row(*in.scale_w, args.out);
  }
  if (in.bias) {
    owners.bias = contiguous_aligned(*in.bias);
    args.bias = owners.bias->const_data_ptr();
  }
  if (in.scale_out) {
    owners.scale_out = as_contiguous(*in.scale_out);
    args.scale_y = owners.scale_out->const_data_ptr<float>();
    args.scale_y_per_row = is_per_row(*in.scale_out, args.tokens);
  }
  return owners;
}

/// Makes zeroed statistics for the kernel to collect into, or empty ones that it does not collect, which saves two
/// launches.
Statistics new_statistics(const Tensor& x, LinearArgs& args, bool wanted) {
  if (!wanted) return {new_empty(x, {0}, ScalarType::Float), new_empty(x, {0}, ScalarType::Int)};
  Statistics out{new_zeros(x, {1}, ScalarType::Float), new_zeros(x, {1}, ScalarType::Int)};
  args.amax = out.amax.mutable_data_ptr<float>();
  args.saturated = out.saturated.mutable_data_ptr<int32_t>();
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_relu2(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale_x,
                                                const std::optional<Tensor>& scale_w, const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& scale_out,
                                                std::optional<ScalarType> out_dtype, bool statistics,
                                                const Word& activation, double threshold) {
  constexpr OpName op = "sparse24.linear_relu2";
  const Inputs in{x, w, scale_x, scale_w, bias, scale_out};
  LinearRelu2Args args{check_operands(op, in), nullptr};
  LinearArgs& linear = args.linear;
  linear.activation = check_activation(op, activation).above(op, threshold);
  linear.y_dtype = check_out_dtype(op, linear, out_dtype);
  const bool fp8 = linear.y_dtype == DType::kFloat8E4M3;
  check_rows_of_w(op, linear, fp8 ? 16 : 8);  // rows of y are 16-byte aligned
  check_scale_out(op, in, linear, fp8, fp8 ? "float8_e4m3fn output" : "the output is not float8_e4m3fn");
  const DeviceScope scope(op, x);

  const Tensor y = new_empty(x, {linear.tokens, linear.out}, to_torch(linear.y_dtype));
  const Statistics collected = new_statistics(x, linear, statistics);
  if (linear.tokens > 0 && linear.out > 0) {
    const Owners owners = prepare(in, linear);
    args.y = y.mutable_data_ptr();
    scope.run(SPARSE24_KERNELS(linear_relu2), args);
  }
  return {y, collected.amax, collected.saturated};
}

namespace {

using CompressedOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// linear_compress, of whichever weight.
CompressedOutput compress_linear(OpName op, const Inputs& in, const Word& activation, const Word& scaling,
                                 std::optional<ScalarType> out_dtype, bool statistics, double threshold) {
  const Tensor& x = in.x;
  const std::optional<Tensor>& scale_out = in.scale_out;
  expect(scaling.text == "given" || scaling.text == "row", op, R"(scaling to be "given" or "row", got ")", scaling.text,
         '"');
  LinearCompressArgs args{check_operands(op, in), nullptr, nullptr, {}};
  LinearArgs& linear = args.linear;
  linear.activation = check_activation(op, activation).above(op, threshold);
  const DType out = linear.y_dtype = args.meta_dtype = check_out_dtype(op, linear, out_dtype);
  const bool fp8 = out == DType::kFloat8E4M3, by_row = scaling.text == "row";
  check_rows_of_w(op, linear, feature_alignment(out, Dim::kFeatures));
  expect(fp8 || !by_row, op, R"(scaling to be "given" ()", name_of(out), R"( output has no scale), got "row")");
  check_scale_out(op, in, linear, fp8 && !by_row,
                  !fp8     ? "the output is not float8_e4m3fn"
                  : by_row ? R"(scaling="row" computes it)"
                           : R"(scaling="given" of float8_e4m3fn output)");
  const DeviceScope scope(op, x);

  const Operand a = Operand::of(linear.tokens, linear.out, out, Dim::kFeatures);
  const Tensor values = new_empty(x, {a.values_rows(), a.values_cols()}, to_torch(out));
  const Tensor meta = new_empty(x, {a.meta_bytes()}, ScalarType::Byte);
  const bool one_scale = scale_out && scale_out->numel() == 1;
  const Tensor scale = fp8 ? new_scale(scope, x, scale_out, one_scale ? Scaling::kTensor : Scaling::kRow, linear.tokens)
                           : new_empty(x, {0}, ScalarType::Float);
  const Statistics collected = new_statistics(x, linear, statistics);
  if (a.m > 0 && a.k > 0) {
    const Owners owners = prepare(in, linear);
    // The maximum of a row is known when the row is complete, so that 16-bit values come first, and fp8 at half the
    // size from them.
    std::optional<Tensor> wide;
    if (by_row) {
      linear.y_dtype = linear.hidden_dtype;
      wide = new_empty(x, {a.values_rows(), a.values_cols()}, to_torch(linear.y_dtype));
    }
    args.values = by_row ? wide->mutable_data_ptr() : values.mutable_data_ptr();
    args.meta = meta.mutable_data_ptr<uint8_t>();
    if (in.w_meta) {
      scope.run(SPARSE24_KERNELS(linear_compress_packed),
                LinearCompressPackedArgs{args, owners.w_meta->const_data_ptr<uint8_t>()});
    } else {
      scope.run(SPARSE24_KERNELS(linear_compress), args);
    }
    if (by_row) {
      QuantizeArgs quantize{wide->const_data_ptr(), linear.y_dtype, a.values_rows(), a.values_cols(),
                            values.mutable_data_ptr()};
      quantize.computed_scale = scale.mutable_data_ptr<float>();
      scope.run(SPARSE24_KERNELS(quantize_fp8), quantize);
    }
  } else if (by_row) {
    torch::stable::fill_(scale, 1.0);  // the scale of nothing but zeros
  }
  return {values, meta, scale, collected.amax, collected.saturated};
}

}  // namespace

CompressedOutput linear_compress(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale_x,
                                 const std::optional<Tensor>& scale_w, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& scale_out, const Word& activation, const Word& scaling,
                                 std::optional<ScalarType> out_dtype, bool statistics, double threshold) {
  return compress_linear("sparse24.linear_compress", {x, w, scale_x, scale_w, bias, scale_out}, activation, scaling,
                         out_dtype, statistics, threshold);
}

CompressedOutput linear_compress_packed(const Tensor& x, const Tensor& w, const Tensor& meta,
                                        const std::optional<Tensor>& scale_x, const std::optional<Tensor>& scale_w,
                                        const std::optional<Tensor>& bias, const std::optional<Tensor>& scale_out,
                                        const Word& activation, const Word& scaling,
                                        std::optional<ScalarType> out_dtype, bool statistics, double threshold) {
  return compress_linear("sparse24.linear_compress_packed", {x, w, scale_x, scale_w, bias, scale_out, &meta},
                         activation, scaling, out_dtype, statistics, threshold);
}

SPARSE24_OP(linear_relu2,
            "linear_relu2(Tensor x, Tensor w, Tensor? scale_x=None, Tensor? scale_w=None, Tensor? bias=None, "
            R"(Tensor? scale_out=None, *, ScalarType? out_dtype=None, bool statistics=True, str activation="relu2", )"
            "float threshold=0.0) -> (Tensor y, Tensor amax, Tensor saturated)")
SPARSE24_OP(linear_compress,
            "linear_compress(Tensor x, Tensor w, Tensor? scale_x=None, Tensor? scale_w=None, Tensor? bias=None, "
            R"(Tensor? scale_out=None, *, str activation="relu2", str scaling="given", ScalarType? out_dtype=None, )"
            "bool statistics=True, float threshold=0.0) -> (Tensor values, Tensor meta, Tensor scale, Tensor amax, "
            "Tensor saturated)")

SPARSE24_OP(linear_compress_packed,
            "linear_compress_packed(Tensor x, Tensor w, Tensor meta, Tensor? scale_x=None, Tensor? scale_w=None, "
            R"(Tensor? bias=None, Tensor? scale_out=None, *, str activation="relu2", str scaling="given", )"
            "ScalarType? out_dtype=None, bool statistics=True, float threshold=0.0) -> (Tensor values, Tensor meta, "
            "Tensor scale, Tensor amax, Tensor saturated)")

}  // namespace sparse24::torch_ops
