/// @file
/// sparse24.compress and sparse24.compress_fp8.
#include "tensor.h"

namespace sparse24::torch_ops {
namespace {

/// Checks of x what both ops do. `values` is the stored type, none if it is x's own.
DType check_x(OpName op, const Tensor& x, Dim dim, std::optional<DType> values) {
  check_sizes(op, "x", x, 2);
  const DType dtype = check_dtype(op, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  check_columns(op, "x", x.size(1), values.value_or(dtype), dim);
  return dtype;
}

struct Compressed {
  Tensor values, meta;
};

Compressed new_compressed(const Tensor& x, const Operand& a) {
  return {new_empty(x, {a.values_rows(), a.values_cols()}, to_torch(a.dtype)),
          new_empty(x, {a.meta_bytes()}, ScalarType::Byte)};
}

}  // namespace

std::tuple<Tensor, Tensor> compress(const Tensor& x, const Word& activation, int64_t dim, double threshold) {
  constexpr OpName op = "sparse24.compress";
  CompressArgs args{};
  args.activation = parse_activation(op, activation).above(op, threshold);
  args.dim = parse_dim(op, dim);
  args.x_dtype = args.values_dtype = check_x(op, x, args.dim, std::nullopt);
  args.rows = x.size(0);
  args.cols = x.size(1);
  const DeviceScope scope(op, x);

  const Operand a = Operand::of(args.rows, args.cols, args.values_dtype, args.dim);
  const auto [values, meta] = new_compressed(x, a);
  if (a.m > 0 && a.k > 0) {
    const Tensor source = contiguous_aligned(x);
    args.x = source.const_data_ptr();
    args.values = values.mutable_data_ptr();
    args.meta = meta.mutable_data_ptr<uint8_t>();
    scope.run(SPARSE24_KERNELS(compress), args);
  }
  return {values, meta};
}

std::tuple<Tensor, Tensor, Tensor> compress_fp8(const Tensor& x, const std::optional<Tensor>& scale,
                                                const Word& activation, int64_t dim, const Word& scaling,
                                                double threshold) {
  constexpr OpName op = "sparse24.compress_fp8";
  CompressArgs args{};
  args.activation = parse_activation(op, activation).above(op, threshold);
  args.dim = parse_dim(op, dim);
  args.scaling = parse_scaling(op, scaling);
  args.values_dtype = DType::kFloat8E4M3;
  args.x_dtype = check_x(op, x, args.dim, args.values_dtype);
  args.rows = x.size(0);
  args.cols = x.size(1);
  const Operand a = Operand::of(args.rows, args.cols, args.values_dtype, args.dim);
  check_given_scale(op, scale, args.scaling, a.m, "rows of the sparse operand", x);
  const DeviceScope scope(op, x);

  const auto [values, meta] = new_compressed(x, a);
  const Tensor used_scale = new_scale(scope, x, scale, args.scaling, a.m);
  if (a.m > 0 && a.k > 0) {
    const Tensor source = contiguous_aligned(x);
    args.x = source.const_data_ptr();
    args.values = values.mutable_data_ptr();
    args.meta = meta.mutable_data_ptr<uint8_t>();
    if (scale) {
      args.given_scale = used_scale.const_data_ptr<float>();
    } else {
      args.computed_scale = used_scale.mutable_data_ptr<float>();
    }
    scope.run(SPARSE24_KERNELS(compress), args);
  } else if (!scale) {
    torch::stable::fill_(used_scale, 1.0);  // the scale of nothing but zeros
  }
  return {values, meta, used_scale};
}

SPARSE24_OP(
    compress,
    R"(compress(Tensor x, str activation="none", int dim=-1, *, float threshold=0.0) -> (Tensor values, Tensor meta))")
SPARSE24_OP(compress_fp8,
            R"(compress_fp8(Tensor x, Tensor? scale=None, str activation="none", int dim=-1, str scaling="row", )"
            "*, float threshold=0.0) -> (Tensor values, Tensor meta, Tensor scale)")

}  // namespace sparse24::torch_ops
