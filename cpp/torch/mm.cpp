/// @file
/// sparse24.mm. It infers the problem, brings B into a layout that is compiled, and runs.
#include "tensor.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.mm";

/// Infers the sparse operand from the shapes of its values and of b [K, N].
Operand infer_operand(const Tensor& values, const Tensor& b, DType dtype, Dim dim) {
  const int64_t b_rows = b.size(0);
  if (dim == Dim::kFeatures) {
    const Operand a = Operand::of(values.size(0), 2 * values.size(1), dtype, dim);
    const int64_t multiple = feature_alignment(dtype, dim) / 2;
    expect(values.size(1) % multiple == 0, kOp, "values to have a multiple of ", multiple, " columns (", name_of(dtype),
           ", dim=-1), got ", values.size(1));
    expect(b_rows == a.k, kOp, "b to have ", a.k, " rows (K of the sparse operand), got ", b_rows);
    return a;
  }
  // Values are [token pairs, M] in 16 bits and fp32, [M, token pairs] in fp8.
  const bool pairs_first = dtype != DType::kFloat8E4M3;
  const char *const rows = " rows (", *const columns = " columns (";
  const int64_t m = values.size(pairs_first ? 1 : 0), pairs = values.size(pairs_first ? 0 : 1);
  const int64_t m_multiple = feature_alignment(dtype, dim), padding = token_padding(dtype);
  expect(m % m_multiple == 0, kOp, "values to have a multiple of ", m_multiple, pairs_first ? columns : rows,
         name_of(dtype), ", dim=-2), got ", m);
  expect(pairs % (padding / 2) == 0, kOp, "values to have a multiple of ", padding / 2, pairs_first ? rows : columns,
         name_of(dtype), ", dim=-2), got ", pairs);
  const int64_t most = 2 * pairs, least = most == 0 ? 0 : most - padding + 1;
  expect(least <= b_rows && b_rows <= most, kOp, "b to have ", least, " to ", most,
         " rows (K of the sparse operand), got ", b_rows);
  return Operand::of(b_rows, m, dtype, dim);
}

/// B as the waist wants it; `tensor` owns the memory.
struct Dense {
  Tensor tensor;
  Major major;
  int64_t ld;
  bool interleaved;                           ///< still to be, by the product
  std::optional<Tensor> tail = std::nullopt;  ///< MmArgs::b_tail
};

/// Copies rows `first` and following of b to `major`, with a leading dimension and an address that are multiples of 16
/// bytes.
Dense copy_b(const Tensor& b, DType dtype, Major major, bool interleaved, int64_t first = 0) {
  const int64_t step = 16 / size_of(dtype), rows = b.size(0) - first;
  const int64_t outer = major == Major::kRow ? rows : b.size(1), inner = major == Major::kRow ? b.size(1) : rows;
  Tensor buffer = new_empty(b, {outer, round_up(inner, step)}, to_torch(dtype));
  Tensor target = torch::stable::narrow(buffer, 1, 0, inner);
  if (major == Major::kColumn) target = torch::stable::transpose(target, 0, 1);
  copy_rows(target, b, interleaved, first);
  return {buffer, major, round_up(inner, step), false};
}

/// Tells whether dimension `inner` of b has stride 1 and lines along it do not overlap.
bool is_major(const Tensor& b, int64_t inner) {
  const int64_t outer = 1 - inner;
  return (b.size(inner) <= 1 || b.stride(inner) == 1) && (b.size(outer) <= 1 || b.stride(outer) >= b.size(inner));
}

/// Returns b without a copy where its layout has a kernel. Copies are in the order of the product.
Dense prepare_b(const Tensor& b, const Operand& a, bool interleaved) {
  const bool row = is_major(b, 1), column = is_major(b, 0);
  if (a.dtype == DType::kFloat8E4M3) {
    // No fp8 kernel interleaves.
    if (!column || (interleaved && b.is_cuda())) return copy_b(b, a.dtype, Major::kColumn, interleaved);
  } else {
    // One combination has no kernels on the GPU: a K-major B for a sparse operand that is itself M-major.
    const bool missing = b.is_cuda() && a.m_contiguous() && !row;
    if (missing || (!row && !column)) return copy_b(b, a.dtype, Major::kRow, interleaved);
  }
  // A single line may count as either; along it there is nothing to pad.
  const bool line_of_k = column && b.size(1) == 1 && !(b.is_cuda() && a.m_contiguous());
  const Major major = row && a.dtype != DType::kFloat8E4M3 && !line_of_k ? Major::kRow : Major::kColumn;
  const int64_t inner = major == Major::kRow ? 1 : 0, step = 16 / size_of(a.dtype);
  const int64_t ld = b.size(1 - inner) <= 1 ? round_up(b.size(inner), step) : b.stride(1 - inner);
  if (b.is_cuda() && (ld % step != 0 || !is_aligned(b))) return copy_b(b, a.dtype, major, interleaved);
  Dense as_it_is{b, major, ld, interleaved};
  if (b.is_cuda() && interleaved && a.k % 4 != 0) {
    as_it_is.tail = copy_b(b, a.dtype, Major::kRow, true, first_of_tail(a.k, meta_atom_k(a.dtype))).tensor;
  }
  return as_it_is;
}

ScalarType default_out_dtype(DType values) {
  return values == DType::kFloat8E4M3 ? ScalarType::BFloat16 : to_torch(values);
}

DType check_out_dtype(ScalarType out) {
  if (out == ScalarType::BFloat16) return DType::kBFloat16;
  if (out == ScalarType::Half) return DType::kFloat16;
  expect(out == ScalarType::Float, kOp, "out_dtype to be bfloat16, float16 or float32, got ", dtype_text(out));
  return DType::kFloat32;
}

