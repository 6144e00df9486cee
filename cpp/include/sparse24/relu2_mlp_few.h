/// @file
/// relu2_mlp_few: a whole squared-ReLU network for few tokens, exact, bound by the weights that it has to read.
#pragma once

#include "sparse24/mm_active.h"

namespace sparse24 {

/// y = max(h, 0)^2 where h = x @ w.T * scale_w + bias is greater than `threshold`, else zero; h and y are rounded to
/// x's type. NaN stays NaN.
struct LinearFewArgs {
  const void* x;  ///< [tokens, in], contiguous
  DType dtype;    ///< of x, h and y
  int64_t tokens, in, out;
  const void* w;  ///< [out, in], contiguous; on CUDA, rows are a multiple of 16 bytes
  DType w_dtype;  ///< that of x, or kFloat8E4M3
  const float* scale_w;
  bool scale_w_per_row;
  const void* bias;  ///< [out], of x's type, or none
  float threshold;
  void* y;  ///< [tokens, out], contiguous; not used on CUDA, where what is between the products is in the workspace
};

/// The second product takes the y of the first: `second` repeats its pointers and sizes.
struct Relu2MlpFewArgs {
  LinearFewArgs first;
  MmActiveArgs second;
};

namespace cpu {
void linear_few(const LinearFewArgs& args);
void relu2_mlp_few(const Relu2MlpFewArgs& args);
}  // namespace cpu
namespace cuda {
/// The bytes of a call's workspace, `second.workspace`.
int64_t relu2_mlp_few_workspace(const Relu2MlpFewArgs& args);
void relu2_mlp_few(const Relu2MlpFewArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
