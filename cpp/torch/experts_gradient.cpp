/// @file
/// sparse24.experts_linear_gradient: what the backward pass of all experts makes of their 2:4 activation, and
/// sparse24.experts_weight_gradient: products over the rows of each.
#include "experts.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.experts_linear_gradient";

/// The tensors of the op.
struct Inputs {
  const Tensor& grad;
  const Tensor& w;
  const Tensor& values;
  const Tensor& meta;
  const Tensor& offsets;
  const std::optional<Tensor>& row_scale;
  const std::optional<Tensor>& scale_grad;
  const std::optional<Tensor>& scale_w;
  const std::optional<Tensor>& scale_y;
};

void check_scales(const Inputs& in, const ExpertsLinearGradientArgs& args, int64_t padded) {
  const int64_t rows = args.experts.rows;
  if (in.row_scale) {
    check_device(kOp, "row_scale", *in.row_scale, "grad", in.grad);
    check_scale(kOp, "row_scale", *in.row_scale, rows, false, "rows of grad");
  }
  expect(args.dtype == DType::kFloat8E4M3 || !(in.scale_grad || in.scale_w || in.scale_y), kOp,
         "scales of the operands to be None without float8, got a tensor");
  if (in.scale_grad) {
    check_device(kOp, "scale_grad", *in.scale_grad, "grad", in.grad);
    check_scale(kOp, "scale_grad", *in.scale_grad, rows, true, "rows of grad");
  }
  check_weight_scale(kOp, "scale_w", in.scale_w, args.experts.count, args.features, in.grad);
  if (in.scale_y) {
    check_device(kOp, "scale_y", *in.scale_y, "grad", in.grad);
    check_scale(kOp, "scale_y", *in.scale_y, padded, false, "rows of values");
  }
}

