// The compiled kernels of linear_gradient, one translation unit each (linear_gradient_instances.def).
#pragma once

#include "sparse24/linear_gradient.h"

namespace sparse24::cuda {

template <DType kDType, DType kMeta>
void launch_linear_gradient_sm90(const LinearGradientArgs& args, const LinearConfig& config, cudaStream_t stream);

}  // namespace sparse24::cuda
