/// @file
/// sparse24.put_features: sums of parts into rows or columns of a matrix, in place.
#include "tensor.h"

namespace sparse24::torch_ops {
namespace {

/// Checks that `t`, whose elements have `element_size` bytes, does not share memory with out. As with torch's own
/// in-place ops, tensors with gaps or repeated elements pass, and are copied before anything is written.
void check_apart(OpName op, const char* argument, const Tensor& t, int64_t element_size, const Tensor& out,
                 int64_t out_bytes) {
  int64_t extent = 1;
  for (int64_t i = 0; i < t.dim(); ++i) extent += (t.size(i) - 1) * t.stride(i);
  if (t.numel() == 0 || extent != t.numel()) return;
  const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const auto out_first = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const bool apart = first + static_cast<uintptr_t>(extent * element_size) <= out_first ||
                     out_first + static_cast<uintptr_t>(out_bytes) <= first;
  expect(apart, op, argument, " not to share memory with out, got a tensor that does");
}

}  // namespace

void put_features(const Tensor& out, const Tensor& parts, const Tensor& features, int64_t dim) {
  constexpr OpName op = "sparse24.put_features";
  PutFeaturesArgs args{};
  args.by_columns = parse_dim(op, dim) == Dim::kFeatures;
  check_sizes(op, "out", out, 2);
  args.dtype = check_dtype(op, "out", out, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  expect(out.is_contiguous(), op, "out to be contiguous, got strides ", Strides{out});
  check_device(op, "parts", parts, "out", out);
  check_sizes(op, "parts", parts, 3);
  expect(parts.scalar_type() == out.scalar_type(), op, "parts to be ", name_of(args.dtype), " (the dtype of out), got ",
         dtype_text(parts.scalar_type()));
  check_device(op, "features", features, "out", out);
  check_sizes(op, "features", features, 1);
  expect(features.scalar_type() == ScalarType::Long, op, "features to be int64, got ",
         dtype_text(features.scalar_type()));
  args.rows = out.size(0);
  args.columns = out.size(1);
  args.part_count = parts.size(0);
  args.count = features.size(0);
  expect(parts.size(1) == args.parts_rows(), op, "parts to have ", args.parts_rows(), " rows (",
         args.by_columns ? "rows of out" : "elements of features", "), got ", parts.size(1));
  expect(parts.size(2) == args.parts_columns(), op, "parts to have ", args.parts_columns(), " columns (",
         args.by_columns ? "elements of features" : "columns of out", "), got ", parts.size(2));
  const int64_t out_bytes = out.numel() * size_of(args.dtype);
  check_apart(op, "parts", parts, size_of(args.dtype), out, out_bytes);
  check_apart(op, "features", features, sizeof(int64_t), out, out_bytes);
  const DeviceScope scope(op, out);

  const Tensor source = contiguous_aligned(parts), where = as_contiguous(features);
  args.out = out.mutable_data_ptr();
  args.parts = source.const_data_ptr();
  args.features = where.const_data_ptr<int64_t>();
  scope.run(SPARSE24_KERNELS(put_features), args);
}

SPARSE24_OP(put_features, "put_features(Tensor(a!) out, Tensor parts, Tensor features, int dim) -> ()")

}  // namespace sparse24::torch_ops
