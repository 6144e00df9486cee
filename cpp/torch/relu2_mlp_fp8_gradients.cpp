/// @file
/// sparse24.relu2_mlp_fp8_gradients: the backward pass of a training step in float8, in one call, and the scales of the
/// next step.
#include <algorithm>

#include "step_fp8.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.relu2_mlp_fp8_gradients";
constexpr DType kFp8 = DType::kFloat8E4M3;
/// Tokens that are counted to find the densest features, as `feature_counts` of Python does.
constexpr int64_t kSamples = 1024;

/// What the forward pass has saved, and what is asked for.
struct Saved {
  const Tensor &x, &w1, &w2, &values, &meta;  ///< x and the weights transposed
  bool sparse;
};

/// What kernels can read where it lies: copied where it can't be.
Tensor in_place(const char* argument, const Tensor& t) {
  check_defined(kOp, argument, t);
  return contiguous_aligned(t);
}

struct Sizes {
  int64_t tokens, in, features, out, padded;
  DType dtype;  ///< of grad and the results
};

void check_codes(const char* argument, const Tensor& t, const Tensor& grad, int64_t rows, int64_t columns,
                 const char* meaning) {
  check_fp8_beside(kOp, argument, t, grad);
  expect((rows < 0 || t.size(0) == rows) && t.size(1) == columns, kOp, argument, " to have shape ", meaning, ", got ",
         Shape{t});
}

Sizes check(const Tensor& grad, const Saved& saved, const StepPlaces& places, const Tensor& scales) {
  constexpr int64_t padding = token_padding(kFp8);
  check_sizes(kOp, "grad", grad, 2);
  Sizes s{grad.size(0), 0, 0, grad.size(1), round_up(grad.size(0), padding), {}};
  s.dtype = check_dtype(kOp, "grad", grad, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  expect(s.out > 0 && s.out % 16 == 0, kOp, "grad to have a multiple of 16 columns above 0, got ", s.out);
  check_codes("x_transposed", saved.x, grad, -1, s.padded, "[D, T] with T padded to a multiple of 32");
  s.in = saved.x.size(0);
  check_codes("w2_transposed", saved.w2, grad, -1, round_up(s.out, padding), "[F, columns of grad, padded]");
  s.features = saved.w2.size(0);
  const int64_t multiple = saved.sparse ? feature_alignment(kFp8, Dim::kFeatures) : 16;
  expect(s.features > 0 && s.features % multiple == 0, kOp, "w2_transposed to have a multiple of ", multiple,
         " rows above 0, got ", s.features);
  check_codes("w1_transposed", saved.w1, grad, s.in, round_up(s.features, padding), "[D, F] with F padded");
  check_codes("values", saved.values, grad, s.tokens, saved.sparse ? s.features / 2 : s.features,
              saved.sparse ? "[T, F / 2]" : "[T, F] (sparse=False)");
  check_device(kOp, "meta", saved.meta, "grad", grad);
  if (saved.sparse) check_meta(kOp, saved.meta, Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures));
  check_device(kOp, "places", places.tensor, "grad", grad);
  check_sizes(kOp, "places", places.tensor, 2);
  check_scale(kOp, "places", places.tensor, kStepScales * kStepScaleStride, false, "of relu2_mlp_fp8");
  check_device(kOp, "scales", scales, "grad", grad);
  check_sizes(kOp, "scales", scales, 1);
  check_scale(kOp, "scales", scales, kDelayedScales, false, "of x, y, grad and dh");
  return s;
}

/// Features of dense products come in multiples of 16, as torch multiplies float8.
void check_count(const char* argument, const char* what, int64_t count, int64_t features) {
  expect(0 <= count && count <= features && count % 16 == 0, kOp, argument, " to be a multiple of 16 ", what, " up to ",
         features, " (rows of w2_transposed), got ", count);
}

/// The gradient of the output in both orders, and its scale with what was seen of it and of dh.
struct OfOutput {
  Tensor codes, transposed;
  Tensor scale;  ///< [1], aligned
  float *scale_at, *largest, *largest_of_dh;
  int32_t* saturated_of_dh;
};

OfOutput quantize_grad(const DeviceScope& scope, const Tensor& grad, const Sizes& s, const StepPlaces& places,
                       bool interleaved) {
  Tensor seen = new_zeros(grad, {kStepScaleStride}, ScalarType::Float);
  const Tensor transposed = new_transposed(grad);
  auto* at = static_cast<float*>(seen.mutable_data_ptr());
  const Tensor codes =
      quantize_both(scope, {grad, s.dtype, interleaved, places.scale(StepScale::kGrad), at, at + 1}, transposed);
  return {codes,  transposed, torch::stable::narrow(seen, 0, 0, 1), at,
          at + 1, at + 2,     reinterpret_cast<int32_t*>(at + 3)};
}

