/// @file
/// sparse24.quantize_fp8_both, prune_quantize_fp8_both, prune_pack_fp8_both and transpose_fp8.
#include "tensor.h"

namespace sparse24::torch_ops {

using BothOrders = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using PackedOrders = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

namespace {

constexpr int64_t kMultiple = 16;         // of columns: rows of q are 16-byte aligned, as every fp8 GEMM wants them
constexpr int64_t kMostMatrices = 65535;  // of a grid

/// Returns the values, the metadata if it `packs`, the codes in the other order, the scale and the largest magnitude.
PackedOrders quantize(OpName op, const char* name, const Tensor& x, const std::optional<Tensor>& scale,
                      QuantizeBothArgs args, bool packs = false) {
  const bool of_rows = args.prunes && args.dim == Dim::kTokens;  // groups of rows
  const int64_t depth = feature_alignment(DType::kFloat8E4M3, Dim::kFeatures);
  const int64_t multiple = packs && !of_rows ? depth : kMultiple;
  const bool several = !args.prunes && x.dim() == 3;
  check_sizes(op, name, x, several ? 3 : 2);
  args.x_dtype = check_dtype(op, name, x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  args.rows = x.size(several ? 1 : 0);
  args.cols = x.size(several ? 2 : 1);
  if (several) args.count = x.size(0);
  expect(args.count <= kMostMatrices, op, name, " to have at most ", kMostMatrices, " matrices, got ", args.count);
  expect(args.cols % multiple == 0, op, name, " to have a multiple of ", multiple, " columns, got ", args.cols);
  const int64_t rows = packs ? (of_rows ? depth : kPackedFeatures) : of_rows ? 4 : 1;
  expect(args.rows % rows == 0, op, name, " to have a multiple of ", rows, " rows, got ", args.rows);
  if (scale) {
    check_device(op, "scale", *scale, name, x);
    check_scale(op, "scale", *scale, args.count, false, several ? "matrices of x" : "one scale");
  }
  const DeviceScope scope(op, x);

  const auto codes = [&](int64_t m, int64_t n) {
    return several ? new_empty(x, {args.count, m, n}, ScalarType::Float8_e4m3fn)
                   : new_empty(x, {m, n}, ScalarType::Float8_e4m3fn);
  };
  const Operand a = args.packed();
  const Tensor q = packs ? codes(a.values_rows(), a.values_cols()) : codes(args.rows, args.cols);
  const Tensor meta = packs ? new_empty(x, {a.meta_bytes()}, ScalarType::Byte) : q;
  const Tensor qt = packs && of_rows ? codes(args.rows, args.cols) : codes(args.cols, args.ld_qt());
  const Tensor used = new_empty(x, {args.count}, ScalarType::Float);
  const Tensor amax = new_zeros(x, {args.count}, ScalarType::Float);
  const Tensor source = contiguous_aligned(x);
  const Tensor given = scale ? as_contiguous(*scale) : used;
  args.x = source.const_data_ptr();
  args.q = q.mutable_data_ptr();
  args.meta = packs ? meta.mutable_data_ptr<uint8_t>() : nullptr;
  args.qt = qt.mutable_data_ptr();
  args.given_scale = scale ? given.const_data_ptr<float>() : nullptr;
  args.scale = used.mutable_data_ptr<float>();
  args.amax = amax.mutable_data_ptr<float>();
  scope.run(SPARSE24_KERNELS(quantize_fp8_both), args);
  return {q, meta, qt, used, amax};
}

BothOrders dense(const PackedOrders& made) {
  const auto& [q, meta, qt, scale, amax] = made;
  return {q, qt, scale, amax};
}

}  // namespace

BothOrders quantize_fp8_both(const Tensor& x, const std::optional<Tensor>& scale, bool interleaved) {
  QuantizeBothArgs args{};
  args.interleaved = interleaved;
  return dense(quantize("sparse24.quantize_fp8_both", "x", x, scale, args));
}

BothOrders prune_quantize_fp8_both(const Tensor& w, const std::optional<Tensor>& scale, int64_t dim) {
  constexpr OpName op = "sparse24.prune_quantize_fp8_both";
  QuantizeBothArgs args{};
  args.prunes = true;
  args.dim = parse_dim(op, dim);
  return dense(quantize(op, "w", w, scale, args));
}

PackedOrders prune_pack_fp8_both(const Tensor& w, const std::optional<Tensor>& scale, int64_t dim) {
  constexpr OpName op = "sparse24.prune_pack_fp8_both";
  QuantizeBothArgs args{};
  args.prunes = true;
  args.dim = parse_dim(op, dim);
  return quantize(op, "w", w, scale, args, /*packs=*/true);
}

Tensor transpose_fp8(const Tensor& values) {
  constexpr OpName op = "sparse24.transpose_fp8";
  check_sizes(op, "values", values, 2);
  check_dtype(op, "values", values, {DType::kFloat8E4M3});
  TransposeFp8Args args{};
  args.rows = values.size(0);
  args.cols = values.size(1);
  expect(args.cols % kMultiple == 0, op, "values to have a multiple of ", kMultiple, " columns, got ", args.cols);
  const DeviceScope scope(op, values);
  const Tensor qt = new_empty(values, {args.cols, args.ld_qt()}, ScalarType::Float8_e4m3fn);
  const Tensor source = contiguous_aligned(values);
  args.q = source.const_data_ptr();
  args.qt = qt.mutable_data_ptr();
  scope.run(SPARSE24_KERNELS(transpose_fp8), args);
  return qt;
}

SPARSE24_OP(
    quantize_fp8_both,
    "quantize_fp8_both(Tensor x, Tensor? scale=None, bool interleaved=False) -> (Tensor values, Tensor transposed, "
    "Tensor scale, Tensor amax)")
SPARSE24_OP(prune_quantize_fp8_both,
            "prune_quantize_fp8_both(Tensor w, Tensor? scale=None, int dim=-1) -> (Tensor values, Tensor transposed, "
            "Tensor scale, Tensor amax)")
SPARSE24_OP(prune_pack_fp8_both,
            "prune_pack_fp8_both(Tensor w, Tensor? scale=None, int dim=-1) -> (Tensor values, Tensor meta, "
            "Tensor transposed, Tensor scale, Tensor amax)")
SPARSE24_OP(transpose_fp8, "transpose_fp8(Tensor values) -> Tensor")

}  // namespace sparse24::torch_ops
