// The compiled kernels of linear_gradient, one translation unit each (tiles.def).
#pragma once

#include "sparse24/linear_gradient.h"

namespace sparse24::cuda {

// Whether a kernel counts the non-zeros of y.
inline constexpr bool kCounting = true, kNotCounting = false;

template <DType kDType, DType kMeta, bool kCounts>
void launch_linear_gradient_sm90(const LinearGradientArgs& args, const GemmConfig& config, cudaStream_t stream);

}  // namespace sparse24::cuda