/// Writes rows of a product over tokens, or columns, where they belong.
void put(const DeviceScope& scope, const Sizes& s, Tensor& out, const Tensor& parts, const Tensor& hot, bool columns) {
  PutFeaturesArgs args{};
  args.rows = out.size(0);
  args.columns = out.size(1);
  args.out = out.mutable_data_ptr();
  args.dtype = s.dtype;
  args.by_columns = columns;
  args.parts = parts.const_data_ptr();
  args.part_count = 1;
  args.features = hot.const_data_ptr<int64_t>();
  args.count = hot.size(0);
  scope.run(SPARSE24_KERNELS(put_features), args);
}

/// Finds the features that the most tokens of a sample use.
Tensor densest(const DeviceScope& scope, const Sizes& s, const Saved& saved, int64_t count) {
  const Tensor counts = new_empty(saved.values, {s.features}, ScalarType::Int);
  const Tensor hot = new_empty(saved.values, {count}, ScalarType::Long);
  FeatureCountsArgs args{};
  args.a = Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures);
  args.values = saved.values.const_data_ptr();
  args.meta = saved.meta.const_data_ptr<uint8_t>();
  args.meta_dtype = kFp8;
  args.samples = std::min(kSamples, s.tokens);
  args.counts = counts.mutable_data_ptr<int32_t>();
  scope.run(SPARSE24_KERNELS(feature_counts), args);
  scope.run(SPARSE24_KERNELS(densest_features),
            DensestFeaturesArgs{counts.const_data_ptr<int32_t>(), s.features, count, hot.mutable_data_ptr<int64_t>()});
  return hot;
}

template <class Args>
void point_to_scales(Args& args, const StepPlaces& places, const OfOutput& grad) {
  args.scale_grad = grad.scale_at;
  args.scale_w = places.scale(StepScale::kW2);
  args.scale_y = places.scale(StepScale::kY);
  args.scale_dh = places.scale(StepScale::kDh);
  args.amax = grad.largest_of_dh;
  args.saturated = grad.saturated_of_dh;
}

Tensor without_padding(const Tensor& codes, int64_t columns) {
  if (codes.size(1) == columns) return codes;
  return contiguous_aligned(torch::stable::narrow(const_cast<Tensor&>(codes), 1, 0, columns));
}

struct Results {
  Tensor dx, dw1, dw2, dh;
};

/// Where the activation is 2:4.
void run_sparse(const DeviceScope& scope, const Sizes& s, const Saved& saved, const StepPlaces& places,
                const OfOutput& grad, const std::optional<Tensor>& hot, bool interleaved, bool need_x, Results& out) {
  LinearGradientFp8Args args{};
  args.tokens = s.tokens;
  args.in = args.ld_grad = s.out;
  args.features = s.features;
  args.interleaved = interleaved;
  args.hot_count = hot ? hot->size(0) : 0;
  const Tensor w2 = without_padding(saved.w2, s.out);
  const Fp8ProductOwners owners = prepare_fp8_product(grad.codes, w2, args);
  point_to_scales(args, places, grad);
  args.y = saved.values.const_data_ptr();
  args.meta = saved.meta.const_data_ptr<uint8_t>();
  args.dh = out.dh.mutable_data_ptr();

  const Operand along_features = Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures);
  const Operand along_tokens = Operand::of(s.padded, s.features, kFp8, Dim::kTokens);
  Between between;
  const int64_t kept = along_tokens.values_rows() * along_tokens.values_cols();
  const int64_t dh = between.add(kept), dh_meta = between.add(along_tokens.meta_bytes());
  const int64_t y = between.add(kept), y_meta = between.add(along_tokens.meta_bytes());
  between.allocate(grad.codes);
  args.dh_tokens = {between.at(dh), between.at<uint8_t>(dh_meta)};
  args.y_tokens = {between.at(y), between.at<uint8_t>(y_meta)};
  const auto new_rows = [&] {  // zeros behind the last token, which no tile of the kernel need reach
    return s.padded == s.tokens ? new_empty(grad.codes, {args.hot_count, s.padded}, ScalarType::Float8_e4m3fn)
                                : new_zeros(grad.codes, {args.hot_count, s.padded}, ScalarType::Float8_e4m3fn);
  };
  const Tensor y_hot = new_rows(), dh_hot = new_rows();
  const HotOwners hot_owners = prepare_hot(hot, y_hot, dh_hot, args);
  scope.run(SPARSE24_KERNELS(linear_gradient_fp8), args);

  const float *of_dh = places.scale(StepScale::kDh), *of_y = places.scale(StepScale::kY);
  if (need_x) {
    multiply(scope, {along_features, args.dh, args.meta, saved.w1, of_dh, places.scale(StepScale::kW1)}, s.dtype, false,
             out.dx);
  }
  multiply(scope,
           {along_tokens, args.dh_tokens.values, args.dh_tokens.meta, saved.x, of_dh, places.scale(StepScale::kUsedX)},
           s.dtype, false, out.dw1);
  multiply(scope, {along_tokens, args.y_tokens.values, args.y_tokens.meta, grad.transposed, of_y, grad.scale_at},
           s.dtype, /*transposed=*/true, out.dw2);
  if (args.hot_count > 0) {
    const ScalarType dtype = to_torch(s.dtype);
    put(scope, s, out.dw1,
        multiply_dense(dh_hot, places.one(StepScale::kDh), saved.x, places.one(StepScale::kUsedX), {}, dtype),
        hot_owners.hot, false);
    put(scope, s, out.dw2, multiply_dense(grad.transposed, grad.scale, y_hot, places.one(StepScale::kY), {}, dtype),
        hot_owners.hot, true);
  }
}

