/// @file
/// The checks of a whole network.
#include "network.h"

namespace sparse24::torch_ops {
namespace {

void check_weight(OpName op, const char* argument, const Tensor& w, const Tensor& x, ScalarType dtype, const char* of) {
  check_device(op, argument, w, "x", x);
  check_sizes(op, argument, w, 2);
  expect(w.scalar_type() == dtype, op, argument, " to be ", dtype_text(dtype), of, ", got ",
         dtype_text(w.scalar_type()));
}

/// A scale is there for float8 weights (`needed` or not), and for nothing else.
void check_scale_of(OpName op, const char* argument, const std::optional<Tensor>& scale, bool fp8, bool needed,
                    const Tensor& x, int64_t elements, const char* meaning) {
  if (!scale) {
    expect(!needed, op, argument, " to be a tensor (w1 is float8_e4m3fn), got None");
    return;
  }
  expect(fp8, op, argument, " to be None (w1 is not float8_e4m3fn), got a tensor");
  check_device(op, argument, *scale, "x", x);
  check_scale(op, argument, *scale, elements, true, meaning);
}

}  // namespace

void check_bias(OpName op, const char* argument, const std::optional<Tensor>& bias, const Tensor& x, DType dtype,
                bool or_float, int64_t elements, const char* meaning) {
  if (!bias) return;
  check_device(op, argument, *bias, "x", x);
  const ScalarType actual = bias->scalar_type();
  or_float = or_float && dtype != DType::kFloat32;
  expect(actual == to_torch(dtype) || (or_float && actual == ScalarType::Float), op, argument, " to be ",
         name_of(dtype), or_float ? " or float32" : "", ", got ", dtype_text(actual));
  check_sizes(op, argument, *bias, 1);
  expect(bias->size(0) == elements, op, argument, " to have ", elements, " elements (", meaning, "), got ",
         bias->size(0));
}

NetworkSizes check_network(OpName op, const Tensor& x, const Network& net, RowMultiples (*multiples)(DType stored)) {
  check_defined(op, "x", x);
  expect(x.dim() >= 1, op, "x to have at least 1 dimension, got 0 with shape ()");
  NetworkSizes s{1, x.size(x.dim() - 1), 0, 0, {}, false};
  s.dtype = check_dtype(op, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  for (int64_t i = 0; i + 1 < x.dim(); ++i) s.tokens *= x.size(i);
  expect(s.tokens <= INT32_MAX && s.in <= INT32_MAX, op, "x to have sizes below 2^31, got ", Shape{x});
  check_defined(op, "w1", net.w1);
  s.fp8 = net.w1.scalar_type() == ScalarType::Float8_e4m3fn;
  if (!s.fp8) check_weight(op, "w1", net.w1, x, to_torch(s.dtype), " (the dtype of x) or float8_e4m3fn");
  check_weight(op, "w1", net.w1, x, net.w1.scalar_type(), "");
  expect(net.w1.size(1) == s.in, op, "w1 to have ", s.in, " columns (columns of x), got ", net.w1.size(1));
  const DType stored = s.stored();
  const RowMultiples of = multiples(stored);
  expect(s.in % of.columns == 0, op, "x to have a multiple of ", of.columns, " columns (", name_of(stored),
         " weights), got ", s.in);
  s.features = net.w1.size(0);
  expect(s.features % of.rows == 0, op, "w1 to have a multiple of ", of.rows, " rows (", name_of(stored), "), got ",
         s.features);
  check_weight(op, "w2", net.w2, x, net.w1.scalar_type(), " (the dtype of w1)");
  expect(net.w2.size(1) == s.features, op, "w2 to have ", s.features, " columns (rows of w1), got ", net.w2.size(1));
  s.out = net.w2.size(0);
  check_bias(op, "b1", net.b1, x, s.fp8 ? DType::kBFloat16 : s.dtype, false, s.features, "rows of w1");
  check_bias(op, "b2", net.b2, x, s.dtype, true, s.out, "rows of w2");
  check_scale_of(op, "w1_scale", net.w1_scale, s.fp8, s.fp8, x, s.features, "rows of w1");
  check_scale_of(op, "w2_scale", net.w2_scale, s.fp8, s.fp8, x, s.out, "rows of w2");
  check_scale_of(op, "scale_y", net.scale_y, s.fp8, false, x, s.tokens, "tokens of x");
  check_scale_of(op, "scale_y_factor", net.scale_y_factor, s.fp8, false, x, 1, "one factor");
  expect(!net.scale_y || !net.scale_y_factor, op, "scale_y_factor to be None beside scale_y, got a tensor");
  return s;
}

bool is_per_row(const std::optional<Tensor>& scale, int64_t rows) {
  return scale && rows != 1 && scale->numel() == rows;
}

Tensor padded_rows(const Tensor& x, const NetworkSizes& s, int64_t padded) {
  // Not a view of that shape, which torch finds by its name: that takes the host longer than a launch.
  if (padded == s.in) return contiguous_aligned(x);
  if (x.dim() == 2) return pad_columns(x, padded);
  const int64_t sizes[] = {s.tokens, s.in};
  return pad_columns(torch::stable::view(as_contiguous(x), sizes), padded);
}

}  // namespace sparse24::torch_ops
