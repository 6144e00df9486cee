/// @file
/// The products of the backward pass of a float8 training step, for which sparse24.relu2_mlp_fp8_gradients is the op.
///
/// Between them lie matrices of the size of the activation. Each is freed when the last kernel that reads it is
/// enqueued: its memory then belongs to the next result, on the same stream. Held until the end they make a third more.
#pragma once

#include "step_fp8.h"

namespace sparse24::torch_ops {

/// What the forward pass has saved: x and the weights transposed, and the activation.
struct StepSaved {
  const Tensor &x, &w1, &w2, &values, &meta;
  bool sparse;
};

struct StepSizes {
  int64_t tokens, in, features, out, padded;
  DType dtype;  ///< of grad and the results
};

/// What is small, in one allocation: what is seen of grad and dh, at places of this pass that `spread_scales` clears,
/// and what finds the densest features.
struct StepScratch {
  static constexpr int64_t kSeen = 64;  // floats, so that what is behind them is aligned
  StepPlaces seen;
  int32_t *counts, *slots;
  int64_t* dense;

  StepScratch(const Tensor& like, int64_t features, int64_t dense_features)
      : seen(new_empty(like, {kSeen + 2 * features + 2 * dense_features}, ScalarType::Float)),
        counts(reinterpret_cast<int32_t*>(seen.start + kSeen)),
        slots(counts + features),
        dense(reinterpret_cast<int64_t*>(slots + features)) {}
  static_assert(kSeen >= kStepScales * kStepScaleStride);
};

/// Features whose weight gradients are dense products, if any.
struct DenseFeatures {
  const int64_t* indices = nullptr;
  int64_t count = 0;
};

/// What both ways to compute the gradients take.
struct StepBackward {
  const DeviceScope& scope;
  const StepSizes& sizes;
  const StepSaved& saved;
  const StepPlaces& places;
  const StepScratch& scratch;
  CodeMemory& memory;
  bool interleaved, need_x, need_dh;
};

/// The gradient of the output: codes along rows until the first product has read them, and along columns.
struct OfOutput {
  std::optional<Tensor> codes;
  Tensor transposed;
};

struct StepGradients {
  Tensor dx, dw1, dw2, dh;
};

/// Where the activation is 2:4.
StepGradients sparse_gradients(const StepBackward& step, const DenseFeatures& dense, OfOutput& grad);
/// Where it is dense.
StepGradients dense_gradients(const StepBackward& step, OfOutput& grad);
/// The bytes of the matrices that they take of `CodeMemory`, beside those of the gradient of the output.
struct StepCodes {
  int64_t dh, dh_tokens, y_tokens;

  StepCodes(const StepSizes& s, bool sparse, bool need_dh);
};
/// Without tokens.
StepGradients gradients_of_nothing(const StepBackward& step);

}  // namespace sparse24::torch_ops
