/// @file
/// sparse24.experts_mm and sparse24.experts_linear: the second products of all experts, of a 2:4 activation and of a
/// dense one.
#include "experts.h"

namespace sparse24::torch_ops {
namespace {

/// The tensors that both ops have.
struct Inputs {
  const char* w_name;
  const Tensor& w;  ///< [experts, out, in]
  const Tensor& offsets;
  const char* scale_a_name;
  const std::optional<Tensor>& scale_a;
  const char* scale_w_name;
  const std::optional<Tensor>& scale_w;
  const std::optional<Tensor>& row_scale;
};

/// Checks all but what is multiplied with w, of which `first` is the tensor and `rows_of_a` the rows.
ExpertsProduct check_product(OpName op, const Inputs& in, const Tensor& first, DType dtype, int64_t rows, int64_t k,
                             int64_t rows_of_a, std::optional<ScalarType> out_dtype) {
  ExpertsProduct args{};
  args.dtype = dtype;
  args.experts = check_experts(op, in.offsets, in.w_name, in.w, first, rows);
  expect(in.w.scalar_type() == first.scalar_type(), op, in.w_name, " to be ", name_of(dtype), ", got ",
         dtype_text(in.w.scalar_type()));
  args.in = k;
  args.out = in.w.size(1);
  expect(args.out % 8 == 0, op, in.w_name, " to have a multiple of 8 outputs, got ", args.out);
  if (in.scale_a) {
    check_device(op, in.scale_a_name, *in.scale_a, "x", first);
    check_scale(op, in.scale_a_name, *in.scale_a, rows_of_a, true, "rows of the first operand");
  }
  check_weight_scale(op, in.scale_w_name, in.scale_w, args.experts.count, args.out, first);
  if (in.row_scale) {
    check_device(op, "row_scale", *in.row_scale, "x", first);
    check_scale(op, "row_scale", *in.row_scale, rows, false, "rows of the result");
  }
  const ScalarType usual = dtype == DType::kFloat8E4M3 ? ScalarType::BFloat16 : to_torch(dtype);
  const ScalarType out = out_dtype.value_or(usual);
  const bool sixteen = out == ScalarType::BFloat16 || out == ScalarType::Half;
  expect(sixteen || (out == ScalarType::Float && !first.is_cuda()), op, "out_dtype to be bfloat16 or float16, got ",
         dtype_text(out));
  args.d_dtype = out == ScalarType::BFloat16 ? DType::kBFloat16
                 : out == ScalarType::Half   ? DType::kFloat16
                                             : DType::kFloat32;
  return args;
}

/// What owns the memory that a product points to.
struct Owners {
  Tensor w, offsets;
  std::optional<Tensor> scale_a, scale_w, row_scale;
};

const float* point(const std::optional<Tensor>& given, std::optional<Tensor>& owner) {
  if (!given) return nullptr;
  owner = as_contiguous(*given);
  return owner->const_data_ptr<float>();
}

Owners prepare(const Inputs& in, ExpertsProduct& args, int64_t rows_of_a) {
  const Tensor w = args.w_major == Major::kColumn ? in.w : torch::stable::transpose(in.w, 1, 2);
  Owners owners{contiguous_aligned(w), as_contiguous(in.offsets), {}, {}, {}};
  args.w = owners.w.const_data_ptr();
  args.experts.offsets = owners.offsets.const_data_ptr<int32_t>();
  args.scale_a = point(in.scale_a, owners.scale_a);
  args.scale_a_per_row = in.scale_a && is_per_row_of(*in.scale_a, rows_of_a);
  args.scale_w = point(in.scale_w, owners.scale_w);
  args.scale_w_per_row = in.scale_w && in.scale_w->dim() == 2;
  args.row_scale = point(in.row_scale, owners.row_scale);
  return owners;
}

}  // namespace

Tensor experts_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, const std::optional<Tensor>& scale_x,
                      const std::optional<Tensor>& scale_w, const std::optional<Tensor>& row_scale,
                      std::optional<ScalarType> out_dtype) {
  constexpr OpName op = "sparse24.experts_linear";
  check_sizes(op, "x", x, 2);
  const DType dtype = check_dtype(op, "x", x, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  const int64_t rows = x.size(0), multiple = 16 / size_of(dtype);
  expect(dtype == DType::kFloat32 || x.size(1) % multiple == 0, op, "x to have a multiple of ", multiple, " columns (",
         name_of(dtype), "), got ", x.size(1));
  expect(x.size(1) > 0, op, "x to have columns, got 0");
  const Inputs in{"w", w, offsets, "scale_x", scale_x, "scale_w", scale_w, row_scale};
  ExpertsProduct product = check_product(op, in, x, dtype, rows, x.size(1), rows, out_dtype);
  expect(w.size(2) == x.size(1), op, "w to have ", x.size(1), " columns (columns of x), got ", w.size(2));
  const DeviceScope scope(op, x);

  const Tensor d = new_empty(x, {rows, product.out}, to_torch(product.d_dtype));
  if (rows > 0 && product.out > 0) {
    const Owners owners = prepare(in, product, rows);
    const Tensor aligned = contiguous_aligned(x);
    product.d = d.mutable_data_ptr();
    scope.run(SPARSE24_KERNELS(experts_linear), ExpertsLinearArgs{product, aligned.const_data_ptr()});
  }
  return d;
}

Tensor experts_mm(const Tensor& values, const Tensor& meta, const Tensor& b, const Tensor& offsets,
                  const std::optional<Tensor>& scale_a, const std::optional<Tensor>& scale_b,
                  const std::optional<Tensor>& row_scale, int64_t rows, std::optional<ScalarType> out_dtype) {
  constexpr OpName op = "sparse24.experts_mm";
  check_sizes(op, "values", values, 2);
  const DType dtype =
      check_dtype(op, "values", values, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  check_sizes(op, "b", b, 3);
  const Tensor w = torch::stable::transpose(b, 1, 2);
  const Inputs in{"b", w, offsets, "scale_a", scale_a, "scale_b", scale_b, row_scale};
  expect(rows >= 0, op, "rows to be at least 0, got ", rows);
  const int64_t k = 2 * values.size(1), multiple = feature_alignment(dtype, Dim::kFeatures) / 2;
  expect(values.size(1) > 0 && values.size(1) % multiple == 0, op, "values to have a multiple of ", multiple,
         " columns (", name_of(dtype), "), got ", values.size(1));
  ExpertsProduct product = check_product(op, in, values, dtype, rows, k, values.size(0), out_dtype);
  expect(w.size(2) == k, op, "b to have ", k, " rows (K of the sparse operand), got ", w.size(2));
  expect(values.size(0) == product.experts.padded_rows(), op, "values to have ", product.experts.padded_rows(),
         " rows (padded, of ", rows, " rows and ", product.experts.count, " experts), got ", values.size(0));
  check_device(op, "meta", meta, "values", values);
  check_meta(op, meta, Operand::of(values.size(0), k, dtype, Dim::kFeatures));
  const DeviceScope scope(op, values);

  const Tensor d = new_empty(values, {rows, product.out}, to_torch(product.d_dtype));
  if (rows > 0 && product.out > 0) {
    if (dtype != DType::kFloat8E4M3 && b.is_contiguous()) product.w_major = Major::kRow;
    const Owners owners = prepare(in, product, values.size(0));
    const Tensor kept = contiguous_aligned(values), pattern = contiguous_aligned(meta);
    product.d = d.mutable_data_ptr();
    scope.run(SPARSE24_KERNELS(experts_mm),
              ExpertsMmArgs{product, kept.const_data_ptr(), pattern.const_data_ptr<uint8_t>()});
  }
  return d;
}

SPARSE24_OP(experts_linear,
            "experts_linear(Tensor x, Tensor w, Tensor offsets, Tensor? scale_x=None, Tensor? scale_w=None, "
            "Tensor? row_scale=None, *, ScalarType? out_dtype=None) -> Tensor")
SPARSE24_OP(experts_mm,
            "experts_mm(Tensor values, Tensor meta, Tensor b, Tensor offsets, Tensor? scale_a=None, "
            "Tensor? scale_b=None, Tensor? row_scale=None, *, SymInt rows, ScalarType? out_dtype=None) -> Tensor")

}  // namespace sparse24::torch_ops
