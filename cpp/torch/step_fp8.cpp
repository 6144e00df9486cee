/// @file
/// The parts of a float8 training step that step_fp8.h declares.
#include "step_fp8.h"

#include <array>

namespace sparse24::torch_ops {
namespace {

/// What small matrices take together at most, and what each begins at a multiple of: bytes.
constexpr int64_t kSmall = int64_t{32} << 20, kBetween = 256;

/// Calls an op of torch that the stable ABI has no function of, which returns a tensor.
template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor cast(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

float value_of(const Tensor& scale) { return *scale.const_data_ptr<float>(); }

/// sum * scale_x * scale_w + bias, one rounding each, of a contiguous matrix on the CPU.
void scale_and_add(Tensor& sum, float scale_x, float scale_w, const std::optional<Tensor>& bias) {
  const int64_t columns = sum.size(1);
  auto* at = static_cast<float*>(sum.mutable_data_ptr());
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  for (int64_t i = 0; i < sum.numel(); ++i) {
    const float scaled = at[i] * scale_x * scale_w;
    at[i] = added ? scaled + added[i % columns] : scaled;
  }
}

/// The transpose of a contiguous matrix.
Tensor turned(const Tensor& t) { return view_of(t, {t.size(1), t.size(0)}, {1, t.size(1)}); }

}  // namespace

Tensor view_of(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               int64_t offset) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                        strides.begin(), offset, &made));
  return Tensor(made);
}

CodeMemory::CodeMemory(const Tensor& like, std::initializer_list<int64_t> sizes) : like_(like) {
  int64_t bytes = 0;
  for (int64_t size : sizes) bytes += round_up(size, kBetween);
  if (like.is_cuda() && bytes <= kSmall) shared_ = new_empty(like, {bytes}, ScalarType::Float8_e4m3fn);
}

Tensor CodeMemory::take(int64_t rows, int64_t columns) {
  if (!shared_) return new_empty(like_, {rows, columns}, ScalarType::Float8_e4m3fn);
  const int64_t at = taken_;
  taken_ += round_up(rows * columns, kBetween);
  return view_of(*shared_, {rows, columns}, {columns, 1}, at);
}

int64_t padded(int64_t rows) { return round_up(rows, token_padding(DType::kFloat8E4M3)); }

Tensor new_transposed(const Tensor& x) {
  return new_empty(x, {x.size(1), padded(x.size(0))}, ScalarType::Float8_e4m3fn);
}

void quantize_both(const DeviceScope& scope, const ToQuantize& what, const Tensor& codes, const Tensor& transposed) {
  const Tensor source = contiguous_aligned(what.x);
  QuantizeBothArgs args{};
  args.x = source.const_data_ptr();
  args.x_dtype = what.dtype;
  args.rows = what.x.size(0);
  args.cols = what.x.size(1);
  args.interleaved = what.interleaved;
  args.q = codes.mutable_data_ptr();
  args.qt = transposed.mutable_data_ptr();
  args.given_scale = what.given;
  args.scale = what.scale;
  args.amax = what.largest;
  scope.run(SPARSE24_KERNELS(quantize_fp8_both), args);
}

Tensor multiply(const DeviceScope& scope, const SparseProduct& product, DType dtype, bool transposed) {
  MmArgs args{};
  args.a = product.a;
  args.n = product.b.size(0);
  const int64_t m = args.a.m, n = args.n;
  Tensor d = transposed ? new_empty(product.b, {n, m}, to_torch(dtype)) : new_empty(product.b, {m, n}, to_torch(dtype));
  args.values = product.values;
  args.meta = product.meta;
  args.b = product.b.const_data_ptr();
  args.b_major = Major::kColumn;
  args.ldb = product.b.size(1);
  args.d = d.mutable_data_ptr();
  args.d_dtype = dtype;
  args.d_major = transposed ? Major::kColumn : Major::kRow;
  args.scale_a = product.scale_a;
  args.scale_b = product.scale_b;
  args.bias = product.bias;
  args.bias_dtype = product.bias_dtype;
  const MmPlan plan = d.is_cuda() ? cuda::plan_mm(args) : MmPlan{};
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = new_empty(d, {plan.workspace_bytes / 4}, ScalarType::Float);
    args.workspace = static_cast<float*>(workspace->mutable_data_ptr());
  }
  const auto by_plan = [&](const MmArgs& a, cudaStream_t stream) { cuda::mm(a, plan, stream); };
  scope.run(cpu::mm, by_plan, args);
  return d;
}

Tensor multiply_dense(const Tensor& x, const Tensor& scale_x, const Tensor& w, const Tensor& scale_w,
                      const std::optional<Tensor>& bias, ScalarType dtype) {
  constexpr ScalarType bfloat16 = ScalarType::BFloat16;
  std::optional<Tensor> rounded;
  if (bias) rounded = contiguous_aligned(cast(*bias, bfloat16));
  const Tensor left = contiguous_aligned(x), right = contiguous_aligned(w);
  if (x.is_cuda()) {
    const std::optional<Tensor> no_scale;
    const std::optional<ScalarType> out(bfloat16);
    const Tensor product =
        call("aten::_scaled_mm", "", left, turned(right), scale_x, scale_w, rounded, no_scale, out, true);
    return cast(product, dtype);
  }
  // Into memory that is there: autocast changes no such product.
  Tensor sum = new_empty(x, {left.size(0), right.size(0)}, ScalarType::Float);
  call("aten::mm", "out", cast(left, ScalarType::Float), turned(cast(right, ScalarType::Float)), sum);
  if (rounded) rounded = cast(*rounded, ScalarType::Float);
  scale_and_add(sum, value_of(scale_x), value_of(scale_w), rounded);
  return cast(cast(sum, bfloat16), dtype);
}

}  // namespace sparse24::torch_ops
