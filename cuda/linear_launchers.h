// The compiled first-GEMM kernels, one translation unit each (linear_instances.def).
#pragma once

#include "sparse24/linear.h"

namespace sparse24::cuda {

template <DType kDType, DType kHidden, DType kY>
void launch_linear_relu2_sm90(const LinearRelu2Args& args, const LinearConfig& config, cudaStream_t stream);

template <DType kDType, DType kHidden, DType kY, DType kMeta>
void launch_linear_compress_sm90(const LinearCompressArgs& args, const LinearConfig& config, cudaStream_t stream);

}  // namespace sparse24::cuda
