/// @file
/// sparse24.quantize_fp8_both and prune_quantize_fp8_both.
#include "tensor.h"

namespace sparse24::torch_ops {

using BothOrders = std::tuple<Tensor, Tensor, Tensor, Tensor>;

namespace {

BothOrders quantize(OpName op, const char* name, const Tensor& x, const std::optional<Tensor>& scale,
                    QuantizeBothArgs args) {
  constexpr int64_t kMultiple = 16;  // of columns: rows of q are 16-byte aligned, as every fp8 GEMM wants them
  check_sizes(op, name, x, 2);
  args.x_dtype = check_dtype(op, name, x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  args.rows = x.size(0);
  args.cols = x.size(1);
  expect(args.cols % kMultiple == 0, op, name, " to have a multiple of ", kMultiple, " columns, got ", args.cols);
  const bool in_groups = !args.prunes || args.dim == Dim::kFeatures || args.rows % 4 == 0;
  expect(in_groups, op, name, " to have a multiple of 4 rows, got ", args.rows);
  if (scale) {
    check_device(op, "scale", *scale, name, x);
    check_scale(op, "scale", *scale, 1, true, "one scale");
  }
  const DeviceScope scope(op, x);

  const Tensor q = new_empty(x, {args.rows, args.cols}, ScalarType::Float8_e4m3fn);
  const Tensor qt = new_empty(x, {args.cols, args.ld_qt()}, ScalarType::Float8_e4m3fn);
  const Tensor used = new_empty(x, {1}, ScalarType::Float), amax = new_zeros(x, {1}, ScalarType::Float);
  const Tensor source = contiguous_aligned(x);
  const Tensor given = scale ? as_contiguous(*scale) : used;
  args.x = source.const_data_ptr();
  args.q = q.mutable_data_ptr();
  args.qt = qt.mutable_data_ptr();
  args.given_scale = scale ? given.const_data_ptr<float>() : nullptr;
  args.scale = used.mutable_data_ptr<float>();
  args.amax = amax.mutable_data_ptr<float>();
  scope.run(SPARSE24_KERNELS(quantize_fp8_both), args);
  return {q, qt, used, amax};
}

}  // namespace

BothOrders quantize_fp8_both(const Tensor& x, const std::optional<Tensor>& scale, bool interleaved) {
  QuantizeBothArgs args{};
  args.interleaved = interleaved;
  return quantize("sparse24.quantize_fp8_both", "x", x, scale, args);
}

BothOrders prune_quantize_fp8_both(const Tensor& w, const std::optional<Tensor>& scale, int64_t dim) {
  constexpr OpName op = "sparse24.prune_quantize_fp8_both";
  QuantizeBothArgs args{};
  args.prunes = true;
  args.dim = parse_dim(op, dim);
  return quantize(op, "w", w, scale, args);
}

SPARSE24_OP(
    quantize_fp8_both,
    "quantize_fp8_both(Tensor x, Tensor? scale=None, bool interleaved=False) -> (Tensor values, Tensor transposed, "
    "Tensor scale, Tensor amax)")
SPARSE24_OP(prune_quantize_fp8_both,
            "prune_quantize_fp8_both(Tensor w, Tensor? scale=None, int dim=-1) -> (Tensor values, Tensor transposed, "
            "Tensor scale, Tensor amax)")

}  // namespace sparse24::torch_ops
