/// @file
/// The products that step_fp8_gradients.h declares.
#include "step_fp8_gradients.h"

#include <utility>

namespace sparse24::torch_ops {
namespace {

constexpr DType kFp8 = DType::kFloat8E4M3;

/// Stands for a result that is not wanted.
Tensor without_rows(const StepBackward& step, int64_t columns, ScalarType dtype) {
  return new_empty(step.saved.values, {0, columns}, dtype);
}

template <class Args>
void describe(const StepBackward& step, Args& args) {
  const StepPlaces& places = step.places;
  args.tokens = step.sizes.tokens;
  args.in = args.ld_grad = step.sizes.out;
  args.features = step.sizes.features;
  const StepPlaces& seen = step.scratch.seen;
  args.scale_grad = seen.scale(StepScale::kGrad);
  args.scale_w = places.scale(StepScale::kW2);
  args.scale_y = places.scale(StepScale::kY);
  args.scale_dh = places.scale(StepScale::kDh);
  args.amax = seen.largest(StepScale::kDh);
  args.saturated = seen.saturated(StepScale::kDh);
  args.y = step.saved.values.const_data_ptr();
}

Tensor without_padding(const Tensor& codes, int64_t columns) {
  if (codes.size(1) == columns) return codes;
  return contiguous_aligned(torch::stable::narrow(const_cast<Tensor&>(codes), 1, 0, columns));
}

/// Whether dx [tokens, in] is smaller than dw1 [features, in]. The smallest result is the first one, which lies beside
/// all forms of y and dh; each frees one of them.
bool is_dx_smallest(const StepSizes& s) { return s.tokens < s.features; }

/// Writes rows of a product over tokens, or columns, where they belong.
void put(const StepBackward& step, Tensor& out, const Tensor& parts, const DenseFeatures& dense, bool columns) {
  PutFeaturesArgs args{};
  args.rows = out.size(0);
  args.columns = out.size(1);
  args.out = out.mutable_data_ptr();
  args.dtype = step.sizes.dtype;
  args.by_columns = columns;
  args.parts = parts.const_data_ptr();
  args.part_count = 1;
  args.features = dense.indices;
  args.count = dense.count;
  step.scope.run(SPARSE24_KERNELS(put_features), args);
}

/// y or dh along tokens, values and metadata.
struct AlongTokens {
  Operand a;
  Tensor memory;

  AlongTokens(const StepSizes& s, CodeMemory& codes) : a(operand(s)), memory(codes.take(1, bytes(s))) {}
  void* values() const { return memory.mutable_data_ptr(); }
  uint8_t* meta() const { return static_cast<uint8_t*>(values()) + values_bytes(a); }

  static int64_t bytes(const StepSizes& s) { return values_bytes(operand(s)) + operand(s).meta_bytes(); }

 private:
  static Operand operand(const StepSizes& s) { return Operand::of(s.padded, s.features, kFp8, Dim::kTokens); }
  static int64_t values_bytes(const Operand& a) { return round_up(a.values_rows() * a.values_cols(), 256); }
};

/// Makes dh: a result, or memory of the pass.
Tensor new_dh(const StepBackward& step, int64_t columns) {
  return step.need_dh ? new_empty(step.saved.values, {step.sizes.tokens, columns}, ScalarType::Float8_e4m3fn)
                      : step.memory.take(step.sizes.tokens, columns);
}

/// What the product with w2 leaves to the others; dh and y of the dense features beside it, [count, padded tokens].
struct Hidden {
  Tensor dh, dense_dh, dense_y;
  std::optional<AlongTokens> dh_tokens, y_tokens;
};

/// Computes dh, and dh and y along tokens; frees the codes of grad along rows.
Hidden differentiate(const StepBackward& step, const DenseFeatures& dense, OfOutput& grad) {
  const StepSizes& s = step.sizes;
  LinearGradientFp8Args args{};
  describe(step, args);
  args.interleaved = step.interleaved;
  const Tensor codes = *std::exchange(grad.codes, std::nullopt), w2 = without_padding(step.saved.w2, s.out);
  const Fp8ProductOwners owners = prepare_fp8_product(codes, w2, args);
  const auto new_rows = [&] {  // zeros behind the last token, which no tile of the kernel need reach
    return s.padded == s.tokens ? new_empty(codes, {dense.count, s.padded}, ScalarType::Float8_e4m3fn)
                                : new_zeros(codes, {dense.count, s.padded}, ScalarType::Float8_e4m3fn);
  };
  Hidden made{new_dh(step, s.features / 2), new_rows(), new_rows(), AlongTokens(s, step.memory),
              AlongTokens(s, step.memory)};
  args.meta = step.saved.meta.const_data_ptr<uint8_t>();
  args.dh = made.dh.mutable_data_ptr();
  args.dh_tokens = {made.dh_tokens->values(), made.dh_tokens->meta()};
  args.y_tokens = {made.y_tokens->values(), made.y_tokens->meta()};
  if (dense.count > 0) {
    args.hot = dense.indices;
    args.hot_count = dense.count;
    args.hot_slots = step.scratch.slots;
    args.y_hot = made.dense_y.mutable_data_ptr();
    args.dh_hot = made.dense_dh.mutable_data_ptr();
  }
  step.scope.run(SPARSE24_KERNELS(linear_gradient_fp8), args);
  return made;
}

/// Multiplies what lies along tokens with b, and frees it.
Tensor multiply_tokens(const StepBackward& step, std::optional<AlongTokens>& kept, StepScale of, const Tensor& b,
                       const float* scale_b, bool transposed) {
  const AlongTokens a = *std::exchange(kept, std::nullopt);
  return multiply(step.scope, {a.a, a.values(), a.meta(), b, step.places.scale(of), scale_b}, step.sizes.dtype,
                  transposed);
}

}  // namespace

StepGradients sparse_gradients(const StepBackward& step, const DenseFeatures& dense, OfOutput& grad) {
  const StepSizes& s = step.sizes;
  const StepSaved& saved = step.saved;
  const StepPlaces& places = step.places;
  const ScalarType dtype = to_torch(s.dtype);
  Hidden hidden = differentiate(step, dense, grad);
  std::optional<Tensor> dx;
  const auto find_dx = [&] {
    const Operand a = Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures);
    dx = step.need_x ? multiply(step.scope,
                                {a, hidden.dh.const_data_ptr(), saved.meta.const_data_ptr<uint8_t>(), saved.w1,
                                 places.scale(StepScale::kDh), places.scale(StepScale::kW1)},
                                s.dtype)
                     : without_rows(step, s.in, dtype);
    if (!step.need_dh) hidden.dh = without_rows(step, s.features / 2, ScalarType::Float8_e4m3fn);
  };
  if (is_dx_smallest(s)) find_dx();
  Tensor dw1 = multiply_tokens(step, hidden.dh_tokens, StepScale::kDh, saved.x, places.scale(StepScale::kUsedX), false);
  Tensor dw2 = multiply_tokens(step, hidden.y_tokens, StepScale::kY, grad.transposed,
                               step.scratch.seen.scale(StepScale::kGrad), true);
  if (!dx) find_dx();
  if (dense.count > 0) {
    const Tensor of_dh = places.one(StepScale::kDh), of_y = places.one(StepScale::kY);
    put(step, dw1, multiply_dense(hidden.dense_dh, of_dh, saved.x, places.one(StepScale::kUsedX), {}, dtype), dense,
        false);
    put(step, dw2,
        multiply_dense(grad.transposed, step.scratch.seen.one(StepScale::kGrad), hidden.dense_y, of_y, {}, dtype),
        dense, true);
  }
  return {*dx, dw1, dw2, hidden.dh};
}

