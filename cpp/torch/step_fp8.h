/// @file
/// What both passes of a float8 training step share: where its scales are, its quantisation and its products.
#pragma once

#include "gradient_fp8.h"
#include "network.h"

namespace sparse24::torch_ops {

/// A view of a matrix or vector from its element `offset` on, which torch's dispatcher has no part in: that takes the
/// host several times as long.
Tensor view_of(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               int64_t offset = 0);

/// Memory for matrices of float8 codes that a pass needs for itself.
///
/// On a GPU small ones share an allocation: each takes the host as long as a launch, and a small step waits for the
/// host. Large ones have their own, which is free for what follows as soon as nobody holds them.
class CodeMemory {
 public:
  /// `sizes`: the bytes of each that will be taken.
  CodeMemory(const Tensor& like, std::initializer_list<int64_t> sizes);
  Tensor take(int64_t rows, int64_t columns);

 private:
  const Tensor& like_;
  std::optional<Tensor> shared_;
  int64_t taken_ = 0;
};

/// The scales of a step [kStepScales, kStepScaleStride], and what was seen beside them.
struct StepPlaces {
  Tensor tensor;
  float* start;

  explicit StepPlaces(const Tensor& t) : tensor(t), start(static_cast<float*>(t.mutable_data_ptr())) {}
  float* scale(StepScale of) const { return start + place_of(of); }
  float* largest(StepScale of) const { return scale(of) + kLargestBehind; }
  int32_t* saturated(StepScale of) const { return reinterpret_cast<int32_t*>(scale(of) + kSaturatedBehind); }
  /// The scale as a tensor [1], for torch's products.
  Tensor one(StepScale of) const { return view_of(tensor, {1}, {1}, place_of(of)); }
};

/// A matrix to be quantised in both orders, with a given scale or an exact one; `largest` is zero before.
struct ToQuantize {
  const Tensor& x;
  DType dtype;
  bool interleaved;
  const float* given;
  float *scale, *largest;
};
/// Fills codes [rows, columns], and `transposed` [columns, padded rows].
void quantize_both(const DeviceScope& scope, const ToQuantize& what, const Tensor& codes, const Tensor& transposed);
/// Tokens or features, padded as the columns of a transpose are.
int64_t padded(int64_t rows);
/// Makes a transpose that is a result.
Tensor new_transposed(const Tensor& x);

/// A product of float8 codes with single scales: a sparse one and b [n, a.k], K contiguous.
struct SparseProduct {
  Operand a;
  const void* values;
  const uint8_t* meta;
  const Tensor& b;
  const float *scale_a, *scale_b;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
};
/// Returns the product [a.m, b rows], of `dtype`; `transposed`: its transpose.
Tensor multiply(const DeviceScope& scope, const SparseProduct& product, DType dtype, bool transposed = false);

/// scale_x * scale_w * (x @ w.T) + bias, x [T, D] and w [F, D] dense float8 codes with single scales: through bfloat16
/// to `dtype`. Torch's product, and on the CPU the reference: an fp32 product, dequantised.
Tensor multiply_dense(const Tensor& x, const Tensor& scale_x, const Tensor& w, const Tensor& scale_w,
                      const std::optional<Tensor>& bias, ScalarType dtype);

}  // namespace sparse24::torch_ops
