// The compiled kernel of linear_relu2_gradient_fp8, a translation unit (tiles.def).
#pragma once

#include "sparse24/linear_relu2_gradient_fp8.h"

namespace sparse24::cuda {

template <DType kDType>
void launch_linear_relu2_gradient_fp8_sm90(const LinearRelu2GradientFp8Args& args, const GemmConfig& config,
                                           cudaStream_t stream);

}  // namespace sparse24::cuda
