/// @file
/// relu2_mlp_dense: a whole squared-ReLU network of a few dozen tokens, which reads each weight once.
#pragma once

#include "sparse24/linear.h"
#include "sparse24/quantize.h"

namespace sparse24 {

/// The most tokens of a call on CUDA.
inline constexpr int64_t kMaxDenseTokens = 128;

/// d = y @ w.T * scale_y * scale_w + bias, in fp32, rounded once.
struct LinearOutArgs {
  int64_t tokens, in, out;
  const void* y;                   ///< [tokens, in], contiguous
  const void* w;                   ///< [out, in], contiguous
  DType dtype;                     ///< of y and w
  const float* scale_y = nullptr;  ///< counts as `usable_scale`; null: 1
  bool scale_y_per_row = false;    ///< [tokens], else one element
  const float* scale_w = nullptr;  ///< null: 1
  bool scale_w_per_row = false;    ///< [out], else one element
  const void* bias = nullptr;      ///< [out]
  DType bias_dtype;                ///< d_dtype or kFloat32
  void* d;                         ///< [tokens, out]
  DType d_dtype;
};

/// The steps of a network, each of which takes what the one before it wrote. `of_x` and `of_y` are float8's.
struct Relu2MlpDenseArgs {
  QuantizeArgs of_x;      ///< x to the codes that `first` reads, with a scale for each row
  LinearRelu2Args first;  ///< no statistics
  QuantizeArgs of_y;      ///< y to codes that `second` reads; with q none: `first` wrote them
  LinearOutArgs second;
};

namespace cpu {
void linear_out(const LinearOutArgs& args);
void relu2_mlp_dense(const Relu2MlpDenseArgs& args);
}  // namespace cpu
namespace cuda {
/// Rows of both weights are multiples of 16 bytes, and begin at such.
void relu2_mlp_dense(const Relu2MlpDenseArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
