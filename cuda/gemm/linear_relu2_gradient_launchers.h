// The compiled kernels of linear_relu2_gradient, one translation unit each (tiles.def).
#pragma once

#include "sparse24/linear_relu2_gradient.h"

namespace sparse24::cuda {

template <DType kDType, GemmTile kTile>
void launch_linear_relu2_gradient_sm90(const LinearRelu2GradientArgs& args, const GemmConfig& config,
                                       cudaStream_t stream);

}  // namespace sparse24::cuda
