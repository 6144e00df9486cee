/// @file
/// quantize_fp8: the dense counterpart of compress_fp8, for the operands that stay dense (x and the weights).
#pragma once

#include "sparse24/types.h"

namespace sparse24 {

/// q [rows, cols] = e4m3(x * (1 / scale)), rounded once, saturating; x row-major and contiguous, cols % 16 == 0 on the
/// GPU. Scales as in `CompressArgs`: given, or computed per row or for all of x.
struct QuantizeArgs {
  const void* x;
  DType x_dtype;
  int64_t rows, cols;
  void* q;
  Scaling scaling = Scaling::kRow;
  const float* given_scale = nullptr;
  float* computed_scale = nullptr;
};

namespace cpu {
void quantize_fp8(const QuantizeArgs& args);
}
namespace cuda {
void quantize_fp8(const QuantizeArgs& args, cudaStream_t stream);
}

}  // namespace sparse24