ExpertsLinearGradientArgs check_inputs(const Inputs& in) {
  ExpertsLinearGradientArgs args{};
  check_sizes(kOp, "grad", in.grad, 2);
  args.dtype =
      check_dtype(kOp, "grad", in.grad, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  const int64_t rows = in.grad.size(0);
  args.in = in.grad.size(1);
  args.experts = check_experts(kOp, in.offsets, "w", in.w, in.grad, rows);
  expect(in.w.scalar_type() == in.grad.scalar_type(), kOp, "w to be ", name_of(args.dtype),
         " (the dtype of grad), got ", dtype_text(in.w.scalar_type()));
  expect(in.w.size(1) == args.in, kOp, "w to have ", args.in, " rows (columns of grad), got ", in.w.size(1));
  expect(args.in > 0, kOp, "grad to have columns, got 0");
  const int64_t step = 16 / size_of(args.dtype);
  expect(args.dtype == DType::kFloat32 || args.in % step == 0, kOp, "grad to have a multiple of ", step, " columns (",
         name_of(args.dtype), "), got ", args.in);
  args.features = in.w.size(2);
  const int64_t multiple = feature_alignment(args.dtype, Dim::kFeatures), padded = args.experts.padded_rows();
  expect(args.features % multiple == 0, kOp, "w to have a multiple of ", multiple, " columns (", name_of(args.dtype),
         "), got ", args.features);
  check_device(kOp, "values", in.values, "grad", in.grad);
  check_sizes(kOp, "values", in.values, 2);
  expect(in.values.scalar_type() == in.grad.scalar_type(), kOp, "values to be ", name_of(args.dtype),
         " (the dtype of grad), got ", dtype_text(in.values.scalar_type()));
  expect(in.values.size(0) == padded, kOp, "values to have ", padded, " rows (padded, of ", rows, " rows and ",
         args.experts.count, " experts), got ", in.values.size(0));
  expect(in.values.size(1) == args.features / 2, kOp, "values to have ", args.features / 2,
         " columns (half the columns of w), got ", in.values.size(1));
  check_device(kOp, "meta", in.meta, "grad", in.grad);
  check_meta(kOp, in.meta, Operand::of(padded, args.features, args.dtype, Dim::kFeatures));
  check_scales(in, args, padded);
  return args;
}

/// What owns the memory that the arguments point to.
struct Owners {
  Tensor grad, w, values, meta, offsets;
  std::optional<Tensor> row_scale, scale_grad, scale_w, scale_y;
};

const float* point(const std::optional<Tensor>& given, std::optional<Tensor>& owner) {
  if (!given) return nullptr;
  owner = as_contiguous(*given);
  return owner->const_data_ptr<float>();
}

Owners prepare(const Inputs& in, ExpertsLinearGradientArgs& args) {
  const bool fp8 = args.dtype == DType::kFloat8E4M3;
  Owners owners{contiguous_aligned(in.grad),
                contiguous_aligned(fp8 ? torch::stable::transpose(in.w, 1, 2) : in.w),
                contiguous_aligned(in.values),
                contiguous_aligned(in.meta),
                as_contiguous(in.offsets),
                {},
                {},
                {},
                {}};
  args.experts.offsets = owners.offsets.const_data_ptr<int32_t>();
  args.grad = owners.grad.const_data_ptr();
  args.w = owners.w.const_data_ptr();
  args.values = owners.values.const_data_ptr();
  args.meta = owners.meta.const_data_ptr<uint8_t>();
  args.row_scale = point(in.row_scale, owners.row_scale);
  args.scale_grad = point(in.scale_grad, owners.scale_grad);
  args.scale_grad_per_row = in.scale_grad && is_per_row_of(*in.scale_grad, args.experts.rows);
  args.scale_w = point(in.scale_w, owners.scale_w);
  args.scale_w_per_row = in.scale_w && in.scale_w->dim() == 2;
  args.scale_y = point(in.scale_y, owners.scale_y);
  return owners;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_linear_gradient(
    const Tensor& grad, const Tensor& w, const Tensor& values, const Tensor& meta, const Tensor& offsets,
    const std::optional<Tensor>& row_scale, const std::optional<Tensor>& scale_grad,
    const std::optional<Tensor>& scale_w, const std::optional<Tensor>& scale_y, bool dense) {
  const Inputs in{grad, w, values, meta, offsets, row_scale, scale_grad, scale_w, scale_y};
  ExpertsLinearGradientArgs args = check_inputs(in);
  const DeviceScope scope(kOp, grad);
  const ScalarType dtype = to_torch(args.result());
  const int64_t rows = args.experts.rows;
  // On CUDA padding is not written, nor rows of no expert; on the CPU they are zeros, so that two calls return the
  // same.
  const Tensor dh = grad.is_cuda() ? new_empty(grad, {values.size(0), values.size(1)}, dtype)
                                   : new_zeros(grad, {values.size(0), values.size(1)}, dtype);
  const Tensor dh_dense = new_empty(grad, {dense ? rows : 0, args.features}, dtype);
  const Tensor y_dense = new_empty(grad, {dense ? rows : 0, args.features}, dtype);
  if (rows == 0 || args.features == 0) return {dh, dh_dense, y_dense, new_zeros(grad, {rows}, ScalarType::Float)};

  const Owners owners = prepare(in, args);
  const int64_t parts = grad.is_cuda() ? ExpertsLinearGradientArgs::product_parts(args.features) : 1;
  const Tensor products = new_empty(grad, {parts, rows}, ScalarType::Float);
  args.dh = dh.mutable_data_ptr();
  args.dh_dense = dense ? dh_dense.mutable_data_ptr() : nullptr;
  args.y_dense = dense ? y_dense.mutable_data_ptr() : nullptr;
  args.products = products.mutable_data_ptr<float>();
  scope.run(SPARSE24_KERNELS(experts_linear_gradient), args);
  constexpr int64_t kParts[] = {0};
  return {dh, dh_dense, y_dense, torch::stable::sum(products, kParts)};
}

SPARSE24_OP(experts_linear_gradient,
            "experts_linear_gradient(Tensor grad, Tensor w, Tensor values, Tensor meta, Tensor offsets, "
            "Tensor? row_scale=None, Tensor? scale_grad=None, Tensor? scale_w=None, Tensor? scale_y=None, *, "
            "bool dense=True) -> (Tensor dh_values, Tensor dh, Tensor y, Tensor products)")

Tensor experts_weight_gradient(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  constexpr OpName kName = "sparse24.experts_weight_gradient";
  ExpertsWeightGradientArgs args{};
  check_sizes(kName, "a", a, 2);
  args.dtype = check_dtype(kName, "a", a, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  check_device(kName, "b", b, "a", a);
  check_sizes(kName, "b", b, 2);
  expect(b.scalar_type() == a.scalar_type(), kName, "b to be ", name_of(args.dtype), " (the dtype of a), got ",
         dtype_text(b.scalar_type()));
  const int64_t rows = a.size(0);
  expect(b.size(0) == rows, kName, "b to have ", rows, " rows (those of a), got ", b.size(0));
  args.experts = check_offsets(kName, offsets, a, rows);
  args.m = a.size(1);
  args.n = b.size(1);
  expect(args.m % 8 == 0, kName, "a to have a multiple of 8 columns, got ", args.m);
  expect(args.n % 8 == 0, kName, "b to have a multiple of 8 columns, got ", args.n);

  const DeviceScope scope(kName, a);
  if (rows == 0) return new_zeros(a, {args.experts.count, args.m, args.n}, a.scalar_type());
  const Tensor d = new_empty(a, {args.experts.count, args.m, args.n}, a.scalar_type());
  if (args.m == 0 || args.n == 0) return d;
  const Tensor of_a = contiguous_aligned(a), of_b = contiguous_aligned(b), ends = as_contiguous(offsets);
  args.experts.offsets = ends.const_data_ptr<int32_t>();
  args.a = of_a.const_data_ptr();
  args.b = of_b.const_data_ptr();
  args.d = d.mutable_data_ptr();
  scope.run(SPARSE24_KERNELS(experts_weight_gradient), args);
  return d;
}

SPARSE24_OP(experts_weight_gradient, "experts_weight_gradient(Tensor a, Tensor b, Tensor offsets) -> Tensor")

}  // namespace sparse24::torch_ops
