/// @file
/// sparse24.relu2_mlp_fp8_gradients: the backward pass of a training step in float8, in one call, and the scales of the
/// next step.
#include <algorithm>
#include <initializer_list>
#include <utility>

#include "step_fp8_gradients.h"

namespace sparse24::torch_ops {
namespace {

constexpr OpName kOp = "sparse24.relu2_mlp_fp8_gradients";
constexpr DType kFp8 = DType::kFloat8E4M3;
/// Tokens that are counted to find the densest features, as `feature_counts` of Python does.
constexpr int64_t kSamples = 1024;

void check_codes(const char* argument, const Tensor& t, const Tensor& grad, int64_t rows, int64_t columns,
                 const char* meaning) {
  check_fp8_beside(kOp, argument, t, grad);
  expect((rows < 0 || t.size(0) == rows) && t.size(1) == columns, kOp, argument, " to have shape ", meaning, ", got ",
         Shape{t});
}

StepSizes check(const Tensor& grad, const StepSaved& saved, const Tensor& places, const Tensor& scales) {
  constexpr int64_t padding = token_padding(kFp8);
  for (const auto& [argument, t] :
       std::initializer_list<std::pair<const char*, const Tensor&>>{{"x_transposed", saved.x},
                                                                    {"w1_transposed", saved.w1},
                                                                    {"w2_transposed", saved.w2},
                                                                    {"values", saved.values},
                                                                    {"meta", saved.meta},
                                                                    {"places", places}}) {
    check_defined(kOp, argument, t);
  }
  check_sizes(kOp, "grad", grad, 2);
  StepSizes s{grad.size(0), 0, 0, grad.size(1), round_up(grad.size(0), padding), {}};
  s.dtype = check_dtype(kOp, "grad", grad, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  expect(s.out > 0 && s.out % 16 == 0, kOp, "grad to have a multiple of 16 columns above 0, got ", s.out);
  check_codes("x_transposed", saved.x, grad, -1, s.padded, "[D, T] with T padded to a multiple of 32");
  s.in = saved.x.size(0);
  expect(s.in > 0 && s.in % 16 == 0, kOp, "x_transposed to have a multiple of 16 rows above 0, got ", s.in);
  check_codes("w2_transposed", saved.w2, grad, -1, round_up(s.out, padding), "[F, columns of grad, padded]");
  s.features = saved.w2.size(0);
  const int64_t multiple = saved.sparse ? feature_alignment(kFp8, Dim::kFeatures) : 16;
  expect(s.features > 0 && s.features % multiple == 0, kOp, "w2_transposed to have a multiple of ", multiple,
         " rows above 0, got ", s.features);
  check_codes("w1_transposed", saved.w1, grad, s.in, round_up(s.features, padding), "[D, F] with F padded");
  check_codes("values", saved.values, grad, s.tokens, saved.sparse ? s.features / 2 : s.features,
              saved.sparse ? "[T, F / 2]" : "[T, F] (sparse=False)");
  check_device(kOp, "meta", saved.meta, "grad", grad);
  if (saved.sparse) {
    check_meta(kOp, saved.meta, Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures));
  } else {
    expect(saved.meta.numel() == 0, kOp, "meta to have 0 elements (sparse=False), got ", saved.meta.numel());
  }
  check_device(kOp, "places", places, "grad", grad);
  check_sizes(kOp, "places", places, 2);
  check_scale(kOp, "places", places, kStepScales * kStepScaleStride, false, "of relu2_mlp_fp8");
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

/// Finds the features that the most tokens of a sample use.
DenseFeatures densest(const StepBackward& step, int64_t count) {
  if (count == 0) return {};
  const StepSizes& s = step.sizes;
  const StepScratch& scratch = step.scratch;
  FeatureCountsArgs args{};
  args.a = Operand::of(s.tokens, s.features, kFp8, Dim::kFeatures);
  args.values = step.saved.values.const_data_ptr();
  args.meta = step.saved.meta.const_data_ptr<uint8_t>();
  args.meta_dtype = kFp8;
  args.samples = std::min(kSamples, s.tokens);
  args.counts = scratch.counts;
  step.scope.run(SPARSE24_KERNELS(feature_counts), args);
  step.scope.run(SPARSE24_KERNELS(densest_features),
                 DensestFeaturesArgs{scratch.counts, s.features, count, scratch.dense});
  return {scratch.dense, count};
}

StepGradients gradients(const StepBackward& step, const std::optional<Tensor>& hot, int64_t dense_features,
                        OfOutput& grad) {
  if (step.sizes.tokens == 0) return gradients_of_nothing(step);
  if (!step.saved.sparse) return dense_gradients(step, grad);
  if (!hot) return sparse_gradients(step, densest(step, dense_features), grad);
  const Tensor given = as_contiguous(*hot);
  return sparse_gradients(step, {given.const_data_ptr<int64_t>(), given.numel()}, grad);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> relu2_mlp_fp8_gradients(
    const Tensor& grad, const Tensor& x_transposed, const Tensor& w1_transposed, const Tensor& w2_transposed,
    const Tensor& values, const Tensor& meta, const Tensor& places_of_step, const Tensor& scales,
    const std::optional<Tensor>& hot, int64_t dense_features, bool sparse, bool interleaved, bool need_x,
    bool need_dh) {
  const StepSizes s =
      check(grad, {x_transposed, w1_transposed, w2_transposed, values, meta, sparse}, places_of_step, scales);
  if (hot) check_count("hot", "elements", check_hot(kOp, *hot, grad, s.features, "rows of w2_transposed"), s.features);
  check_count("dense_features", "in number", dense_features, s.features);
  const DeviceScope scope(kOp, grad);

  const Tensor x = contiguous_aligned(x_transposed), w1 = contiguous_aligned(w1_transposed),
               w2 = contiguous_aligned(w2_transposed), y = contiguous_aligned(values),
               y_meta = contiguous_aligned(meta);
  const StepSaved saved{x, w1, w2, y, y_meta, sparse};
  const StepPlaces places(contiguous_aligned(places_of_step));
  const Tensor current = as_contiguous(scales);
  const StepScratch scratch(grad, sparse ? s.features : 0, sparse && !hot ? dense_features : 0);
  const StepPlaces& seen = scratch.seen;
  scope.run(SPARSE24_KERNELS(spread_scales),
            SpreadScalesArgs{current.const_data_ptr<float>(), nullptr, nullptr, seen.start});
  const StepCodes sizes(s, sparse, need_dh);
  CodeMemory memory(grad, {s.tokens * s.out, s.out * s.padded, sizes.dh, sizes.dh_tokens, sizes.y_tokens});
  OfOutput of_output{memory.take(s.tokens, s.out), memory.take(s.out, s.padded)};
  const StepBackward step{scope, s, saved, places, scratch, memory, sparse && interleaved, need_x, need_dh};
  quantize_both(scope,
                {grad, s.dtype, step.interleaved, places.scale(StepScale::kGrad), seen.scale(StepScale::kGrad),
                 seen.largest(StepScale::kGrad)},
                *of_output.codes, of_output.transposed);
  const StepGradients found = gradients(step, hot, dense_features, of_output);
  const Tensor next = new_empty(grad, {kDelayedScales}, ScalarType::Float);
  scope.run(SPARSE24_KERNELS(next_scales),
            NextScalesArgs{places.start, current.const_data_ptr<float>(), seen.largest(StepScale::kGrad),
                           seen.largest(StepScale::kDh), next.mutable_data_ptr<float>()});
  return {found.dx, found.dw1, found.dw2, found.dh, next};
}

SPARSE24_OP(relu2_mlp_fp8_gradients,
            "relu2_mlp_fp8_gradients(Tensor grad, Tensor x_transposed, Tensor w1_transposed, Tensor w2_transposed, "
            "Tensor values, Tensor meta, Tensor places, Tensor scales, Tensor? hot=None, SymInt dense_features=0, "
            "bool sparse=True, bool interleaved=False, bool need_x=True, bool need_dh=True) -> (Tensor dx, "
            "Tensor dw1, Tensor dw2, Tensor dh, Tensor next_scales)")

}  // namespace sparse24::torch_ops