/// Where it is dense.
void run_dense(const DeviceScope& scope, const Sizes& s, const Saved& saved, const StepPlaces& places,
               const OfOutput& grad, bool need_x, Results& out) {
  LinearRelu2GradientFp8Args args{};
  args.tokens = s.tokens;
  args.in = args.ld_grad = s.out;
  args.features = s.features;
  const Tensor w2 = without_padding(saved.w2, s.out);
  const Fp8ProductOwners owners = prepare_fp8_product(grad.codes, w2, args);
  point_to_scales(args, places, grad);
  const Tensor y_transposed = new_transposed(saved.values), dh_transposed = new_transposed(saved.values);
  args.y = saved.values.const_data_ptr();
  args.dh = out.dh.mutable_data_ptr();
  args.y_transposed = y_transposed.mutable_data_ptr();
  args.dh_transposed = dh_transposed.mutable_data_ptr();
  scope.run(SPARSE24_KERNELS(linear_relu2_gradient_fp8), args);

  const ScalarType dtype = to_torch(s.dtype);
  const Tensor of_dh = places.one(StepScale::kDh);
  if (need_x) {
    out.dx =
        multiply_dense(out.dh, of_dh, without_padding(saved.w1, s.features), places.one(StepScale::kW1), {}, dtype);
  }
  out.dw1 = multiply_dense(dh_transposed, of_dh, saved.x, places.one(StepScale::kUsedX), {}, dtype);
  out.dw2 = multiply_dense(grad.transposed, grad.scale, y_transposed, places.one(StepScale::kY), {}, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> relu2_mlp_fp8_gradients(
    const Tensor& grad, const Tensor& x_transposed, const Tensor& w1_transposed, const Tensor& w2_transposed,
    const Tensor& values, const Tensor& meta, const Tensor& places_of_step, const Tensor& scales,
    const std::optional<Tensor>& hot, int64_t dense_features, bool sparse, bool interleaved, bool need_x) {
  const Tensor kept[] = {in_place("x_transposed", x_transposed), in_place("w1_transposed", w1_transposed),
                         in_place("w2_transposed", w2_transposed), in_place("values", values), in_place("meta", meta)};
  const Saved saved{kept[0], kept[1], kept[2], kept[3], kept[4], sparse};
  const StepPlaces places(in_place("places", places_of_step));
  const Sizes s = check(grad, saved, places, scales);
  if (hot) check_count("hot", "elements", check_hot(kOp, *hot, grad, s.features, "rows of w2_transposed"), s.features);
  check_count("dense_features", "in number", dense_features, s.features);
  const DeviceScope scope(kOp, grad);

  const OfOutput of_output = quantize_grad(scope, grad, s, places, sparse && interleaved);
  const ScalarType dtype = grad.scalar_type();
  const int64_t columns = sparse ? s.features / 2 : s.features;
  Results out{new_empty(grad, {need_x ? s.tokens : 0, s.in}, dtype),
              {},
              {},
              new_empty(grad, {s.tokens, columns}, ScalarType::Float8_e4m3fn)};
  if (sparse || s.tokens == 0) {
    out.dw1 = new_empty(grad, {s.features, s.in}, dtype);
    out.dw2 = new_empty(grad, {s.out, s.features}, dtype);
  }
  if (s.tokens == 0) {
    torch::stable::zero_(out.dw1);
    torch::stable::zero_(out.dw2);
  } else if (sparse) {
    const std::optional<Tensor> chosen = hot                  ? hot
                                         : dense_features > 0 ? std::optional(densest(scope, s, saved, dense_features))
                                                              : std::nullopt;
    run_sparse(scope, s, saved, places, of_output, chosen, interleaved, need_x, out);
  } else {
    run_dense(scope, s, saved, places, of_output, need_x, out);
  }
  const Tensor next = new_empty(grad, {kDelayedScales}, ScalarType::Float), current = as_contiguous(scales);
  scope.run(SPARSE24_KERNELS(next_scales),
            NextScalesArgs{places.start, current.const_data_ptr<float>(), of_output.largest, of_output.largest_of_dh,
                           next.mutable_data_ptr<float>()});
  return {out.dx, out.dw1, out.dw2, out.dh, next};
}

SPARSE24_OP(relu2_mlp_fp8_gradients,
            "relu2_mlp_fp8_gradients(Tensor grad, Tensor x_transposed, Tensor w1_transposed, Tensor w2_transposed, "
            "Tensor values, Tensor meta, Tensor places, Tensor scales, Tensor? hot=None, SymInt dense_features=0, "
            "bool sparse=True, bool interleaved=False, bool need_x=True) -> (Tensor dx, Tensor dw1, Tensor dw2, "
            "Tensor dh, Tensor next_scales)")

}  // namespace sparse24::torch_ops
