/// @file
/// sparse24.prune_pack24.
#include "tensor.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.prune_pack24";

/// Also float32 on CUDA devices: masters are pruned before they are rounded.
DType check_weight(const Tensor& w) {
  check_sizes(kOp, "w", w, 2);
  const ScalarType actual = w.scalar_type();
  for (const DType t : {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32}) {
    if (actual == to_torch(t)) return t;
  }
  fail(kOp, ": expected w to be bfloat16, float16, float8_e4m3fn or float32, got ", dtype_text(actual));
}

DType check_result(const Tensor& w, DType dtype, std::optional<ScalarType> wanted) {
  const bool master = dtype == DType::kFloat32;
  const ScalarType out = wanted.value_or(to_torch(dtype));
  for (const DType t : {DType::kBFloat16, DType::kFloat16}) {
    if (master && out == to_torch(t)) return t;
  }
  const bool own = !master || !w.is_cuda();
  expect(own && out == to_torch(dtype), kOp, "dtype to be ", master ? "bfloat16 or float16" : name_of(dtype),
         master && own ? " or float32" : "", " (w is ", name_of(dtype), "), got ", dtype_text(out));
  return dtype;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> prune_pack24(const Tensor& w, int64_t dim, std::optional<ScalarType> dtype) {
  PrunePackArgs args{};
  args.dim = parse_dim(kOp, dim);
  args.w_dtype = check_weight(w);
  args.dtype = check_result(w, args.w_dtype, dtype);
  args.rows = w.size(0);
  args.cols = w.size(1);
  const bool features = args.dim == Dim::kFeatures;
  expect(features || args.dtype != DType::kFloat8E4M3, kOp, "dim to be -1 (float8_e4m3fn), got -2");
  const Operand a = args.operand();
  const char *of_features = features ? " rows" : " columns", *of_depth = features ? " columns" : " rows";
  expect(a.m % kPackedFeatures == 0, kOp, "w to have a multiple of ", kPackedFeatures, of_features, ", got ", a.m);
  const int64_t multiple = feature_alignment(args.dtype, Dim::kFeatures);
  expect(a.k % multiple == 0, kOp, "w to have a multiple of ", multiple, of_depth, " (", name_of(args.dtype), "), got ",
         a.k);
  const DeviceScope scope(kOp, w);

  const ScalarType out = to_torch(args.dtype);
  const Tensor pruned = new_empty(w, {args.rows, args.cols}, out), values = new_empty(w, {a.m, a.k / 2}, out);
  const Tensor meta = new_empty(w, {a.meta_bytes()}, ScalarType::Byte);
  if (a.m > 0 && a.k > 0) {
    const Tensor source = contiguous_aligned(w);
    args.w = source.const_data_ptr();
    args.pruned = pruned.mutable_data_ptr();
    args.values = values.mutable_data_ptr();
    args.meta = meta.mutable_data_ptr<uint8_t>();
    scope.run(SPARSE24_KERNELS(prune_pack24), args);
  }
  return {pruned, values, meta};
}

SPARSE24_OP(prune_pack24,
            "prune_pack24(Tensor w, int dim=-1, *, ScalarType? dtype=None) -> (Tensor pruned, Tensor values, "
            "Tensor meta)")

}  // namespace sparse24::torch_ops