StepGradients dense_gradients(const StepBackward& step, OfOutput& grad) {
  const StepSizes& s = step.sizes;
  const StepSaved& saved = step.saved;
  const StepPlaces& places = step.places;
  const ScalarType dtype = to_torch(s.dtype);
  Tensor dh = new_dh(step, s.features);
  std::optional<Tensor> dh_transposed = step.memory.take(s.features, s.padded),
                        y_transposed = step.memory.take(s.features, s.padded);
  const auto differentiate = [&] {
    LinearRelu2GradientFp8Args args{};
    describe(step, args);
    const Tensor codes = *std::exchange(grad.codes, std::nullopt), w2 = without_padding(saved.w2, s.out);
    const Fp8ProductOwners owners = prepare_fp8_product(codes, w2, args);
    args.dh = dh.mutable_data_ptr();
    args.y_transposed = y_transposed->mutable_data_ptr();
    args.dh_transposed = dh_transposed->mutable_data_ptr();
    step.scope.run(SPARSE24_KERNELS(linear_relu2_gradient_fp8), args);
  };
  differentiate();

  const Tensor of_dh = places.one(StepScale::kDh), of_y = places.one(StepScale::kY);
  std::optional<Tensor> dx;
  const auto find_dx = [&] {
    dx = step.need_x
             ? multiply_dense(dh, of_dh, without_padding(saved.w1, s.features), places.one(StepScale::kW1), {}, dtype)
             : without_rows(step, s.in, dtype);
    if (!step.need_dh) dh = without_rows(step, s.features, ScalarType::Float8_e4m3fn);
  };
  if (is_dx_smallest(s)) find_dx();
  const Tensor dw1 = multiply_dense(*dh_transposed, of_dh, saved.x, places.one(StepScale::kUsedX), {}, dtype);
  dh_transposed.reset();
  const Tensor dw2 =
      multiply_dense(grad.transposed, step.scratch.seen.one(StepScale::kGrad), *y_transposed, of_y, {}, dtype);
  y_transposed.reset();
  if (!dx) find_dx();
  return {*dx, dw1, dw2, dh};
}

StepCodes::StepCodes(const StepSizes& s, bool sparse, bool need_dh)
    : dh(need_dh ? 0 : s.tokens * (sparse ? s.features / 2 : s.features)),
      dh_tokens(sparse ? AlongTokens::bytes(s) : s.features * s.padded),
      y_tokens(dh_tokens) {}

StepGradients gradients_of_nothing(const StepBackward& step) {
  const StepSizes& s = step.sizes;
  const ScalarType dtype = to_torch(s.dtype);
  const Tensor& like = step.saved.values;
  return {without_rows(step, s.in, dtype), new_zeros(like, {s.features, s.in}, dtype),
          new_zeros(like, {s.out, s.features}, dtype),
          without_rows(step, step.saved.sparse ? s.features / 2 : s.features, ScalarType::Float8_e4m3fn)};
}

}  // namespace sparse24::torch_ops