DType check_bias(const Tensor& bias, int64_t n, ScalarType out, const Tensor& values) {
  check_device(kOp, "bias", bias, "values", values);
  const ScalarType dtype = bias.scalar_type();
  expect(dtype == out || dtype == ScalarType::Float, kOp, "bias to be ", dtype_text(out),
         out == ScalarType::Float ? "" : " (out_dtype) or float32", ", got ", dtype_text(dtype));
  check_sizes(kOp, "bias", bias, 1);
  expect(bias.size(0) == n, kOp, "bias to have ", n, " elements (N), got ", bias.size(0));
  return check_out_dtype(dtype);
}

/// Fills the product over nothing: bias or zero.
void fill_without_k(Tensor& d, const std::optional<Tensor>& bias, bool transpose_out) {
  if (!bias) {
    torch::stable::zero_(d);
    return;
  }
  torch::stable::copy_(d, torch::stable::unsqueeze(*bias, transpose_out ? 1 : 0));
}

}  // namespace

Tensor mm(const Tensor& values, const Tensor& meta, const Tensor& b, const std::optional<Tensor>& scale_a,
          const std::optional<Tensor>& scale_b, const std::optional<Tensor>& bias, int64_t dim,
          std::optional<ScalarType> out_dtype, bool transpose_out, bool interleaved) {
  MmArgs args{};
  const Dim parsed_dim = parse_dim(kOp, dim);
  expect(!interleaved || parsed_dim == Dim::kTokens, kOp, "dim to be -2 with interleaved=True, got ", dim);
  check_sizes(kOp, "values", values, 2);
  const DType dtype =
      check_dtype(kOp, "values", values, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  check_device(kOp, "meta", meta, "values", values);
  check_device(kOp, "b", b, "values", values);
  check_sizes(kOp, "b", b, 2);
  expect(b.scalar_type() == values.scalar_type(), kOp, "b to be ", name_of(dtype), " (the dtype of values), got ",
         dtype_text(b.scalar_type()));
  args.a = infer_operand(values, b, dtype, parsed_dim);
  args.n = b.size(1);
  check_meta(kOp, meta, args.a);
  if (dtype == DType::kFloat8E4M3) {
    expect(b.size(0) <= 1 || b.size(1) == 0 || b.stride(0) == 1, kOp,
           "b to be K-major for float8_e4m3fn (stride 1 along dim 0, as w.t() of a contiguous w), got strides ",
           Strides{b});
  }
  if (scale_a) {
    check_device(kOp, "scale_a", *scale_a, "values", values);
    check_scale(kOp, "scale_a", *scale_a, args.a.m, true, "rows of the sparse operand");
  }
  if (scale_b) {
    check_device(kOp, "scale_b", *scale_b, "values", values);
    check_scale(kOp, "scale_b", *scale_b, args.n, true, "columns of b");
  }
  const ScalarType out = out_dtype.value_or(default_out_dtype(dtype));
  args.d_dtype = check_out_dtype(out);
  if (bias) args.bias_dtype = check_bias(*bias, args.n, out, values);
  const DeviceScope scope(kOp, values);

  Tensor d = transpose_out ? new_empty(values, {args.n, args.a.m}, out) : new_empty(values, {args.a.m, args.n}, out);
  if (args.a.m == 0 || args.n == 0) return d;
  if (args.a.k == 0) {
    fill_without_k(d, bias, transpose_out);
    return d;
  }

  const Tensor kept = contiguous_aligned(values), pattern = contiguous_aligned(meta);
  const Dense dense = prepare_b(b, args.a, interleaved);
  args.values = kept.const_data_ptr();
  args.meta = pattern.const_data_ptr<uint8_t>();
  args.b = dense.tensor.const_data_ptr();
  args.b_major = dense.major;
  args.ldb = dense.ld;
  args.b_interleaved = dense.interleaved;
  if (dense.tail) {
    args.b_tail = dense.tail->const_data_ptr();
    args.ldb_tail = dense.tail->size(1);
  }
  args.d = d.mutable_data_ptr();
  args.d_major = transpose_out ? Major::kColumn : Major::kRow;
  std::optional<Tensor> contiguous_scale_a, contiguous_scale_b, contiguous_bias;
  if (scale_a) {
    contiguous_scale_a = as_contiguous(*scale_a);
    args.scale_a = contiguous_scale_a->const_data_ptr<float>();
    args.scale_a_per_row = contiguous_scale_a->numel() == args.a.m && args.a.m != 1;
  }
  if (scale_b) {
    contiguous_scale_b = as_contiguous(*scale_b);
    args.scale_b = contiguous_scale_b->const_data_ptr<float>();
    args.scale_b_per_column = contiguous_scale_b->numel() == args.n && args.n != 1;
  }
  if (bias) {
    contiguous_bias = as_contiguous(*bias);
    args.bias = contiguous_bias->const_data_ptr();
  }
  const MmPlan plan = values.is_cuda() ? cuda::plan_mm(args) : MmPlan{};
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = new_empty(values, {plan.workspace_bytes / 4}, ScalarType::Float);
    args.workspace = workspace->mutable_data_ptr<float>();
  }
  const auto by_plan = [&](const MmArgs& a, cudaStream_t stream) { cuda::mm(a, plan, stream); };
  scope.run(cpu::mm, by_plan, args);
  return d;
}

SPARSE24_OP(
    mm,
    "mm(Tensor values, Tensor meta, Tensor b, Tensor? scale_a=None, Tensor? scale_b=None, Tensor? bias=None, *, "
    "int dim=-1, ScalarType? out_dtype=None, bool transpose_out=False, bool interleaved=False) -> Tensor")

}  // namespace sparse24::torch_ops
