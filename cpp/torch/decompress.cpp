/// @file
/// sparse24.compress_like and sparse24.decompress: between X and values at a known pattern.
#include "tensor.h"

namespace sparse24::torch_ops {

Tensor compress_like(const Tensor& x, const Tensor& meta, int64_t dim) {
  constexpr OpName op = "sparse24.compress_like";
  CompressLikeArgs args{};
  args.dim = parse_dim(op, dim);
  check_sizes(op, "x", x, 2);
  args.dtype = check_dtype(op, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  args.rows = x.size(0);
  args.cols = x.size(1);
  check_columns(op, "x", args.cols, args.dtype, args.dim);
  const Operand a = Operand::of(args.rows, args.cols, args.dtype, args.dim);
  check_device(op, "meta", meta, "x", x);
  check_meta(op, meta, a);
  const DeviceScope scope(op, x);

  const Tensor values = new_empty(x, {a.values_rows(), a.values_cols()}, to_torch(args.dtype));
  if (a.m > 0 && a.k > 0) {
    const Tensor source = contiguous_aligned(x), pattern = contiguous_aligned(meta);
    args.x = source.const_data_ptr();
    args.meta = pattern.const_data_ptr<uint8_t>();
    args.values = values.mutable_data_ptr();
    scope.run(SPARSE24_KERNELS(compress_like), args);
  }
  return values;
}

Tensor decompress(const Tensor& values, const Tensor& meta, int64_t rows, int64_t cols, int64_t dim) {
  constexpr OpName op = "sparse24.decompress";
  constexpr int64_t kLargest = 0x7FFFFFFF;
  DecompressArgs args{};
  args.dim = parse_dim(op, dim);
  check_sizes(op, "values", values, 2);
  args.dtype =
      check_dtype(op, "values", values, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  expect(0 <= rows && rows <= kLargest, op, "rows to be at least 0 and below 2^31, got ", rows);
  expect(0 <= cols && cols <= kLargest, op, "cols to be at least 0 and below 2^31, got ", cols);
  const int64_t multiple = feature_alignment(args.dtype, args.dim);
  expect(cols % multiple == 0, op, "cols to be a multiple of ", multiple, " (", name_of(args.dtype),
         " values, dim=", dim, "), got ", cols);
  args.rows = rows;
  args.cols = cols;
  const Operand a = Operand::of(rows, cols, args.dtype, args.dim);
  expect(values.size(0) == a.values_rows() && values.size(1) == a.values_cols(), op, "values to have shape (",
         a.values_rows(), ", ", a.values_cols(), ") for rows=", rows, ", cols=", cols, ", dim=", dim, ", got ",
         Shape{values});
  check_device(op, "meta", meta, "values", values);
  check_meta(op, meta, a);
  const DeviceScope scope(op, values);

  const Tensor x = new_empty(values, {rows, cols}, to_torch(args.dtype));
  if (a.m > 0 && a.k > 0) {
    const Tensor source = contiguous_aligned(values), pattern = contiguous_aligned(meta);
    args.values = source.const_data_ptr();
    args.meta = pattern.const_data_ptr<uint8_t>();
    args.x = x.mutable_data_ptr();
    scope.run(SPARSE24_KERNELS(decompress), args);
  }
  return x;
}

SPARSE24_OP(compress_like, "compress_like(Tensor x, Tensor meta, int dim=-1) -> Tensor")
SPARSE24_OP(decompress, "decompress(Tensor values, Tensor meta, SymInt rows, SymInt cols, int dim=-1) -> Tensor")

}  // namespace sparse24::torch_ops
