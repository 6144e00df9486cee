// The compiled kernels of linear_relu2_gradient, one translation unit each (gemm/linear_relu2_gradient_instances.def).
#pragma once

#include "sparse24/linear_relu2_gradient.h"

namespace sparse24::cuda {

template <DType kDType, LinearTile kTile>
void launch_linear_relu2_gradient_sm90(const LinearRelu2GradientArgs& args, const LinearConfig& config,
                                       cudaStream_t stream);

}  // namespace sparse24::cuda
